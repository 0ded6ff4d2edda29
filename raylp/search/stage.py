"""The search over a Ray cluster: candidates x blocks of sentences are units for workers with a resident model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raylp import cluster
from raylp.context import Context
from raylp.data.languages import split_pair
from raylp.generate.base import LOOP_PERIOD, LOOP_REPEATS, LOOP_SPAN, Request
from raylp.generate.pool import Pool, Worker, num_workers
from raylp.ledger import Ledger, block_hash, score_facts, score_key, write_segment
from raylp.metrics.intervals import Score, score_with_interval
from raylp.metrics.ngram import metric
from raylp.models.checkpoint import count_parameters, stack_size
from raylp.models.load import load_tokenizer, read_config
from raylp.models.source import fingerprint
from raylp.progress import Task
from raylp.rundir import RunDir
from raylp.search.greedy import Removed, Round, greedy, layers_to_remove, num_evaluations, protected_layers

SCHEMA = 1


class SearchWorker(Worker):
    """A worker that also scores, and files what it found itself: a finished block outlives the driver."""

    def score(
        self,
        path: str,
        requests: Sequence[Request],
        references: Sequence[str],
        facts: dict[str, Any],
        target_language: str,
        run_url: str,
    ) -> dict[str, Any]:
        """The ledger line of one block under one candidate."""
        outputs, seconds = self.translate(
            path, facts["backend"], facts["dtype"], requests, facts["removed"], skippable=facts["backend"] == "vllm"
        )
        statistics = metric(facts["metric"], target_language).statistics(
            [output.text for output in outputs], references
        )
        line = {
            "key": score_key(facts),
            **facts,
            "statistics": statistics.tolist(),
            "tokens": sum(len(output.tokens) for output in outputs),
            "seconds": round(seconds, 4),
            "worker": f"{_host()}:{self.pid()}",
        }
        write_segment(RunDir(run_url), [line])
        return line


class BlockScorer:
    """Scores sets of removed layers on the search sentences: from the ledger, else by the pool."""

    def __init__(self, context: Context, ledger: Ledger, pool: Pool | None, task: Task | None) -> None:
        recipe = context.recipe.search
        assert recipe is not None
        self.context, self.ledger, self.pool, self.task = context, ledger, pool, task
        self.path = context.baseline
        self.model = fingerprint(self.path)
        self.backend = recipe.backend
        self.dtype = context.dtype if recipe.dtype == "auto" else recipe.dtype
        self.metric_name = recipe.metric
        self.metric = metric(recipe.metric)
        self.blocks = make_blocks(context, self.path, recipe.block)

    def units(self, removed: Removed) -> list[dict[str, Any]]:
        """The facts of every block under one candidate."""
        decoding = f"greedy|loop:{LOOP_PERIOD},{LOOP_REPEATS},{LOOP_SPAN}|chat:{self.context.prompt.chat}"
        return [
            score_facts(self.model, removed, block["hash"], self.metric_name, self.backend, self.dtype, decoding)
            for block in self.blocks
        ]

    def missing(self, candidates: list[Removed]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(facts, block) of what no ledger line answers yet."""
        return [
            (facts, block)
            for removed in candidates
            for facts, block in zip(self.units(removed), self.blocks, strict=True)
            if self.ledger.find(score_key(facts)) is None
        ]

    def __call__(self, candidates: list[Removed]) -> list[Score]:
        missing = self.missing(candidates)
        if missing:
            assert self.pool is not None and self.task is not None
            for (facts, _), line in self.pool.run(missing, self._submit, self.task):
                self.ledger.remember(line)
                self.task.advance(1, f"tried without {facts['removed']}")
        scores = []
        for removed in candidates:
            lines = [self.ledger.find(score_key(facts)) for facts in self.units(removed)]
            rows = np.concatenate([np.asarray(line["statistics"]) for line in lines if line])
            scores.append(score_with_interval(self.metric, rows))
        return scores

    def _submit(self, worker: Any, unit: tuple[dict[str, Any], dict[str, Any]]) -> Any:
        facts, block = unit
        return worker.score.remote(
            str(self.path), block["requests"], block["references"], facts, block["language"], self.context.rundir.url
        )


