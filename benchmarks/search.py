"""What a search costs: the published loop written plainly, against raylp's strategies, in one run.

    python benchmarks/search.py --model DIR --data search.jsonl --pair en-de --examples train.jsonl --remove 3

The plain loop loads the model anew for every candidate, cuts the layers out of it, calls transformers' own `generate`
on batches of as many sentences (--batch-size), up to the same bound, and scores with sacrebleu. `--time-candidates K`
times K candidates of every round, from its best to its worst, and extrapolates to the rest; the table says so. raylp's
strategies run in this process on one resident model, through the code its workers run. Everything is written to --out
as it comes, and the same command goes on from there. `--trace FILE` writes what was generated, row by row, for
benchmarks/projection.py, which says what the same searches would take on a model of another size.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raylp.data.corpus import read_pairs
from raylp.data.prompt import Prompt, choose_examples
from raylp.generate.base import StopRule, common_prefix, stop_rule, to_output
from raylp.ledger import Ledger
from raylp.machine import machine
from raylp.metrics.objective import Objective
from raylp.models.checkpoint import layer_costs, stack_size
from raylp.models.load import load_model, load_tokenizer, read_generation_config
from raylp.models.source import fingerprint, locate
from raylp.models.stack import find_stack, text_config
from raylp.rundir import RunDir
from raylp.search.blocks import Block, make_blocks
from raylp.search.evaluator import LedgerEvaluator
from raylp.search.plan import Removed, Round, protected_layers
from raylp.search.strategies import Options, Search
from raylp.search.targets import Target
from raylp.search.worker import SearchWorker, Work, pieces


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, a hub id, or package:NAME")
    parser.add_argument("--data", required=True, help="sentences to search on: .jsonl or .tsv")
    parser.add_argument("--pair", required=True, help="such as en-de")
    parser.add_argument("--examples", help="a file whose first pairs stand in the prompt")
    parser.add_argument("--num-examples", type=int, default=3)
    parser.add_argument("--remove", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--block", type=int, default=16, help="sentences between two looks of a race")
    parser.add_argument("--batch-size", type=int, default=128, help="sentences at once, for all")
    parser.add_argument("--risk", type=float, default=0.05)
    parser.add_argument("--dtype", default=None, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--strategies", default="exhaustive,race,sleb,oneshot")
    parser.add_argument("--time-candidates", type=int, default=3, help="of every round of the plain loop; 0: all")
    parser.add_argument("--trace", type=Path, help="where to write what was generated; needs the exhaustive search")
    parser.add_argument("--out", default="runs/bench-search", help="where ledgers and times are kept")
    args = parser.parse_args()
    if args.trace and "exhaustive" not in args.strategies.split(","):
        parser.error("--trace needs the exhaustive search among the --strategies")
    return args


def length(tokenizer: Any, text: str) -> int:
    """Tokens that were generated for a text, its end included."""
    return len(tokenizer(text, add_special_tokens=False).input_ids) + 1


def main() -> None:
    args = arguments()
    path = locate(args.model, None, lambda text: print(text, file=sys.stderr))
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    prompt = (
        Prompt(examples=choose_examples(read_pairs(args.examples, args.pair), args.num_examples))
        if (args.examples)
        else Prompt()
    )
    sentences = read_pairs(args.data, args.pair)[: args.sentences]
    blocks = make_blocks(sentences, prompt, load_tokenizer(path), args.block)
    objective = Objective.of({"chrF2++": 1.0}, [args.pair])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    worker = SearchWorker(torch.get_num_threads(), prompt.newline, str(out / "logs"), args.batch_size)
    rows: list[dict[str, Any]] = []
    found: dict[str, Search] = {}
    for strategy in args.strategies.split(","):
        row, found[strategy] = ours(strategy, args, path, blocks, objective, dtype, worker, out)
        rows.append(row)
    reference = found.get("exhaustive") or next(iter(found.values()))
    batches = make_blocks(sentences, prompt, load_tokenizer(path), args.batch_size)
    rows.insert(0, plain(args, path, batches, objective, prompt, dtype, reference.rounds, out))
    show(args, rows, len(sentences), dtype)
    if args.trace:
        write_trace(args, rows, found["exhaustive"].rounds, blocks, out)
    (out / "table.json").write_text(json.dumps({"machine": machine(), "command": sys.argv, "rows": rows}, indent=2))


def ours(
    strategy: str,
    args: argparse.Namespace,
    path: Path,
    blocks: list[Block],
    objective: Objective,
    dtype: str,
    worker: SearchWorker,
    out: Path,
) -> tuple[dict[str, Any], Search]:
    """One strategy in this process. A second time its time is that of its ledger's lines, the sum of all work."""
    name, _, criterion = strategy.partition(":")
    tokenizer = load_tokenizer(path)
    rundir = RunDir(str(out / strategy.replace(":", "-")))

    def compute(works: list[Work]) -> Iterator[tuple[Work, list[dict[str, Any]]]]:
        for piece in pieces(works, args.batch_size, 1, evaluator.expected):
            lines = worker.do_together(piece)
            texts = [text for own in lines for text in own[0].get("texts", ())]
            with (out / f"{strategy.replace(':', '-')}.calls.jsonl").open("a") as stream:
                stream.write(json.dumps([length(tokenizer, text) for text in texts]) + "\n")
            yield from zip(piece, lines, strict=True)

    evaluator = LedgerEvaluator(
        path, fingerprint(path), blocks, objective, Ledger(rundir), compute, "transformers", dtype
    )
    num_layers = stack_size(path)
    target = Target(
        num_layers, protected_layers([0, -1], num_layers), (num_layers - args.remove,), costs=layer_costs(path)
    )
    options = Options(name, args.risk, criterion or "perplexity", floor="keep")
    search = Search(evaluator, target, options, lambda rounds: tell(strategy, rounds))
    worker.translate(str(path), "transformers", dtype, blocks[0].requests[:1])  # loaded before the clock starts
    seconds = rundir.read_json("seconds.json") if rundir.exists("seconds.json") else 0.0
    started = time.perf_counter()
    try:
        search.run()
    finally:
        rundir.write_json("seconds.json", seconds + time.perf_counter() - started)
    rundir.write_text("recipe.yaml", "{}\n")  # with the plan, what `raylp replay` and scaling.py read
    rounds = [r.as_dict() for r in search.rounds]
    plan = {"fingerprint": evaluator.model, "num_layers": num_layers, "objective": {"chrF2++": 1.0}, "rounds": rounds}
    rundir.write_json("plan.json", plan)
    spent = evaluator.spent()
    return {
        "name": strategy,
        "seconds": rundir.read_json("seconds.json"),
        "units": spent["units"],
        "sentences": spent["sentences"],
        "removed": list(search.rounds[-1].gone),
        "scores": [r.score.value if r.score else None for r in search.rounds],
        "note": "",
    }, search


