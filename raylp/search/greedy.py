"""The published loop: leave out each layer, score, drop the one that is missed least, repeat.

Moslem et al., Iterative Layer Pruning for Efficient Translation Inference, WMT 2025, section 3. Pure: how a candidate
is scored, and where, is the caller's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raylp.errors import UserError
from raylp.metrics.intervals import Score

Removed = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """`removed`: all layers left out in order, the tried one last; `sentences`: how many it was scored on."""

    removed: Removed
    score: Score
    sentences: int


@dataclass(frozen=True)
class Round:
    """One decision: `removed` is the layer it took, `score` the model's without it."""

    removed: Removed
    restored: Removed
    score: Score
    candidates: list[Candidate]


def protected_layers(protect: Sequence[int], num_layers: int) -> frozenset[int]:
    """Layers that stay; negative numbers count from the end.

    Raises:
        UserError: a number is not a layer of the model.
    """
    outside = [i for i in protect if not -num_layers <= i < num_layers]
    if outside:
        raise UserError(f"search.protect: {outside} are not there; the model has layers 0 to {num_layers - 1}")
    return frozenset(i % num_layers for i in protect)


def layers_to_remove(num_layers: int, protected: frozenset[int], layers: int | None, remove: int | None) -> int:
    """How many layers go.

    Raises:
        UserError: more than there are, or none.
    """
    count = remove if remove is not None else num_layers - (layers or 0)
    free = num_layers - len(protected)
    if count < 1:
        raise UserError(f"search.layers: {layers} of {num_layers} layers are to stay, so none would go; lower it")
    if count > free:
        raise UserError(
            f"{count} layers are to go, but the model has {num_layers} and {len(protected)} are protected, so at most "
            f"{free} can: lower search.remove (or raise search.layers)"
        )
    return count


def num_evaluations(num_layers: int, num_protected: int, count: int) -> int:
    """Candidates scored in all: 360 for 16 of 32 layers with 2 protected."""
    return sum(num_layers - num_protected - done for done in range(count))


def greedy(
    num_layers: int,
    protected: frozenset[int],
    count: int,
    score: Callable[[list[Removed]], list[Score]],
    on_round: Callable[[list[Round]], None] = lambda _: None,
) -> list[Round]:
    """`count` rounds; of equal scores the lowest layer goes. `score` is given all candidates of a round at once."""
    rounds: list[Round] = []
    gone: Removed = ()
    for _ in range(count):
        tried = [(*gone, layer) for layer in range(num_layers) if layer not in protected and layer not in gone]
        scores = score(tried)
        candidates = [Candidate(removed, value, value.n) for removed, value in zip(tried, scores, strict=True)]
        best = max(candidates, key=lambda candidate: (candidate.score.value, -candidate.removed[-1]))
        gone = best.removed
        rounds.append(Round(gone[-1:], (), best.score, candidates))
        on_round(rounds)
    return rounds
