"""What a search decides, round by round, and the record that defends it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylp.errors import UserError
from raylp.metrics.intervals import Score

Removed = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """`removed`: all layers left out in order, the tried one last; `sentences`: how many it was scored on.

    `dropped_at`: the look that dropped it (race); `bound`: the most by which it may still have beaten the leader there;
    `score` is None where another measure decided and this one was not taken (`importance`, lower goes first).
    """

    removed: Removed
    score: Score | None
    sentences: int
    dropped_at: int | None = None
    bound: float | None = None
    importance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "removed": list(self.removed),
            "score": self.score.as_dict() if self.score else None,
            "sentences": self.sentences,
        }
        optional = {"dropped_at": self.dropped_at, "bound": self.bound, "importance": self.importance}
        return found | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class Round:
    """One decision: `removed` the layers it took, `restored` those it put back, `gone` all that are out after it.

    `score` is the objective's after it, None where it was not measured; `facts`: strategy, stated risk, what decided,
    units, sentences and seconds spent.
    """

    removed: Removed
    restored: Removed
    gone: Removed
    score: Score | None
    candidates: list[Candidate]
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "removed": list(self.removed),
            "restored": list(self.restored),
            "score": self.score.as_dict() if self.score else None,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            **self.facts,
        }


def protected_layers(protect: Sequence[int], num_layers: int) -> frozenset[int]:
    """Layers that stay; negative numbers count from the end.

    Raises:
        UserError: a number is not a layer of the model.
    """
    outside = [i for i in protect if not -num_layers <= i < num_layers]
    if outside:
        raise UserError(f"search.protect: {outside} are not there; the model has layers 0 to {num_layers - 1}")
    return frozenset(i % num_layers for i in protect)


def lowest_first(values: Mapping[int, float]) -> list[int]:
    """Layers by a criterion of their importance, in the order in which they go; of equals the lowest first."""
    return sorted(values, key=lambda layer: (values[layer], layer))


def num_evaluations(num_layers: int, num_protected: int, count: int) -> int:
    """Candidates that scoring everything scores: 360 for 16 of 32 layers with 2 protected."""
    return sum(num_layers - num_protected - done for done in range(count))
