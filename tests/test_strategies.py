"""How a search decides, on rows made up for the purpose: no model, no Ray."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylp.errors import UserError
from raylp.generate.base import Request
from raylp.ledger import Ledger, score_key
from raylp.metrics.intervals import paired_difference
from raylp.metrics.objective import Objective, influence
from raylp.models.checkpoint import Costs
from raylp.rundir import RunDir
from raylp.search.blocks import Block
from raylp.search.evaluator import LedgerEvaluator
from raylp.search.plan import Removed, num_evaluations, protected_layers
from raylp.search.race import looks, race
from raylp.search.strategies import Options, Search
from raylp.search.targets import Target
from raylp.search.worker import Translate

MEAN = Objective.of({"likelihood": 1.0}, ["xx-yy"])


class Table:
    """Scores by a formula: `value(removed, sentence)`; what is measured is kept, to be counted."""

    def __init__(self, value, sentences: int = 32, block: int = 8, noise: float | None = None, losses=None) -> None:
        self.objective = MEAN
        self.sizes = [block] * (sentences // block)
        self.block = block
        self.value, self._noise, self.losses = value, noise, losses or {}
        self.units: set[tuple[frozenset[int], int]] = set()
        self.at_once = 0

    def measure(self, units: list[tuple[Removed, int]]) -> None:
        self.units |= {(frozenset(removed), block) for removed, block in units}

    def rows(self, removed: Removed, block: int):
        assert (frozenset(removed), block) in self.units
        numbers = range(block * self.block, (block + 1) * self.block)
        return np.array([[self.value(frozenset(removed), i), 1.0] for i in numbers])

    def likelihood(self, base: Removed, layers: Sequence[int]) -> dict[int, float]:
        return {layer: self.losses[layer] for layer in layers}

    def importance(self, criterion: str, base: Removed, layers: Sequence[int]) -> dict[int, float]:
        return {layer: self.losses[layer] for layer in layers}

    def healed(self, candidates: Sequence[Removed]) -> dict[Removed, np.ndarray]:
        """Here a heal changes nothing."""
        blocks = range(len(self.sizes))
        self.measure([(removed, block) for removed in candidates for block in blocks])
        return {removed: np.concatenate([self.rows(removed, block) for block in blocks]) for removed in candidates}

    def noise(self) -> float | None:
        return self._noise

    def spent(self) -> dict[str, float]:
        return {"units": len(self.units)}


def additive(costs: Sequence[float], spread: float = 0.0, seed: int = 0):
    """Every layer costs what it costs; sentences differ, and each layer is missed more by some than by others."""
    random = np.random.default_rng(seed)
    common = random.normal(0, 1, 1000)
    own = random.normal(0, spread, (len(costs), 1000)) if spread else np.zeros((len(costs), 1000))
    return lambda removed, i: 100 + common[i] - sum(costs[layer] + own[layer, i] for layer in removed)


def run(table: Table, num_layers: int, remove: int, **options: object) -> Search:
    target = Target(num_layers, protected_layers([0, -1], num_layers), (num_layers - remove,))
    search = Search(table, target, Options(**{"strategy": "exhaustive", **options}))  # type: ignore[arg-type]
    search.run()
    return search


@given(st.lists(st.integers(0, 50), min_size=4, max_size=10), st.data())
@settings(max_examples=30)
def test_exhaustive_takes_the_cheapest_first(costs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(costs) - 2))
    table = Table(additive(costs))
    rounds = run(table, len(costs), count).rounds
    removed = [layer for r in rounds for layer in r.removed]
    assert removed == sorted(range(1, len(costs) - 1), key=lambda i: (costs[i], i))[:count]
    assert len(table.units) == len(table.sizes) * num_evaluations(len(costs), 2, count)
    assert [len(r.candidates) for r in rounds] == [len(costs) - 2 - i for i in range(count)]
    assert all(c.removed[:-1] == tuple(removed[:i]) for i, r in enumerate(rounds) for c in r.candidates)


def test_published_counts() -> None:
    assert [num_evaluations(32, 2, count) for count in (8, 12, 16)] == [212, 294, 360]


def test_race_takes_what_exhaustive_takes_for_less() -> None:
    costs = [0.0, 3.0, 12.0, 9.0, 7.0, 14.0, 5.0, 8.0, 11.0, 0.0]
    plain, raced = Table(additive(costs, 4), 128), Table(additive(costs, 4), 128)
    expected = [r.removed for r in run(plain, 10, 3).rounds]
    found = run(raced, 10, 3, strategy="race")
    assert [r.removed for r in found.rounds] == expected
    assert len(raced.units) < len(plain.units) / 2
    assert found.rounds[-1].score is not None and found.rounds[-1].score.n == 128  # the last one is scored in full
    assert any(c.dropped_at is not None for c in found.rounds[0].candidates)


def test_race_keeps_its_risk() -> None:
    """Candidates close to each other and noisy: it is hardly ever wrong by more than a tie."""
    wrong, spent = 0, 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        means = random.normal(0, 1.5, 12)
        values = means[:, None] + random.normal(0, 10, (12, 128)) + random.normal(0, 10, 128)
        rows = [np.stack([own, np.ones(128)], axis=1) for own in values]
        result = race(12, [16] * 8, lambda _: None, lambda c, b: rows[c][16 * b : 16 * b + 16], MEAN.score)  # noqa: B023
        best = int(values.mean(1).argmax())
        wrong += paired_difference(MEAN, rows[result.winners[0]], rows[best]).high < 0
        spent += sum(standing.sentences for standing in result.standings)
    assert wrong <= 200 * 0.05 and spent < 0.75 * 200 * 12 * 128


def test_race_fills_what_can_be_done_at_once() -> None:
    """Many workers would wait for each other at every look at a few sentences of a few candidates."""
    random = np.random.default_rng(3)
    values = random.normal(0, 1, 8)[:, None] + random.normal(0, 10, (8, 128))
    rows = [np.stack([own, np.ones(128)], axis=1) for own in values]
    found = {}
    for at_once in (0, 8 * 48, 8 * 128):
        calls: list[int] = []
        found[at_once] = race(
            8,
            [16] * 8,
            lambda units, calls=calls: calls.append(len(units)),  # type: ignore[misc]
            lambda c, b: rows[c][16 * b : 16 * b + 16],
            MEAN.score,
            at_once=at_once,
        )
        assert len(calls) == found[at_once].looks
        assert all(16 * count >= at_once for count in calls[:-1])
    assert found[0].looks > found[8 * 48].looks > found[8 * 128].looks == 1
    assert found[8 * 128].winners == [int(values.mean(1).argmax())]


def test_race_on_all_sentences_takes_the_best() -> None:
    """At next to no risk everything is measured, and then the order alone counts; of equal ones the first."""
    random = np.random.default_rng(1)
    values = random.normal(0, 10, (6, 64))
    values[4] = values[values.mean(1).argmax()]
    rows = [np.stack([own, np.ones(64)], axis=1) for own in values]
    result = race(6, [16] * 4, lambda _: None, lambda c, b: rows[c][16 * b : 16 * b + 16], MEAN.score, 1e-12, keep=2)
    order = sorted(range(6), key=lambda c: (-values[c].mean(), c))
    assert result.winners == order[:2]


def test_looks() -> None:
    assert looks(8) == [1, 2, 3, 5, 8] and looks(1) == [1] and looks(9, turn=2) == [2, 4, 6, 9]


def test_influence_is_the_jackknife() -> None:
    """Of a ratio of means, against its textbook formula."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, 400).astype(float)
    sums = counts * random.normal(-2, 0.5, 400)
    ratio = sums.sum() / counts.sum()
    expected = (sums - ratio * counts) / counts.mean()
    found = influence(MEAN.score, np.stack([sums, counts], axis=1))
    assert np.allclose(found, expected, atol=1e-2) and abs(found.mean()) < 1e-9
    assert found.std() == pytest.approx(expected.std(), rel=2e-3)


