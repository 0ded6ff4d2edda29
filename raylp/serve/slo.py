"""Which model answers where there is a latency to keep: the one with the most layers that keeps it under this load.

Pure: it is told what was asked and how long it took. A model's latency is known from its own requests at a like load:
the last few, and all of the last while. One that was too slow is tried again after that while, seldom enough for the
objective to be kept all the same.
"""

import math
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raylp.errors import UserError
from raylp.names import REPAIRED, kind_of, whole_of

AUTO = "auto"  # the name that requests ask for
KEEP_S = 30.0
LEAST = 5
_FORM = re.compile(r"p(\d{1,2}(?:\.\d+)?)=(\d+(?:\.\d+)?)(ms|s)")


@dataclass(frozen=True)
class Objective:
    """So many percent of requests are answered within so many milliseconds."""

    percentile: float
    ms: float

    def __str__(self) -> str:
        return f"p{self.percentile:g}={self.ms:g}ms"


def read_objective(text: str) -> Objective:
    """`p90=300ms` or `p99=1.5s`.

    Raises:
        UserError: it is not of that form.
    """
    found = _FORM.fullmatch(text.strip())
    if not found or float(found[1]) == 0 or float(found[2]) == 0:
        raise UserError(f"slo {text!r}: write a percentile and a time, such as p90=300ms or p99=1.5s")
    return Objective(float(found[1]), float(found[2]) * (1000 if found[3] == "s" else 1))


class Chooser:
    """`models`: from the most layers to the fewest. `clock`: in seconds. `is_failure`: whether an error is
    the model's, and not the request's.

    A load is a number of requests at work; loads within a factor of two are alike. What is not known of a model at a
    load follows from what is: with fewer at work it is no slower. What then is still unknown is tried by a few requests
    at a time, while the others go to the next model. A request that is still at work later than the objective allows
    counts like one that took too long, so that a model that has stopped is left at once.
    """

    def __init__(
        self,
        models: Sequence[str],
        objective: Objective,
        clock: Callable[[], float] = time.monotonic,
        keep_s: float = KEEP_S,
        least: int = LEAST,
        is_failure: Callable[[Exception], bool] = lambda _: True,
    ) -> None:
        self.models = list(models)
        self.objective = objective
        self.clock = clock
        self.keep_s = keep_s
        self.least = least
        self.is_failure = is_failure
        self._seen: dict[str, dict[int, deque[tuple[float, float]]]] = {model: {} for model in models}
        self._under_way: defaultdict[tuple[str, int], list[float]] = defaultdict(list)  # when each was begun
        # Of as many requests one may be a try: half of those that the objective lets be late.
        self._spare = math.ceil(2 / (1 - objective.percentile / 100))
        self._asked = 0
        self._tried: dict[str, int] = {}  # how many had been asked when one was tried again

    def choose(self, load: int) -> str:
        """The first of the models that keeps the objective at this load, or may and is not tried enough already.

        The last where there is none.
        """
        self._asked += 1
        for model in self.models:
            keeps = self.keeps(model, load)
            if keeps or (keeps is None and len(self._under_way[model, _like(load)]) < self.least):
                return model
            if keeps is False and self._may_be_tried(model, load):
                self._tried[model] = self._asked
                return model
        return self.models[-1]

    @contextmanager
    def timing(self, model: str, load: int) -> Iterator[None]:
        """A request to `model`, let in when `load` were at work, lasts as long as the block.

        One that is given up tells nothing, unless it had taken too long by then. One that failed counts as too long.
        """
        started = self.clock()
        under_way = self._under_way[model, _like(load)]
        under_way.append(started)
        given_up, failed = True, False
        try:
            yield
            given_up = False
        except Exception as error:
            failed = self.is_failure(error)
            raise
        finally:
            under_way.remove(started)
            ms = math.inf if failed else (self.clock() - started) * 1000
            if not given_up or ms > self.objective.ms:
                self.done(model, load, ms)

    def done(self, model: str, load: int, ms: float) -> None:
        """A request to `model`, let in when `load` were at work, took `ms`."""
        if model in self._seen:
            self._seen[model].setdefault(_like(load), deque(maxlen=200)).append((self.clock(), ms))

    def keeps(self, model: str, load: int) -> bool | None:
        """Whether the model keeps the objective at this load, as far as is known now."""
        here = _like(load)
        known = {like: self._percentile(model, like) for like in {*self._seen[model], here}}
        levels = {like: ms <= self.objective.ms for like, ms in known.items() if ms is not None}
        if here in levels:
            return levels[here]
        if any(not kept for like, kept in levels.items() if like < here):
            return False
        return True if any(kept for like, kept in levels.items() if like > here) else None

    def _may_be_tried(self, model: str, load: int) -> bool:
        """Whether a model that was too slow gets another request: one at a time, for as long as they are quick enough.

        After one that was not, only when a while has passed, and as many requests as make up for it.
        """
        if any(at_work for (name, _), at_work in self._under_way.items() if name == model):
            return False
        here, seen = _like(load), self._seen[model]
        # With fewer at work it may well be quick, which says nothing of here.
        newest = seen[here][-1] if here in seen else max(own[-1] for like, own in seen.items() if like < here)
        if newest[1] <= self.objective.ms:
            return True
        rested = self.clock() - newest[0] > self.keep_s
        return rested and self._asked - self._tried.get(model, -self._spare) >= self._spare

    def _percentile(self, model: str, like: int) -> float | None:
        """Of the latencies at a load that are not too old, or of the last few; None where they are too few."""
        seen, now = self._seen[model].get(like, deque()), self.clock()
        while len(seen) > self.least and seen[0][0] < now - self.keep_s:
            seen.popleft()
        late = sum((now - began) * 1000 > self.objective.ms for began in self._under_way[model, like])
        if len(seen) + late < self.least:
            return None
        ordered = [*sorted(ms for _, ms in seen), *[math.inf] * late]
        return ordered[math.ceil(self.objective.percentile / 100 * len(ordered)) - 1]


def _like(load: int) -> int:
    """Loads of 1, 2 to 3, 4 to 7 and so on are alike."""
    return max(1, load).bit_length()


def one_for_each_depth(layers: Mapping[str, int]) -> list[str]:
    """The one to choose at each depth, the most layers first: a healed one before one as it was cut, and either before
    what it was quantised to.
    """
    best = ("healed", "baseline-healed", "baseline", *REPAIRED.values(), "pruned", "original")

    def place(name: str) -> tuple[int, int, bool]:
        kind = kind_of(whole_of(name))
        return -layers[name], best.index(kind) if kind in best else len(best), whole_of(name) != name

    chosen: dict[int, str] = {}
    for name in sorted(layers, key=place):
        chosen.setdefault(layers[name], name)
    return list(chosen.values())
