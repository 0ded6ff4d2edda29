"""What a search maximises: one metric or a weighted mix, over one language pair or several.

Every metric keeps additive rows, one a sentence. An objective lays the rows of its metrics and pairs side by side, each
pair in columns of its own, so that one vector of sums holds all it needs: scores of any subset, bootstrap intervals and
paired comparisons work as for a single metric. Its score is the weighted sum, over the metrics, of the mean over pairs.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raylp.data.languages import split_pair
from raylp.errors import UserError
from raylp.metrics.ngram import NAMES, Metric, Statistics, mean_of, metric
from raylp.metrics.registry import check as check_metric
from raylp.metrics.registry import full_name, open_metric, short_name

FORCED = ("likelihood", "agreement")


@dataclass(frozen=True)
class Mean:
    """The mean over units of a sum of values: rows are (sum, number of units)."""

    name: str
    signature: str
    sign: float = 1.0

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] = ()
    ) -> Statistics:
        """Not from texts: rows come from a model's probabilities (`raylp.search.forced`)."""
        raise TypeError(f"{self.name} is not computed from translations")

    def score(self, totals: Statistics) -> float:
        return self.sign * mean_of(totals)


@dataclass(frozen=True)
class UserMetric:
    """A function of the user's: `function(hypotheses, references, sources)` gives a number for each sentence.

    The score is their mean; more is better.
    """

    name: str
    function: Callable[[list[str], list[str], list[str]], Sequence[float]]

    @property
    def signature(self) -> str:
        return f"mean|function:{self.name}|source:{self._digest()}"

    def _digest(self) -> str:
        """Of the module the function is in, so that a changed one is not taken for the old one; 8 hex digits."""
        try:
            source = Path(inspect.getsourcefile(self.function) or "").read_bytes()
        except (OSError, TypeError):
            source = repr(self.function).encode()
        return hashlib.sha256(source).hexdigest()[:8]

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] = ()
    ) -> Statistics:
        """(sentences, 2): the value, and 1.

        Raises:
            UserError: the function failed, or gave something else than one finite number a sentence.
        """
        try:
            values = np.asarray(self.function(list(hypotheses), list(references), list(sources)), dtype=np.float64)
        except Exception as error:
            raise UserError(f"search.objective {self.name} failed: {type(error).__name__}: {error}", 1) from error
        if values.shape != (len(hypotheses),) or not np.isfinite(values).all():
            raise UserError(f"search.objective {self.name}: one finite number for each of the sentences is wanted", 1)
        return np.stack([values, np.ones_like(values)], axis=1)

    def score(self, totals: Statistics) -> float:
        return mean_of(totals)


def usual_name(name: str) -> str:
    """`name` as scores are filed: `chrF++` is sacrebleu's `chrF2++`.

    Raises:
        ValueError: no metric has that name; with the nearest that one has.
    """
    return name if name in FORCED or is_function(name) else full_name(name)


def check(name: str) -> None:
    """Refuses what cannot be computed here; nothing is loaded or fetched.

    Raises:
        UserError: COMET's environment, a checkpoint or the user's function is not there.
    """
    if is_function(name):
        _user_metric(name)
    elif name not in FORCED:
        check_metric(name)


def is_function(name: str) -> bool:
    """Whether `name` is `module:function`."""
    module, _, function = name.partition(":")
    return bool(function) and module.replace(".", "").isidentifier() and function.isidentifier()


def load_metric(name: str, target_language: str = "") -> Metric:
    """The metric of a part.

    Raises:
        UserError: there is none of this name, or its module cannot be imported.
    """
    if name == "likelihood":
        return Mean(name, "mean log-probability a target token")
    if name == "agreement":
        return Mean(name, "minus mean KL(unpruned || pruned) a target token", -1.0)
    if is_function(name):
        return _user_metric(name)
    return open_metric(name, target_language)


def _user_metric(name: str) -> UserMetric:
    import importlib

    module, _, function = name.partition(":")
    try:
        return UserMetric(name, getattr(importlib.import_module(module), function))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"search.objective {name}: {problem}; the module must be importable (PYTHONPATH)") from error