def test_a_score_that_is_smoothed_is_taken_at_its_real_sums() -> None:
    """BLEU without a single 4-gram in common depends on how many there might have been, not on shares alone."""
    bleu = Objective.of({"BLEU": 1.0}, ["xx-yy"])
    random = np.random.default_rng(0)
    words = ["ka", "lo", "mi", "nu", "pe", "ra"]
    texts = [[" ".join(random.choice(words, 7)) for _ in range(24)] for _ in range(2)]
    rows = bleu.metric("BLEU", "xx-yy").statistics(*texts)
    rows[:, 5] = 0  # matching 4-grams
    draws = random.multinomial(24, np.full(24, 1 / 24), size=2000) @ rows
    spread = np.std([bleu.score(totals) for totals in draws])
    error = influence(bleu.score, rows).std(ddof=1) / np.sqrt(24)
    assert spread > 0.2
    assert error == pytest.approx(spread, rel=0.25)


def test_sleb_goes_by_the_likelihood() -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}
    search = run(Table(additive([0] * 6), losses=losses), 6, 2, strategy="sleb")
    assert [r.removed for r in search.rounds] == [(2,), (3,)]
    assert search.rounds[0].candidates[0].importance == 3.0


def test_oneshot_takes_the_lowest_in_order() -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}
    table = Table(additive([0] * 6), losses=losses)
    search = run(table, 6, 3, strategy="oneshot", criterion="magnitude")
    assert [r.removed for r in search.rounds] == [(2,), (3,), (1,)]
    assert {removed for removed, _ in table.units} == {frozenset({1, 2, 3})}  # only the result is scored


