"""Scores of what the models of a run translated, filed sentence by sentence, so that none is computed twice."""

import hashlib
import json
from typing import Any

import numpy as np

from raylp.context import Context
from raylp.data.corpus import parse_jsonl
from raylp.data.languages import split_pair
from raylp.metrics.ngram import Metric, Statistics
from raylp.metrics.registry import is_comet, open_metric, short_name
from raylp.progress import heartbeat

# By (model, test set, short name of the metric), and by (test set, short name of the metric).
Found = dict[tuple[str, str, str], Statistics]
Metrics = dict[tuple[str, str], Metric]


def score_translations(context: Context, models: list[str], metrics: list[str]) -> tuple[Found, Metrics]:
    """Per-sentence statistics of every model's translations of every test set, and the metrics they belong to.

    Filed (`score_file`) with the metric's signature and a hash of what was scored. COMET
    checkpoints are loaded one at a time, and only where something is missing.
    """
    found: Found = {}
    used: Metrics = {}
    places = [(model, test_set) for model in models for test_set in context.splits.test]
    total = len(metrics) * sum(len(context.splits.test[test_set]) for _, test_set in places)
    with context.reporter.task("score", total) as task, heartbeat(task):
        for name in metrics:
            key = short_name(name)
            opened = _open(context, name, task.advance)
            try:
                for model, test_set in places:
                    metric = used[test_set, key] = opened[test_set]
                    task.update(task.done, f"{model} on {test_set}: {key}")
                    rows = read_translations(context, model, test_set)
                    before = task.done
                    found[model, test_set, key] = _filed(context, model, test_set, metric, rows)
                    task.update(before + len(rows))
            finally:
                for metric in opened.values():
                    if hasattr(metric, "close"):
                        metric.close()
    return found, used


def read_translations(context: Context, model: str, test_set: str) -> list[dict[str, Any]]:
    """The rows of translations/<model>/<test set>.jsonl."""
    return parse_jsonl(context.rundir.read_text(f"translations/{model}/{test_set}.jsonl"))


def score_file(model: str, test_set: str, metric: str) -> str:
    """Where the statistics of a model's translations of a test set are filed in a run directory."""
    return f"scores/{model}/{test_set}/{metric}.json"


def _open(context: Context, name: str, advance: Any) -> dict[str, Metric]:
    """The metric for each test set: one COMET process for all, an n-gram metric by target language."""
    tests = context.splits.test
    if is_comet(name):
        log = context.rundir.logs() / f"comet-{short_name(name)}.log"
        shared = open_metric(name, log=log, advance=advance)
        return dict.fromkeys(tests, shared)
    return {test_set: open_metric(name, split_pair(pairs[0].pair)[1]) for test_set, pairs in tests.items()}


def _filed(context: Context, model: str, test_set: str, metric: Metric, rows: list[dict[str, Any]]) -> Statistics:
    """The statistics of `rows`, from their file when it is of the same metric and texts, else computed and filed."""
    sources, hypotheses, references = ([row[key] for row in rows] for key in ("source", "hypothesis", "target"))
    facts = {"metric": metric.signature, "texts": _hash([sources, hypotheses, references])}
    place = score_file(model, test_set, metric.name)
    if context.rundir.exists(place):
        entry = context.rundir.read_json(place)
        if {key: entry[key] for key in facts} == facts:
            return np.asarray(entry["statistics"])
    statistics = metric.statistics(hypotheses, references, sources)
    context.rundir.write_text(place, json.dumps({**facts, "statistics": statistics.tolist()}) + "\n")
    return statistics


def _hash(texts: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:16]
