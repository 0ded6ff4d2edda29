"""Every model of a run translates every test set; scores, intervals, paired comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.data.corpus import Pair, parse_jsonl, write_jsonl
from raylp.evaluate.results import write_results
from raylp.evaluate.scores import score_translations
from raylp.generate.layout import Layout
from raylp.generate.pool import Pool, batch_size_of, plan_workers
from raylp.generate.schedule import even
from raylp.generate.translate import read_stop_rule
from raylp.ledger import (
    TRANSLATION,
    Ledger,
    block_hash,
    decoding_of,
    said,
    score_facts,
    score_key,
    shares,
    unit_key,
    write_segment,
)
from raylp.metrics.intervals import paired_difference, score_with_interval
from raylp.metrics.registry import short_name
from raylp.models.checkpoint import sizes
from raylp.models.load import load_tokenizer
from raylp.names import REPAIRED, choose_models, kind_of, whole_of
from raylp.progress import Task
from raylp.quantize.engines import are_shared, engine_of, identity, weights_bytes
from raylp.rundir import RunDir

BLOCK = 16  # sentences of a line of the ledger


@dataclass(frozen=True)
class Job:
    """One model over one test set, in which engine and data type."""

    name: str
    path: Path
    test_set: str
    examples: list[Pair]
    backend: str
    dtype: str


def evaluate(context: Context) -> dict[str, Any]:
    """Writes translations/<model>/<test set>.jsonl and the scores. A block translated once, in this run or in one that
    shares its cache, is not translated again.
    """
    recipe, heal = context.recipe.evaluate, context.recipe.heal
    assert recipe is not None
    models = choose_models(recipe.models, context.models(), "evaluate.models")
    cluster.start(context.recipe.resources)
    described = {name: sizes(path) for name, path in models.items()}
    runs_in = {name: _runs_in(context, path) for name, path in models.items()}
    jobs = [
        Job(name, path, test_set, examples, *runs_in[name])
        for name, path in models.items()
        for test_set, examples in context.splits.test.items()
        if not _is_translated(context, name, test_set, examples)
    ]
    held = [(path, runs_in[name][1]) for name, path in models.items()]
    layout = plan_workers(
        context.recipe.resources, max(starmap(weights_bytes, held)), shared=all(starmap(are_shared, held))
    )
    rows = batch_size_of(context.recipe.resources, layout)
    ledger = Ledger(context.rundir, RunDir(context.recipe.cache) if context.recipe.cache else None)
    with context.reporter.task("evaluate", sum(len(job.examples) for job in jobs)) as task:
        for backend in dict.fromkeys(job.backend for job in jobs):
            # On a CPU, engines of vLLM share no weights, and one of them uses all cores.
            alone = backend == "vllm" and not layout.gpus and context.recipe.resources.workers == "auto"
            own = Layout(1) if alone else layout
            pool = Pool(own, context.prompt.newline, context.rundir.logs(), batch_size=rows)
            try:
                for job in jobs:
                    if job.backend == backend:
                        _translate(context, ledger, pool, task, job, rows)
            finally:
                pool.close()
    statistics, metrics = score_translations(context, list(models), recipe.metrics)
    names = [short_name(name) for name in recipe.metrics]
    context.rundir.write_json(
        "evaluate.json",
        {
            "models": [
                {
                    "name": name,
                    **described[name],
                    "scores": {
                        test_set: {
                            key: score_with_interval(
                                metrics[test_set, key], statistics[name, test_set, key], recipe.resamples
                            ).as_dict()
                            for key in names
                        }
                        for test_set in context.splits.test
                    },
                }
                for name in models
            ],
            "comparisons": [
                {
                    "a": a,
                    "b": b,
                    "test_set": test_set,
                    "metric": key,
                    "difference": paired_difference(
                        metrics[test_set, key],
                        statistics[a, test_set, key],
                        statistics[b, test_set, key],
                        recipe.resamples,
                    ).as_dict(),
                }
                for a, b in comparisons(list(models), heal is not None and heal.every is not None)
                for test_set in context.splits.test
                for key in names
            ],
        },
    )
    results = write_results(context.rundir)
    return {
        "models": {entry["name"]: _values(entry["scores"]) for entry in results["models"]},
        "engines": ", ".join(f"{name} {backend} {dtype}" for name, (backend, dtype) in runs_in.items()),
    }


def _runs_in(context: Context, path: Path) -> tuple[str, str]:
    """Backend and data type that the model in `path` translates with: as the recipe says, or as it is quantised for.

    What vLLM alone runs is judged as it is served, on a CPU in bfloat16.
    """
    recipe = context.recipe.evaluate
    assert recipe is not None
    own = engine_of(path)
    usual = "bfloat16" if own == "vllm" and context.dtype == "float32" else context.dtype
    return own or recipe.backend, usual if recipe.dtype == "auto" else recipe.dtype


def _values(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: round(score["value"], 4) for key, score in each.items()} for name, each in scores.items()}


def comparisons(names: list[str], in_turn: bool = False) -> list[tuple[str, str]]:
    """(a, b) for every difference worth stating: healed, repaired and pruned models against the unpruned ones,
    quantised ones against what they were made from.

    `in_turn`: healing came in between, so that only the smallest model was healed as often as the unpruned one.
    """
    healed = [name for name in names if kind_of(name) == "healed"]
    alike = [min(healed, key=lambda name: int(name.rpartition("-")[2]))] if in_turn and healed else healed
    pairs = [pair for a in healed for pair in ([(a, "baseline-healed")] if a in alike else []) + [(a, "baseline")]]
    for a in names:
        if kind_of(a) in REPAIRED.values():
            pairs += [(a, a.replace(kind_of(a), "pruned")), (a, "baseline")]
    pairs += [(a, "baseline") for a in names if kind_of(a) == "pruned"]
    pairs += [("baseline-healed", "baseline"), ("baseline", "original")]
    for a in names:
        if whole_of(a) != a:
            pairs += [(a, whole_of(a))] + [(a, "baseline")] * (whole_of(a) != "baseline")
    return [(a, b) for a, b in pairs if a in names and b in names]


def _is_translated(context: Context, name: str, test_set: str, examples: Sequence[Pair]) -> bool:
    """Whether the translations are there, and of these examples: test text may change until the stage is done."""
    place = f"translations/{name}/{test_set}.jsonl"
    if not context.rundir.exists(place):
        return False
    rows = parse_jsonl(context.rundir.read_text(place))
    return len(rows) == len(examples) and all(
        row == {**row, **example.as_dict()} for row, example in zip(rows, examples, strict=True)
    )


def _translate(context: Context, ledger: Ledger, pool: Pool, task: Task, job: Job, rows: int) -> None:
    """One model over one test set, at most `rows` sentences at a time; what any run with this ledger has translated
    is taken from it.
    """
    name, path, test_set, examples = job.name, job.path, job.test_set, job.examples
    tokenizer = load_tokenizer(path)
    requests = context.prompt.requests(tokenizer, [(example.source, example.pair) for example in examples])
    room = max(len(request.tokens) + request.max_new_tokens for request in requests)
    parts = {start: slice(start, start + BLOCK) for start in range(0, len(examples), BLOCK)}
    ends = read_stop_rule(path, tokenizer, context.prompt.newline).stop
    model, decoding = identity(path), decoding_of(context.prompt.chat, ends)
    facts = {}
    for start, part in parts.items():
        block = block_hash(requests[part], [example.target for example in examples[part]])
        facts[start] = score_facts(model, (), block, TRANSLATION, job.backend, job.dtype, decoding)
    missing = [start for start in parts if ledger.translated(unit_key(facts[start])) is None]
    task.advance(len(examples) - sum(len(examples[parts[start]]) for start in missing))
    size = even(len(missing), max(1, rows // BLOCK), len(pool.workers))
    together = [missing[first : first + size] for first in range(0, len(missing), size)]

    def submit(worker: Any, some: list[int]) -> Any:
        asked = [(requests[parts[start]], (), None) for start in some]
        return worker.translate_together.remote(str(path), job.backend, job.dtype, asked, room=room)

    for some, (made, seconds) in pool.run(together, submit, task):
        lines = []
        for start, outputs, share in zip(some, made, shares(seconds, made), strict=True):
            rows_of = [[len(output.tokens)] for output in outputs]
            line = {"key": score_key(facts[start]), **facts[start], "statistics": rows_of, "worker": "evaluate"}
            lines.append(line | said(examples[start].pair, outputs, share))
        write_segment(context.rundir, lines)
        for line in lines:
            ledger.remember(line)
            task.advance(len(line["texts"]), f"{name} on {test_set}")
    found = [ledger.translated(unit_key(facts[start])) for start in parts]
    said_all = [pair for line in found if line for pair in zip(line["texts"], line["finish"], strict=True)]
    whole = [
        {**example.as_dict(), "hypothesis": text, "finish": finish}
        for example, (text, finish) in zip(examples, said_all, strict=True)
    ]
    context.rundir.write_text(f"translations/{name}/{test_set}.jsonl", write_jsonl(whole))