def test_floor_is_told_and_the_likelihood_takes_over() -> None:
    costs, losses = [0, 97, 98, 96, 99, 0], {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}
    kept = run(Table(additive(costs), noise=20.0, losses=losses), 6, 1).rounds[0]
    assert kept.removed == (3,) and kept.facts["floor"]["decided_by"] == "the objective all the same"
    other = run(Table(additive(costs), noise=20.0, losses=losses), 6, 1, floor="likelihood").rounds[0]
    assert other.removed == (2,) and other.facts["floor"]["decided_by"] == "likelihood"
    assert other.candidates[1].score is not None and other.candidates[1].importance == 1.0
    for floor in ("heal", "likelihood"):
        healing = Table(additive(costs), noise=20.0, losses=losses)
        healed = run(healing, 6, 1, floor=floor, heal_best=2).rounds[0]
        assert healed.facts["floor"]["decided_by"] == "a short heal of the likeliest"
        assert [tuple(one["removed"]) for one in healed.facts["healed"]] == [(3,), (2,)], "the two likeliest"
    assert run(Table(additive(costs), noise=20.0), 6, 1, heal_best=2).rounds[0].removed == (3,)
    high = run(Table(additive(costs), noise=1.0, losses=losses), 6, 1, floor="likelihood").rounds[0]
    assert high.removed == (3,) and "floor" not in high.facts


def test_no_move_is_made_on_noise() -> None:
    costs = [0, 90, 91, 92, 93, 0]
    losses = {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}
    table = Table(additive(costs), noise=20.0, losses=losses)
    search = run(table, 6, 1, floor="likelihood", swaps=2)
    assert search.rounds[-1].gone == (4,), "layer 1 costs less, but both are noise"
    assert run(Table(additive(costs), losses=losses), 6, 1, strategy="sleb", swaps=2).rounds[-1].gone == (1,)


def joint(removed: frozenset[int], i: int) -> float:
    """1 and 2 are each harmless, but not both; 3 and 4 cost a little."""
    return 100 - 40 * ({1, 2} <= removed) - 3 * (3 in removed) - 4 * (4 in removed) - 1 * bool(removed & {1, 2})


def test_several_a_round_are_checked_together() -> None:
    search = run(Table(joint), 6, 3, per_round=2)
    assert search.rounds[0].removed == (1,)  # 1 and 2 together cost more than one by one
    assert search.rounds[0].facts["joint"][0]["removed"] == [1, 2]
    assert sorted(search.rounds[-1].gone) == [1, 3, 4]


OWN = {1: 1, 2: 2, 3: 3, 4: 30}


def test_a_beam_finds_what_greedy_misses() -> None:
    """1 is the best first, but 2 and 3 are the best pair."""

    def value(removed: frozenset[int], i: int) -> float:
        if removed == {2, 3}:
            return 99
        return 100 - sum(OWN[layer] for layer in removed) - 10 * (1 in removed and len(removed) > 1)

    assert run(Table(value), 6, 2).rounds[-1].gone == (1, 2)
    search = run(Table(value), 6, 2, beam=3)
    assert sorted(search.rounds[-1].gone) == [2, 3]
    assert search.rounds[0].removed == (1,)
    assert search.rounds[-1].restored == (1,) and sorted(search.rounds[-1].removed) == [2, 3]


def test_swaps_mend_a_greedy_mistake() -> None:
    def value(removed: frozenset[int], i: int) -> float:
        return 99 if removed == {2, 3} else 100 - sum(OWN[layer] for layer in removed) * len(removed)

    search = run(Table(value), 6, 2, swaps=5)
    assert sorted(search.rounds[-1].gone) == [2, 3]
    swap = next(r for r in search.rounds if r.facts.get("move") == "swap")
    assert swap.restored == (1,) and swap.removed == (3,)
    assert search.rounds[-1].removed == ()  # the last one found nothing better


def test_the_allowed_loss_ends_a_search() -> None:
    costs = [0, 1, 2, 30, 40, 0]
    target = Target(6, protected_layers([0, -1], 6), max_loss=5.0)
    search = Search(Table(additive(costs)), target, Options("exhaustive"))
    assert [r.removed for r in search.run()] == [(1,), (2,)]
    assert search.stopped is not None and "33.00" in search.stopped


