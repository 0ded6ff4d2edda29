"""Models of different runs side by side, on the sentences that all of them translated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from raylp.data.corpus import parse_jsonl
from raylp.data.languages import split_pair
from raylp.errors import UserError
from raylp.evaluate.scores import score_file
from raylp.metrics import ngram
from raylp.metrics.intervals import Score, paired_difference, score_with_interval
from raylp.metrics.ngram import Scored, Statistics
from raylp.metrics.objective import Mean
from raylp.names import CUT_KINDS, kind_of, whole_of
from raylp.rundir import RunDir


@dataclass(frozen=True)
class Entrant:
    """A model of a run, scored by `raylp evaluate`. `removed`: its layers in the original model's numbers."""

    run: str
    model: str
    layers: int
    removed: tuple[int, ...]
    test_sets: dict[str, list[str]]  # names of the metrics by test set

    @property
    def rundir(self) -> RunDir:
        return RunDir(self.run)


@dataclass(frozen=True)
class Standing:
    """One model's score on a test set, and its difference to the first model's."""

    entrant: Entrant
    score: Score
    difference: Score | None


def find_entrant(name: str) -> Entrant:
    """The model `RUN:MODEL` names, or, from `RUN` alone, the run's one healed model, else its pruned one.

    Raises:
        UserError: there is no such model, it is not evaluated, or there are several to choose from.
    """
    run, model = name, ""
    if not RunDir(run).exists("recipe.yaml") and ":" in name:
        run, _, model = name.rpartition(":")
    rundir = RunDir(run)
    if not rundir.exists("recipe.yaml"):
        raise UserError(f"{name}: not a run directory, nor RUN:MODEL; such as runs/demo or runs/demo:healed-15")
    if not rundir.exists("evaluate.json"):
        raise UserError(f"{run} has no scores yet: raylp evaluate RECIPE")
    scored = {entry["name"]: entry for entry in rundir.read_json("evaluate.json")["models"]}
    if not model:
        kinds = [[name for name in scored if kind_of(name) == kind] for kind in ("healed", "pruned")]
        several = next((names for names in kinds if names), [])
        if len(several) != 1:
            raise UserError(f"{run}: say which model, such as {run}:{(several or list(scored))[0]}")
        model = several[0]
    if model not in scored:
        raise UserError(f"{run} has no scores of {model!r}; it has {', '.join(scored)}")
    entry = scored[model]
    metrics = {test_set: list(scores) for test_set, scores in entry["scores"].items()}
    return Entrant(run, model, entry["layers"], _removed(rundir, model, entry["layers"]), metrics)


def _removed(rundir: RunDir, model: str, layers: int) -> tuple[int, ...]:
    if kind_of(whole_of(model)) not in CUT_KINDS or not rundir.exists("plan.json"):
        return ()
    plan = rundir.read_json("plan.json")
    depths = {depth["layers"]: depth["removed"] for depth in plan.get("depths") or []}
    return tuple(depths.get(layers, plan["removed"]))


def compare(entrants: Sequence[Entrant], resamples: int = 1000) -> dict[tuple[str, str], list[Standing]]:
    """By test set and metric that all have: every model's score, and its paired difference to the first model's.

    Raises:
        UserError: no test set or metric is common to all, or a test set holds other sentences.
    """
    first = entrants[0]
    found: dict[tuple[str, str], list[Standing]] = {}
    for test_set, metrics in first.test_sets.items():
        if not all(test_set in entrant.test_sets for entrant in entrants):
            continue
        texts = [_sentences(entrant, test_set) for entrant in entrants]
        for entrant, own in zip(entrants, texts, strict=True):
            if own != texts[0]:
                raise UserError(
                    f"{entrant.run}: {test_set} holds other sentences there than in {first.run} ({len(own)} and "
                    f"{len(texts[0])}); only the same test text can be compared"
                )
        for name in metrics:
            if all(name in entrant.test_sets[test_set] for entrant in entrants):
                found[test_set, name] = _standings(entrants, test_set, name, texts[0][0][2], resamples)
    if not found:
        raise UserError("no test set with a metric is common to all of these: evaluate them on the same text")
    return found


def _sentences(entrant: Entrant, test_set: str) -> list[tuple[str, str, str]]:
    rows = parse_jsonl(entrant.rundir.read_text(f"translations/{entrant.model}/{test_set}.jsonl"))
    return [(row["source"], row["target"], row["pair"]) for row in rows]


def _standings(entrants: Sequence[Entrant], test_set: str, name: str, pair: str, resamples: int) -> list[Standing]:
    filed = [_filed(entrant, test_set, name) for entrant in entrants]
    signatures = {signature for signature, _ in filed}
    if len(signatures) > 1:
        raise UserError(f"{name} on {test_set} was computed in different ways: {' and '.join(sorted(signatures))}")
    metric = _metric(name, signatures.pop(), pair)
    first = filed[0][1]
    return [
        Standing(
            entrant,
            score_with_interval(metric, rows, resamples),
            paired_difference(metric, rows, first, resamples) if place else None,
        )
        for place, (entrant, (_, rows)) in enumerate(zip(entrants, filed, strict=True))
    ]


def _filed(entrant: Entrant, test_set: str, name: str) -> tuple[str, Statistics]:
    entry: dict[str, Any] = entrant.rundir.read_json(score_file(entrant.model, test_set, name))
    return entry["metric"], np.asarray(entry["statistics"])


def _metric(name: str, signature: str, pair: str) -> Scored:
    """What the statistics were filed by; COMET's are sums of scores, for which no checkpoint is needed."""
    return ngram.metric(name, split_pair(pair)[1]) if name in ngram.NAMES else Mean(name, signature)


def render(found: dict[tuple[str, str], list[Standing]]) -> Group:
    """A table for each test set and metric; `clear`: zero is not in the interval of the difference."""
    from raylp.report import numbers
    from raylp.report.contents import Stat

    tables = []
    for (test_set, name), standings in found.items():
        n = standings[0].score.n
        table = Table(
            title=f"{name} on {test_set}, {n} sentences, 95% intervals",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("model", overflow="fold")
        table.add_column("layers", justify="right")
        table.add_column("removed")
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("difference to the first", justify="right", no_wrap=True)
        table.add_column("clear")
        for standing in standings:
            stat = Stat(**standing.score.as_dict())
            gap = Stat(**standing.difference.as_dict()) if standing.difference else None
            table.add_row(
                f"{standing.entrant.run}:{standing.entrant.model}",
                str(standing.entrant.layers),
                ", ".join(map(str, standing.entrant.removed)) or "-",
                f"{numbers.score(stat, name)} ({numbers.interval(stat, name)})",
                f"{numbers.difference(gap, name)} ({numbers.interval(gap, name, sign=True)})" if gap else "",
                "" if gap is None else "yes" if gap.excludes_zero else "no",
            )
        tables.append(table)
    return Group(*tables)
