"""95% intervals by the percentile bootstrap over sentences (Koehn 2004), for scores and for paired differences."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from raylp.metrics.ngram import Scored, Statistics

SEED = 12345


@dataclass(frozen=True)
class Score:
    """A value with its 95% interval, the number of sentences behind it, and the metric's signature."""

    value: float
    low: float
    high: float
    n: int
    signature: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_with_interval(metric: Scored, statistics: Statistics, resamples: int = 1000) -> Score:
    """The corpus score of `statistics` (sentences, counts) and its interval."""
    n = len(statistics)
    value = metric.score(statistics.sum(0))
    scores = [metric.score(totals) for totals in _resampled(statistics, resamples)]
    low, high = np.percentile(scores, [2.5, 97.5])
    return Score(value, float(low), float(high), n, f"{metric.signature}|bs:{resamples}|seed:{SEED}")


def paired_difference(metric: Scored, a: Statistics, b: Statistics, resamples: int = 1000) -> Score:
    """Score of `a` minus score of `b` on the same sentences, resampled together."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} sentences cannot be paired")
    both = zip(_resampled(a, resamples), _resampled(b, resamples), strict=True)
    differences = [metric.score(first) - metric.score(second) for first, second in both]
    low, high = np.percentile(differences, [2.5, 97.5])
    value = metric.score(a.sum(0)) - metric.score(b.sum(0))
    return Score(value, float(low), float(high), len(a), f"{metric.signature}|paired-bs:{resamples}|seed:{SEED}")


def _resampled(statistics: Statistics, resamples: int) -> Statistics:
    """(resamples, counts): sums over the sentences drawn. Counts stay exact: float64 holds whole numbers to 2^53."""
    return _draws(len(statistics), resamples) @ statistics.astype(np.float64)


@lru_cache(maxsize=2)
def _draws(n: int, resamples: int) -> Statistics:
    """(resamples, n): how often each sentence is drawn; the same draws for every metric and model of n sentences."""
    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