def test_targets_in_parameters_bytes_and_latency() -> None:
    costs = Costs((10, 20, 30, 20), 100, (20, 40, 60, 40), 200, (10, 20, 30, 20), 20)
    free = frozenset({0, 3})

    def target(**limits: float) -> Target:
        return Target(4, free, costs=costs, **limits)  # type: ignore[arg-type]

    assert not target(parameters=150).reached([1]) and target(parameters=150).reached([1, 2])
    assert target(bytes=300).reached([2]) and target(latency=0.7).reached([2])
    assert target(latency=0.7).size("latency", [2]) == pytest.approx(0.7)
    target(parameters=130).check()
    with pytest.raises(UserError, match=r"search.parameters: 100 cannot be met, without any layer .* still 130"):
        target(parameters=100).check()
    with pytest.raises(UserError, match=r"search.bytes: 400 is no less than the whole model's 360"):
        target(bytes=400).check()
    whole = Target(4, frozenset(), costs=costs, parameters=105)
    with pytest.raises(UserError, match="still 110"):  # one layer must stay, the smallest
        whole.check()


def test_more_layers_than_there_are() -> None:
    def target(depth: int) -> Target:
        return Target(18, frozenset({0, 17}), (depth,))

    target(15).check()
    with pytest.raises(UserError, match="17 layers are to go, but the model has 18 and 2 are protected, so at most 16"):
        target(1).check()
    with pytest.raises(UserError, match="none would go"):
        target(18).check()
    with pytest.raises(UserError, match="layers 0 to 17"):
        protected_layers([0, 18], 18)


def test_several_a_round_stop_at_every_depth_that_is_wanted() -> None:
    target = Target(9, frozenset({0, 8}), (7, 6, 3))
    search = Search(Table(additive([0] * 9)), target, Options("exhaustive", per_round=3))
    assert [len(r.gone) for r in search.run()] == [2, 3, 6]


def test_a_beam_s_order_is_that_of_all_sentences() -> None:
    """Survivors of a race are known to be the best, not which of them is."""
    table = Table(additive([0.0, 2.0, 1.0, 30.0, 31.0, 0.0], 3), 64)
    search = run(table, 6, 1, strategy="race", beam=2)
    scores = [search.full_score((layer,)).value for layer in (1, 2)]
    assert search.rounds[0].removed == ((1,) if scores[0] > scores[1] else (2,))
    assert search.rounds[0].score is not None and search.rounds[0].score.n == 64


def test_a_search_without_a_depth_leaves_a_layer() -> None:
    target = Target(4, frozenset(), max_loss=1e9)
    assert len(Search(Table(additive([0] * 4)), target, Options("exhaustive")).run()) == 3


def test_one_sentence_is_enough_for_a_decision() -> None:
    search = run(Table(additive([0, 1, 2, 0]), 1, 1), 4, 1, strategy="race")
    assert search.rounds[0].removed == (1,)
    assert all(c.bound is None or c.bound == c.bound for c in search.rounds[0].candidates)


def test_what_a_candidate_said_tells_what_its_other_blocks_take(tmp_path):
    """Layer 2's candidate rambles to its bound, layer 1's says a quarter: both are expected to go on so."""
    share = {1: 0.25, 2: 1.0}
    size, bound = 4, 10
    request = Request((0,), bound)
    blocks = [Block("xx-yy", ("",) * size, ("a b",) * size, (request,) * size, (), f"block {n}") for n in range(3)]
    expected: list[dict[tuple[tuple[int, ...], str], float]] = []

    def compute(works):
        for done, work in enumerate(works, start=1):
            ((name, facts),) = work.facts.items()
            rows = Objective.of({name: 1.0}, ["xx-yy"]).metric(name, "xx-yy").statistics(["a b"] * size, ["a b"] * size)
            tokens = int(share[work.removed[-1]] * size * bound)
            yield work, [{"key": score_key(facts), **facts, "statistics": rows.tolist(), "tokens": tokens, "texts": []}]
            expected.append({(left.removed, left.block.hash): evaluator.expected(left) for left in works[done:]})

    ledger = Ledger(RunDir(str(tmp_path)))
    objective = Objective.of({"chrF2++": 1.0}, ["xx-yy"])
    evaluator = LedgerEvaluator(tmp_path, "model", blocks, objective, ledger, compute, "transformers", "float32")
    evaluator.measure([((layer,), block) for block in range(3) for layer in (1, 2)])
    assert expected[0] == {
        ((2,), "block 0"): 40,
        **{((1,), f"block {n}"): 10 for n in (1, 2)},
        **{((2,), f"block {n}"): 40 for n in (1, 2)},
    }, "before layer 2's candidate has said anything, its bound counts"
    share[2] = 0.5
    expected.clear()
    assert evaluator.expected(Translate("", "", blocks[0], (1, 2), {})) == 40, "a new set goes by its last layer"
    evaluator.measure([((1, 2), block) for block in range(3)])
    assert expected[0] == {((1, 2), "block 1"): 20, ((1, 2), "block 2"): 20}, "then by itself"