def make_blocks(context: Context, path: Path, size: int) -> list[dict[str, Any]]:
    """The search sentences in blocks of `size`, in order: requests, references and the hash of both."""
    tokenizer = load_tokenizer(path)
    examples = context.splits.search
    requests = context.prompt.requests(tokenizer, [(example.source, example.pair) for example in examples])
    blocks = []
    for start in range(0, len(examples), size):
        asked, part = requests[start : start + size], examples[start : start + size]
        references = [example.target for example in part]
        blocks.append(
            {
                "requests": asked,
                "references": references,
                "hash": block_hash(asked, references),
                "language": split_pair(part[0].pair)[1],
            }
        )
    return blocks


def stack_path(path: Path) -> str:
    """Module path of the layer list, found on a model without weights."""
    import torch

    from raylp.models.load import model_class
    from raylp.models.stack import find_stack

    with torch.device("meta"):
        return find_stack(model_class(path)._from_config(read_config(path))).path


def search(context: Context) -> dict[str, Any]:
    """Runs the search, or takes the given list, and writes plan.json. What the ledger knows is not computed again."""
    recipe = context.recipe.search
    assert recipe is not None
    path = context.baseline
    num_layers = stack_size(path)
    if recipe.given is not None:
        from raylp.models.view import check_removed

        write_plan(context, num_layers, check_removed(recipe.given, num_layers), [], None)
        return {"removed": recipe.given, "evaluations": 0}
    protected = protected_layers(recipe.protect, num_layers)
    count = layers_to_remove(num_layers, protected, recipe.layers, recipe.remove)
    cache = RunDir(context.recipe.cache) if context.recipe.cache else None
    ledger = Ledger(context.rundir, cache)
    evaluations = num_evaluations(num_layers, len(protected), count)
    cluster.start(context.recipe.resources)
    size = num_workers(context.recipe.resources, count_parameters(path)[1])
    pool = Pool(size, context.prompt.newline, context.rundir.logs(), SearchWorker)
    try:
        with context.reporter.task("search") as task:
            scorer = BlockScorer(context, ledger, pool, task)
            task.expect((evaluations + 1) * len(scorer.blocks))
            already = len(ledger.lines)
            baseline = scorer([()])[0]
            task.update(len(scorer.blocks), f"baseline {scorer.metric_name} {baseline.value:.1f}")

            def tell(rounds: list[Round]) -> None:
                last = rounds[-1]
                done = 1 + sum(len(r.candidates) for r in rounds)
                task.update(done * len(scorer.blocks), f"layer {last.removed[0]} goes: {last.score.value:.1f}")
                removed = [layer for r in rounds for layer in r.removed]
                context.reporter.line(
                    f"round {len(rounds)} of {count}: layer {last.removed[0]} goes, "
                    f"{scorer.metric_name} {last.score.value:.2f} without {removed}"
                )

            rounds = greedy(num_layers, protected, count, scorer, tell)
    finally:
        pool.close()
    removed = [layer for r in rounds for layer in r.removed]
    write_plan(context, num_layers, removed, rounds, baseline, scorer.backend, scorer.dtype)
    return {
        "removed": removed,
        "evaluations": evaluations,
        "sentences": len(context.splits.search),
        "baseline": baseline.as_dict(),
        "score": rounds[-1].score.as_dict(),
        "workers": size,
        "lines_known_before": already,
    }


def write_plan(
    context: Context,
    num_layers: int,
    removed: Sequence[int],
    rounds: list[Round],
    baseline: Score | None,
    backend: str | None = None,
    dtype: str | None = None,
) -> None:
    """plan.json: `removed` in order and in the original model's numbers, and the record of every round."""
    context.rundir.write_json(
        "plan.json",
        {
            "schema": SCHEMA,
            "model": context.recipe.model.name,
            "fingerprint": fingerprint(context.baseline),
            "stack": stack_path(context.baseline),
            "num_layers": num_layers,
            "removed": list(removed),
            "baseline": baseline.as_dict() if baseline else None,
            "rounds": [
                {
                    "removed": list(r.removed),
                    "restored": list(r.restored),
                    "score": r.score.as_dict(),
                    "candidates": [
                        {"removed": list(c.removed), "score": c.score.as_dict(), "sentences": c.sentences}
                        for c in r.candidates
                    ],
                }
                for r in rounds
            ],
            "backend": backend,
            "dtype": dtype,
        },
    )


def _host() -> str:
    import socket

    return socket.gethostname()