def tell(strategy: str, rounds: Sequence[Round]) -> None:
    last = rounds[-1]
    score = f"{last.score.value:.2f}" if last.score else "-"
    print(f"{strategy}: round {len(rounds)}, without {list(last.gone)}: {score}", file=sys.stderr, flush=True)


# --- the published loop, plainly ---


def plain(
    args: argparse.Namespace,
    path: Path,
    blocks: list[Block],
    objective: Objective,
    prompt: Prompt,
    dtype: str,
    rounds: Sequence[Round],
    out: Path,
) -> dict[str, Any]:
    """Times, and checks the scores of, candidates of every round of `rounds`; finished ones are read from the file."""
    file = out / "plain.jsonl"
    known = (
        {tuple(row["removed"]): row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    )
    seconds, worst, complete, removed = 0.0, 0.0, True, []
    total = sentences = 0
    for r in rounds:
        chosen = spread(r, args.time_candidates)
        complete = complete and len(chosen) == len(r.candidates)
        times = []
        for candidate in chosen:
            if candidate.removed not in known:
                began = time.perf_counter()
                value = score_plainly(path, candidate.removed, blocks, objective, prompt, dtype)
                row = {"removed": candidate.removed, "seconds": time.perf_counter() - began, "score": value}
                known[candidate.removed] = row
                with file.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(f"plain: without {list(candidate.removed)}: {value:.2f}, {row['seconds']:.1f} s", file=sys.stderr)
            times.append(known[candidate.removed]["seconds"])
            if candidate.score is not None and candidate.sentences == sum(map(len, blocks)):
                worst = max(worst, abs(known[candidate.removed]["score"] - candidate.score.value))
        seconds += sum(times) / len(times) * len(r.candidates)
        total += len(r.candidates) * len(blocks)
        sentences += len(r.candidates) * sum(map(len, blocks))
        if len(chosen) == len(r.candidates):
            best = max(r.candidates, key=lambda c: (known[c.removed]["score"], -c.removed[-1]))
            removed.append(best.removed[-1])
    timed = sum(len(spread(r, args.time_candidates)) for r in rounds)
    return {
        "name": "published loop, plainly",
        "seconds": seconds,
        "units": total,
        "sentences": sentences,
        "removed": removed if complete else None,
        "scores": [],
        "worst_difference": worst,
        "note": ""
        if complete
        else f"{timed} of {sum(len(r.candidates) for r in rounds)} candidates timed, extrapolated",
    }


def write_trace(
    args: argparse.Namespace, rows: list[dict[str, Any]], rounds: Sequence[Round], blocks: list[Block], out: Path
) -> None:
    """Rows of every call of the strategies; rows and steps of every batch of the plain loop, by the exhaustive search.

    transformers' generate ends a batch with its last row, and knows no loops.
    """
    lines = {
        (tuple(line["removed"]), line["block"]): line
        for line in Ledger(RunDir(str(out / "exhaustive"))).lines.values()
        if "texts" in line
    }
    tokenizer = load_tokenizer(locate(args.model, None))
    calls = []
    for candidate in (candidate for r in rounds for candidate in r.candidates):
        steps = []
        for block in blocks:
            line = lines[tuple(sorted(candidate.removed)), block.hash]
            for text, finish, request in zip(line["texts"], line["finish"], block.requests, strict=True):
                steps.append(length(tokenizer, text) if finish == "stop" else request.max_new_tokens)
        batches = [steps[start : start + args.batch_size] for start in range(0, len(steps), args.batch_size)]
        calls += [[len(batch), max(batch)] for batch in batches]
    prompts = [request.tokens for block in blocks for request in block.requests]
    files = {row["name"]: out / f"{row['name'].replace(':', '-')}.calls.jsonl" for row in rows[1:]}
    made = {name: list(map(json.loads, file.read_text().splitlines())) for name, file in files.items() if file.exists()}
    trace: dict[str, Any] = {
        "of": f"{args.model}, {args.pair}, {args.sentences} sentences, {args.remove} layers out",
        "batch_size": args.batch_size,
        "prompt_tokens": round(sum(map(len, prompts)) / len(prompts)),
        "shared_tokens": common_prefix(prompts),
        "loop": {"candidates": sum(len(r.candidates) for r in rounds), "calls": calls},
        "strategies": {name: [lengths for lengths in calls if lengths] for name, calls in made.items()},
    }
    args.trace.write_text(json.dumps(trace) + "\n")


def spread(r: Round, count: int) -> list[Any]:
    """`count` candidates of a round, from its best to its worst: broken ones ramble and take longer."""
    ranked = sorted(r.candidates, key=lambda c: -(c.score.value if c.score else 0.0))
    if count <= 0 or count >= len(ranked):
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]