@dataclass(frozen=True)
class Objective:
    """`weights`: by metric name; `pairs`: the language pairs there are. More is better."""

    weights: tuple[tuple[str, float], ...]
    pairs: tuple[str, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float], pairs: Sequence[str]) -> "Objective":
        return cls(tuple(weights.items()), tuple(dict.fromkeys(pairs)))

    @property
    def text_names(self) -> list[str]:
        """The metrics that need translations."""
        return [name for name, _ in self.weights if name not in FORCED]

    @property
    def forced_names(self) -> list[str]:
        """The metrics that need the probabilities of the references only."""
        return [name for name, _ in self.weights if name in FORCED]

    @property
    def name(self) -> str:
        return objective_name(dict(self.weights))

    @cached_property
    def metrics(self) -> dict[tuple[str, str], Metric]:
        """By metric name and pair."""
        found: dict[tuple[str, str], Metric] = {}
        for name, _ in self.weights:
            shared = None if name in NAMES else load_metric(name)  # one process of COMET serves all pairs
            for pair in self.pairs:
                found[name, pair] = shared or load_metric(name, split_pair(pair)[1])
        return found

    def close(self) -> None:
        """Ends what the metrics have started."""
        for chosen in self.metrics.values():
            if hasattr(chosen, "close"):
                chosen.close()

    @cached_property
    def signature(self) -> str:
        single = len(self.weights) == len(self.pairs) == 1
        parts = [
            self.metrics[name, pair].signature
            if single
            else f"{weight:g}*{name}[{pair}:{self.metrics[name, pair].signature}]"
            for name, weight in self.weights
            for pair in self.pairs
        ]
        return " + ".join(parts)

    def metric(self, name: str, pair: str) -> Metric:
        """The metric of one part."""
        return self.metrics[name, pair]

    def filed(self, name: str, pair: str) -> str:
        """What the ledger calls a metric: by its signature where the name alone does not say it all."""
        if name in FORCED or name == "chrF2++" or self.metric(name, pair).signature == metric("BLEU").signature:
            return name
        return self.metric(name, pair).signature

    def is_cheap(self, name: str) -> bool:
        """Whether a metric is computed where the translations are made, in no time; COMET is a process of its own."""
        return name in NAMES or is_function(name)

    def rows(self, parts: Mapping[str, Any], pair: str) -> Statistics:
        """(sentences, columns) for sentences of one `pair`; `parts`: each metric's rows, by its name."""
        columns = []
        for name, _ in self.weights:
            own = np.asarray(parts[name], dtype=np.float64)
            columns += [own if other == pair else np.zeros_like(own) for other in self.pairs]
        return np.concatenate(columns, axis=1)

    def score(self, totals: Statistics) -> float:
        """The objective from the sums of `rows`; a pair of which no sentence is in the sums does not count."""
        if len(self.weights) == len(self.pairs) == 1:
            return self.metrics[self.weights[0][0], self.pairs[0]].score(totals)
        start, whole = 0, 0.0
        for name, weight in self.weights:
            scores = []
            for pair in self.pairs:
                part = totals[start : start + columns_of(name)]
                start += len(part)
                if part.any():
                    scores.append(self.metrics[name, pair].score(part))
            whole += weight * (sum(scores) / len(scores) if scores else 0.0)
        return whole


def objective_name(weights: Mapping[str, float]) -> str:
    """`chrF2++`, or `0.7 chrF2++ + 0.3 BLEU`."""
    names = {name: name if name in FORCED or is_function(name) else short_name(name) for name in weights}
    if len(weights) == 1:
        return next(iter(names.values()))
    return " + ".join(f"{weight:g} {names[name]}" for name, weight in weights.items())


def columns_of(name: str) -> int:
    """Columns of a metric's rows."""
    if name in FORCED or is_function(name):
        return 2
    if name in NAMES:
        return int(metric(name).statistics(["a"], ["a"]).shape[1])
    return 2


def influence(score: Callable[[Any], float], rows: Statistics) -> Statistics:
    """(sentences,): how far each sentence's row moves the score of them all: (n - 1) x (all - all but this), centred.

    Their standard deviation over the square root of n is the jackknife's standard error. Taken at the real sums, as
    some scores do not depend on proportions alone: BLEU smooths a count of zero by how many there might have been.
    """
    n = len(rows)
    if n < 2:
        return np.zeros(n)
    totals = rows.sum(0)
    moved = (n - 1) * (score(totals) - np.array([score(totals - row) for row in rows]))
    return moved - moved.mean()
