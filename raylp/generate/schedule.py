"""How units of work fill workers: what a pool of any size would make of recorded times. Pure arithmetic."""

import heapq
from collections.abc import Sequence
from statistics import median

COPY_FACTOR = 3.0  # a unit is a straggler when it takes this many times what it should
COPY_AFTER_S = 20.0  # and never before so many seconds: a copy costs more than a short wait
COPY_SHARE = 20  # at most one unit in so many is computed twice, and one in any case


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Seconds until the last of `workers` is done, when each takes the longest unit left as it becomes free."""
    if workers < 1:
        raise ValueError(f"{workers} workers")
    free = [0.0] * min(workers, max(1, len(seconds)))
    for unit in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + unit)
    return max(free)


def efficiency(unit_seconds: Sequence[float], rounds: Sequence[int], workers: int) -> float:
    """Share of `workers`' time that is work, when no unit of a round starts before the round before it is decided.

    `unit_seconds`: of every unit, round after round; `rounds`: how many units each round has.
    """
    if sum(rounds) != len(unit_seconds):
        raise ValueError(f"rounds of {sum(rounds)} units together, but {len(unit_seconds)} times")
    spans, start = 0.0, 0
    for count in rounds:
        spans += makespan(unit_seconds[start : start + count], workers)
        start += count
    return sum(unit_seconds) / (workers * spans) if spans else 1.0


def even(count: int, most: int, workers: int) -> int:
    """How many of `count` things each piece gets, at most `most`, so that all workers get as many pieces.

    500 things, at most 128 in a piece, 3 workers: two pieces for each, of 84.
    """
    turns = -(-count // (most * workers))
    return max(1, -(-count // (turns * workers))) if count else 1


class Pace:
    """What units should take, learnt from those that are done: seconds for each unit of cost, by the median."""

    def __init__(self) -> None:
        self._rates: list[float] = []

    def done(self, cost: float, seconds: float) -> None:
        """A unit of this cost took so many seconds."""
        if cost > 0:
            self._rates.append(seconds / cost)

    def late(self, cost: float, seconds: float) -> bool:
        """Whether a unit of this cost, in work for so many seconds, is a straggler. Never before three are done."""
        if len(self._rates) < 3:
            return False
        return seconds > max(COPY_AFTER_S, COPY_FACTOR * cost * median(self._rates))


def most_copies(units: int) -> int:
    """How many of so many units may be given out twice."""
    return 1 + units // COPY_SHARE
