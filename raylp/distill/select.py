"""Of several translations of a source, the best."""

from collections.abc import Callable, Sequence

from raylp.distill.filters import Row, chrf

# One score for each candidate; more is better.
Rate = Callable[[Sequence[Row], Sequence[float | None]], Sequence[float]]


def by_chrf(rows: Sequence[Row], _: Sequence[float | None]) -> list[float]:
    """chrF2++ of the sentence against the reference."""
    return [chrf(row.translation, row.reference) if row.reference else 0.0 for row in rows]


def by_likelihood(rows: Sequence[Row], likelihoods: Sequence[float | None]) -> list[float]:
    """The teacher's own mean log-probability of a token."""
    return [float("-inf") if value is None else value for value in likelihoods]


def best(rows: Sequence[Row], scores: Sequence[float]) -> int:
    """The place of the best translation: one that ended by itself before all others, of equals the first."""
    return max(range(len(rows)), key=lambda i: (rows[i].finish == "stop", scores[i], -i))
