"""Which candidates are the best, from as few sentences as the stated risk allows.

All candidates start on the same few sentences. After each look those that cannot win any more are dropped, and the rest
goes on to more sentences. A difference between two candidates is judged on the sentences both have seen (paired), and
what is to be known is the difference on all N sentences of the search, not on some population: having seen m of them,
its standard error is s * sqrt(1/m - 1/N), s being the deviation of single sentences' differences (`influence`).

A candidate is dropped when, at the stated risk, it is not better than the leader by more than a tie on the N sentences;
a tie is a difference whose 84% interval, 1.4 s / sqrt(N) to both sides, holds zero. The risk is shared out evenly over
candidates and looks (Bonferroni), so that all droppings of a round are right with a probability of at least 1 - risk,
as far as sums of sentences are normal. On all N sentences only the order counts. Not covered: a candidate may be a tie
of a leader that is later dropped as a tie of another; of two pairs of unequal size the larger is seen more slowly.
`raylp.search.replay` measures how often a round goes wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from raylp.metrics.ngram import Statistics
from raylp.metrics.objective import influence

# With 1.96, the usual 95% interval, a race costs a tenth less, but takes another layer than the best three times as
# often; and a tie that is taken leads the rounds after it elsewhere.
TIE = 1.4
GROWTH = 1.5


@dataclass(frozen=True)
class Standing:
    """Where a candidate ended: its score on the first `sentences` of them, and the look that dropped it, if any.

    `bound`: the most by which it may, at the stated risk, still beat the leader of that look.
    """

    score: float
    sentences: int
    dropped_at: int | None
    bound: float | None


@dataclass(frozen=True)
class Result:
    """`winners`: the best candidates, best first; `standings`: of every candidate; `blocks`: seen by each."""

    winners: list[int]
    standings: list[Standing]
    blocks: list[int]
    looks: int


def looks(num_blocks: int, turn: int = 1, growth: float = GROWTH) -> list[int]:
    """After how many blocks the candidates are compared: 1, 2, 3, 5, 8, ... turns of `turn` blocks, and all."""
    found, turns = [], 1
    while turns * turn < num_blocks:
        found.append(turns * turn)
        turns = max(turns + 1, int(turns * growth + 0.5))
    return [*found, num_blocks]


def race(
    count: int,
    sizes: Sequence[int],
    measure: Callable[[list[tuple[int, int]]], None],
    rows: Callable[[int, int], Statistics],
    score: Callable[[Statistics], float],
    risk: float = 0.05,
    keep: int = 1,
    turn: int = 1,
    on_look: Callable[[int, list[int], int, float], None] = lambda *_: None,
    at_once: int = 0,
) -> Result:
    """The best `keep` of `count` candidates on blocks of `sizes` sentences; `turn` blocks hold all language pairs.

    `measure` is given the (candidate, block) pairs to score next; `rows` gives what is known of one pair. Of equal
    scores the lower number wins. `on_look` hears the sentences seen, the candidates alive, the leader and its score.
    `at_once`: sentences that take no longer together than fewer of them would; looks that would ask for fewer are left
    out, which makes the stated risk smaller, not larger.
    """
    total = sum(sizes)
    schedule = looks(len(sizes), turn)
    alive = list(range(count))
    seen = [0] * count
    found: list[Statistics | None] = [None] * count
    standings: list[Standing | None] = [None] * count
    comparisons = max(1, keep * (count - keep))
    deviate = NormalDist().inv_cdf(1 - risk / (comparisons * len(schedule)))
    taken = 0
    for look, reached in enumerate(schedule):
        if look + 1 < len(schedule) and len(alive) * sum(sizes[seen[alive[0]] : reached]) < at_once:
            continue
        taken += 1
        measure([(c, block) for block in range(seen[alive[0]], reached) for c in alive])
        for c in alive:
            new = [rows(c, block) for block in range(seen[c], reached)]
            old = found[c]
            found[c] = np.concatenate([*([] if old is None else [old]), *new])
            seen[c] = reached
        sentences = sum(sizes[:reached])
        known = {c: _known(found[c]) for c in alive}
        scores = {c: score(known[c].sum(0)) for c in alive}
        order = sorted(alive, key=lambda c: (-scores[c], c))
        on_look(sentences, order, order[0], scores[order[0]])
        bounds = _bounds(order, known, scores, score, keep, deviate, sentences, total)
        for c in order:
            gone = c in bounds and (reached == len(sizes) or bounds[c][0] < bounds[c][1])
            standings[c] = Standing(
                scores[c], sentences, taken - 1 if gone else None, bounds[c][0] if c in bounds else None
            )
        alive = sorted(c for c in order if standings[c].dropped_at is None)  # type: ignore[union-attr]
        if len(alive) <= keep:
            break
    winners = sorted(alive, key=lambda c: (-scores[c], c))
    return Result(winners, [s for s in standings if s is not None], seen, taken)


def _bounds(
    order: list[int],
    known: dict[int, Statistics],
    scores: dict[int, float],
    score: Callable[[Statistics], float],
    keep: int,
    deviate: float,
    sentences: int,
    total: int,
) -> dict[int, tuple[float, float]]:
    """For every candidate behind the best `keep`: the most it may be ahead of the last of these, and a tie's width."""
    rest = order[keep:]
    if not rest:
        return {}
    leader = order[keep - 1]
    base = influence(score, known[leader])
    spread = {c: _deviation(influence(score, known[c]) - base) for c in rest}
    pooled = float(np.sqrt(np.mean([s * s for s in spread.values()])))
    found = {}
    for c in rest:
        # A candidate that happens to vary little on few sentences is not trusted to; all of a round vary alike.
        deviation = max(spread[c], pooled) if sentences < total else spread[c]
        error = deviation * np.sqrt(1 / sentences - 1 / total) if sentences < total else 0.0
        found[c] = (scores[c] - scores[leader] + deviate * error, TIE * spread[c] / np.sqrt(total))
    return found


def _deviation(values: Statistics) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("inf")


def _known(rows: Statistics | None) -> Statistics:
    assert rows is not None
    return rows