def score_plainly(
    path: Path, removed: Removed, blocks: list[Block], objective: Objective, prompt: Prompt, dtype: str
) -> float:
    """One candidate: load, cut, generate, score."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = cut_plainly(load_model(path, dtype, device), removed)
    tokenizer = load_tokenizer(path)
    rule = stop_rule(tokenizer, [text_config(model), read_generation_config(path)], prompt.newline)
    totals: Any = 0
    for block in blocks:
        texts = generate_plainly(model, tokenizer, block, rule, prompt.newline)
        totals = totals + objective.metric("chrF2++", block.pair).statistics(texts, block.references).sum(0)
    return objective.score(totals)


def cut_plainly(model: Any, removed: Iterable[int]) -> Any:
    """The layers taken out of a model of one's own, numbers and per-layer lists put right."""
    stack = find_stack(model)
    owner, _, name = stack.path.rpartition(".")
    parent = model.get_submodule(owner)
    kept = [i for i in range(stack.num_layers) if i not in set(removed)]
    setattr(parent, name, torch.nn.ModuleList(getattr(parent, name)[i] for i in kept))
    for place, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config = text_config(model)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    return model


@torch.inference_mode()
def generate_plainly(model: Any, tokenizer: Any, block: Block, rule: StopRule, newline: bool) -> list[str]:
    """transformers' generate on the block as one batch; each row is then cut at its own bound, stop or loop."""
    longest = max(len(request.tokens) for request in block.requests)
    pad = tokenizer.pad_token_id
    rows = [[pad] * (longest - len(request.tokens)) + list(request.tokens) for request in block.requests]
    mask = [[0] * (longest - len(request.tokens)) + [1] * len(request.tokens) for request in block.requests]
    made = model.generate(
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(request.max_new_tokens for request in block.requests),
        do_sample=False,
        eos_token_id=sorted(rule.stop),
        pad_token_id=pad,
    )[:, longest:].tolist()
    texts = []
    for request, tokens in zip(block.requests, made, strict=True):
        kept, finish = rule.cut(tokens[: request.max_new_tokens])
        texts.append(to_output(tokenizer, kept, finish, newline).text)
    return texts


def show(args: argparse.Namespace, rows: list[dict[str, Any]], sentences: int, dtype: str) -> None:
    """The table."""
    title = (
        f"{args.model}, {args.pair}, {sentences} sentences, {args.remove} layers out, {dtype}, batches of "
        f"{args.batch_size}, blocks of {args.block}, {torch.get_num_threads()} threads"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "seconds", "faster", "units", "sentences", "fewer", "removed", "chrF2++ without", "note"):
        table.add_column(column, justify="right" if column in ("seconds", "faster", "units", "sentences") else "left")
    first = rows[0]
    for row in rows:
        last = next((score for score in reversed(row["scores"]) if score is not None), None)
        table.add_row(
            row["name"],
            f"{row['seconds']:,.0f}",
            f"{first['seconds'] / row['seconds']:.1f} x",
            f"{row['units']:,}",
            f"{row['sentences']:,}",
            f"{first['sentences'] / row['sentences']:.1f} x" if row["sentences"] else "-",
            str(row["removed"] or "-"),
            f"{last:.2f}" if last is not None else "-",
            row["note"],
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if "worst_difference" in first:
        print(f"largest difference between plain and raylp's score of one candidate: {first['worst_difference']:.4f}")


if __name__ == "__main__":
    main()
