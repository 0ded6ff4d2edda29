"""The published loop, as pure decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylp.errors import UserError
from raylp.metrics.intervals import Score
from raylp.search.greedy import Removed, greedy, layers_to_remove, num_evaluations, protected_layers


def scorer(costs: list[float], calls: list[Removed]):
    def score(candidates: list[Removed]) -> list[Score]:
        calls.extend(candidates)
        return [Score(100 - sum(costs[i] for i in c), 0, 100, 7, "test") for c in candidates]

    return score


@given(st.lists(st.integers(0, 50), min_size=4, max_size=10), st.data())
def test_additive_costs_go_cheapest_first(costs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(costs) - 2))
    protected = protected_layers([0, -1], len(costs))
    calls: list[Removed] = []
    rounds = greedy(len(costs), protected, count, scorer([float(c) for c in costs], calls))
    removed = [layer for r in rounds for layer in r.removed]
    assert removed == sorted(range(1, len(costs) - 1), key=lambda i: (costs[i], i))[:count]
    assert len(calls) == len(set(calls)) == num_evaluations(len(costs), 2, count)
    assert [len(r.candidates) for r in rounds] == [len(costs) - 2 - i for i in range(count)]
    assert all(candidate.removed[:-1] == tuple(removed[:i]) for i, r in enumerate(rounds) for candidate in r.candidates)


def test_published_counts() -> None:
    assert [num_evaluations(32, 2, count) for count in (8, 12, 16)] == [212, 294, 360]


def test_more_layers_than_there_are() -> None:
    assert layers_to_remove(18, frozenset({0, 17}), 15, None) == 3
    with pytest.raises(UserError, match="17 layers are to go, but the model has 18 and 2 are protected, so at most 16"):
        layers_to_remove(18, frozenset({0, 17}), None, 17)
    with pytest.raises(UserError, match="none would go"):
        layers_to_remove(18, frozenset(), 18, None)
    with pytest.raises(UserError, match="layers 0 to 17"):
        protected_layers([0, 18], 18)
