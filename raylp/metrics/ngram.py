"""chrF++ and BLEU by sacrebleu, as statistics of single sentences that add up to the corpus score.

sacrebleu scores a corpus from sums of per-sentence counts (n-grams of hypothesis, reference and both, for every order).
Kept by sentence, those counts make scores of any subset, bootstrap intervals and paired comparisons exact and cheap.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Statistics = NDArray[Any]  # (sentences, counts) or (counts,), int64 or float64

NAMES = ("chrF2++", "BLEU")


class Scored(Protocol):
    """A score of sums of additive statistics."""

    @property
    def signature(self) -> str: ...

    def score(self, totals: Statistics) -> float:
        """The corpus score, on its own scale, from the (counts,) sum of rows."""
        ...


class Metric(Scored, Protocol):
    """Statistics of texts, and their score: `name` and `signature` as sacrebleu prints them, or COMET's."""

    @property
    def name(self) -> str: ...

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] = ()
    ) -> Statistics:
        """(sentences, counts), int64 or float64: one row for each hypothesis; what a metric does not need is unread."""
        ...


def mean_of(totals: Statistics) -> float:
    """The mean of a value, from the (2,) sum of rows of (sum, number of units)."""
    return float(totals[0]) / float(totals[1]) if totals[1] else 0.0


class NgramMetric:
    """A sacrebleu metric. `_extract_corpus_statistics` and `_compute_score_from_stats` are what its own corpus_score
    and bootstrap are made of; sacrebleu is pinned, and a test holds them against corpus_score.
    """

    def __init__(self, name: str, metric: Any) -> None:
        self.name = name
        self._metric = metric
        self._metric.corpus_score(["a"], [["a"]])
        self.signature = str(self._metric.get_signature())

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] = ()
    ) -> Statistics:
        rows = self._metric._extract_corpus_statistics(list(hypotheses), [list(references)])
        return np.asarray(rows, dtype=np.int64)

    def score(self, totals: Statistics) -> float:
        return float(self._metric._compute_score_from_stats(totals.astype(np.int64).tolist()).score)


@cache
def metric(name: str, target_language: str = "") -> NgramMetric:
    """The metric called `name`; BLEU splits Chinese, Japanese and Thai targets by character as sacrebleu advises."""
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrF2++":
        return NgramMetric(name, CHRF(word_order=2))
    if name == "BLEU":
        language = target_language.split("_")[0]
        tokenizer = {"zh": "zh", "zho": "zh", "ja": "char", "jpn": "char", "th": "char", "tha": "char"}
        return NgramMetric(name, BLEU(tokenize=tokenizer.get(language, "13a")))
    raise ValueError(f"no metric {name!r}; known: {', '.join(NAMES)}")
