"""How a search goes about it: which sets of layers are tried, on how many sentences, and what is kept.

Pure decisions: how a set is scored, and where, is the evaluator's. `exhaustive` is the published loop (Moslem et al.,
Iterative Layer Pruning for Efficient Translation Inference, WMT 2025, section 3).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from raylp.metrics.intervals import Score, score_with_interval
from raylp.metrics.ngram import Statistics
from raylp.metrics.objective import Objective
from raylp.search.plan import Candidate, Removed, Round, lowest_first
from raylp.search.race import race
from raylp.search.targets import Target

TIMES = ("seconds", "gpu_seconds")


class Evaluator(Protocol):
    """What scores sets of layers. Blocks are numbered; `sizes`: sentences in each."""

    @property
    def objective(self) -> Objective: ...

    @property
    def sizes(self) -> Sequence[int]: ...

    @property
    def at_once(self) -> int:
        """Sentences that the workers translate in the time that fewer of them would take; 0 where it is not known."""
        ...

    def measure(self, units: list[tuple[Removed, int]]) -> None:
        """Scores these (set, block) pairs, unless they are known; earlier ones first."""
        ...

    def rows(self, removed: Removed, block: int) -> Statistics:
        """The objective's rows of one measured pair."""
        ...

    def likelihood(self, base: Removed, layers: Sequence[int]) -> dict[int, float]:
        """Mean negative log-probability of a reference token without `base` and each of `layers`."""
        ...

    def importance(self, criterion: str, base: Removed, layers: Sequence[int]) -> dict[int, float]:
        """A cheap criterion for each of `layers` in the model without `base`; the lowest goes first."""
        ...

    def healed(self, candidates: Sequence[Removed]) -> dict[Removed, Statistics]:
        """The objective's rows of each candidate on all blocks, after a short heal."""
        ...

    def noise(self) -> float | None:
        """A score that translations of other sentences reach; None where the objective has none such."""
        ...

    def spent(self) -> dict[str, float]:
        """Units, sentences generated and seconds of workers so far, in this run of the search or an earlier one."""
        ...


@dataclass(frozen=True)
class Options:
    """As in a recipe's `search` section."""

    strategy: str = "race"
    risk: float = 0.05
    criterion: str = "perplexity"
    beam: int = 1
    per_round: int = 1
    joint_tolerance: float = 1.25
    swaps: int = 0
    floor: str = "keep"
    heal_best: int = 0
    heal_on_floor: int = 3


@dataclass
class Choice:
    """`winners`: best first; `records`: what is told of every candidate; `facts`: how it was decided."""

    winners: list[Removed]
    records: list[Candidate]
    facts: dict[str, Any] = field(default_factory=dict)


class Search:
    """One search. `on_round` hears all rounds so far; `on_look` how a round goes: `sentences`, `alive`, `leader` and
    `score` of a race's look, or `noise` and the `best` score where none is above noise.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        target: Target,
        options: Options,
        on_round: Callable[[list[Round]], None] = lambda _: None,
        on_look: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.evaluator, self.target, self.options = evaluator, target, options
        self.on_round, self.on_look = on_round, on_look
        self.rounds: list[Round] = []
        self.stopped: str | None = None
        self.seconds: list[dict[str, float]] = []  # of every round
        self._last: dict[int, float] = {}  # each layer's score in the last round: who is measured first in the next
        self._baseline: Score | None = None

    def run(self) -> list[Round]:
        """All rounds. `stopped` says why a search ended before its target, if it did."""
        if self.target.max_loss is not None:
            self._baseline = self.full_score(())
        if self.options.strategy == "oneshot":
            self._oneshot()
        else:
            self._greedy()
        if self.rounds and self.options.swaps and self.stopped is None:
            self._swap()
        return self.rounds

    def full_score(self, removed: Removed) -> Score:
        """The objective without `removed` on all sentences of the search."""
        blocks = range(len(self.evaluator.sizes))
        self.evaluator.measure([(removed, block) for block in blocks])
        return self._score(removed, blocks)

    def _score(self, removed: Removed, blocks: Iterable[int]) -> Score:
        rows = np.concatenate([self.evaluator.rows(removed, block) for block in blocks])
        return score_with_interval(self.evaluator.objective, rows)

    # --- greedy, beam, several a round ---

    def _greedy(self) -> None:
        beam: list[Removed] = [()]
        while not self.target.reached(beam[0]) and len(beam[0]) < self.target.most:
            before = self.evaluator.spent()
            candidates = self._children(beam)
            width = max(self.options.beam, min(self.options.per_round, self.target.room(beam[0])))
            choice = self.choose(candidates, min(width, len(candidates)))
            if self.options.per_round > 1:
                choice.winners = [self._several(choice, beam[0])]
            best = choice.winners[0]
            score = self._after(best, choice)
            if self._too_much(score):
                self._stop(best, score)
                return
            self._file(beam[0], best, score, choice.records, {**choice.facts, **self._cost(before)})
            beam = choice.winners[: self.options.beam]

    def _children(self, beam: Sequence[Removed]) -> list[Removed]:
        """Every set of the beam with one layer more, each once, in the order of their layers."""
        free = self.target.free
        found: dict[frozenset[int], Removed] = {}
        for gone in beam:
            for layer in free:
                if layer not in gone:
                    found.setdefault(frozenset((*gone, layer)), (*gone, layer))
        return list(found.values())

    def choose(self, candidates: list[Removed], keep: int = 1) -> Choice:
        """The best `keep` of the candidates by the strategy."""
        if self.options.strategy == "sleb":
            return self._by_likelihood(candidates, keep)
        best_few = max(keep, self.options.heal_best)
        choice = self._by_objective(candidates, min(best_few, len(candidates)))
        noise = self.evaluator.noise()
        best = self._above(choice, noise) if noise is not None else None
        if noise is not None and best is not None:
            choice.facts["floor"] = {"noise": noise, "best": best, "decided_by": "the objective all the same"}
            self.on_look({"noise": noise, "best": best})
            if self.options.floor != "keep":
                return self._by_the_floor(choice, candidates, keep)
        if self.options.heal_best:
            return self._by_healing(choice, keep)
        choice.winners = choice.winners[:keep]
        return choice

    def _by_the_floor(self, choice: Choice, candidates: list[Removed], keep: int) -> Choice:
        """The best where no candidate is better than noise: the likeliest, or the best of them after a short heal."""
        floor = choice.facts["floor"]
        if self.options.floor == "heal" or self.options.heal_best:
            count = max(keep, self.options.heal_best or self.options.heal_on_floor)
            choice.winners = self._by_likelihood(candidates, min(count, len(candidates))).winners
            floor["decided_by"] = "a short heal of the likeliest"
            return self._by_healing(choice, keep)
        instead = self._by_likelihood(candidates, keep)
        losses = {c.removed: c.importance for c in instead.records}
        floor["decided_by"] = "likelihood"
        records = [
            Candidate(c.removed, c.score, c.sentences, c.dropped_at, c.bound, losses[c.removed]) for c in choice.records
        ]
        return Choice(instead.winners, records, choice.facts)

    def _above(self, choice: Choice, noise: float) -> float | None:
        """None where the winner is better than noise, else its score on all sentences."""
        winner = next(c for c in choice.records if c.removed == choice.winners[0])
        if winner.score is not None and winner.score.low > noise:
            return None
        value = self.full_score(winner.removed).value
        return None if value > noise else value

    def _by_healing(self, choice: Choice, keep: int) -> Choice:
        """Of the choice's winners the best `keep` after a short heal."""
        rows = self.evaluator.healed(choice.winners)
        scores = {removed: score_with_interval(self.evaluator.objective, own) for removed, own in rows.items()}
        order = sorted(choice.winners, key=lambda removed: (-scores[removed].value, choice.winners.index(removed)))
        healed = [{"removed": list(removed), "score": scores[removed].as_dict()} for removed in order]
        return Choice(order[:keep], choice.records, {**choice.facts, "healed": healed})

    def _by_objective(self, candidates: list[Removed], keep: int) -> Choice:
        evaluator, blocks = self.evaluator, range(len(self.evaluator.sizes))
        if self.options.strategy == "exhaustive":
            evaluator.measure([(removed, block) for removed in candidates for block in blocks])
            scores = {removed: self._score(removed, blocks) for removed in candidates}
            order = sorted(range(len(candidates)), key=lambda c: (-scores[candidates[c]].value, candidates[c][-1]))
            records = [Candidate(removed, scores[removed], scores[removed].n) for removed in candidates]
            self._last = {removed[-1]: scores[removed].value for removed in candidates}
            return Choice([candidates[c] for c in order[:keep]], records, {"strategy": "exhaustive"})
        first = sorted(range(len(candidates)), key=lambda c: -self._last.get(candidates[c][-1], 0.0))
        place = {c: rank for rank, c in enumerate(first)}

        def measure(units: list[tuple[int, int]]) -> None:
            ordered = sorted(units, key=lambda unit: (unit[1], place[unit[0]]))
            evaluator.measure([(candidates[c], block) for c, block in ordered])

        def look(sentences: int, alive: list[int], leader: int, score: float) -> None:
            told = {"sentences": sentences, "alive": len(alive), "leader": candidates[leader][-1], "score": score}
            self.on_look(told)

        result = race(
            len(candidates),
            evaluator.sizes,
            measure,
            lambda c, block: evaluator.rows(candidates[c], block),
            evaluator.objective.score,
            self.options.risk,
            keep,
            len(evaluator.objective.pairs),
            look,
            evaluator.at_once,
        )
        records = [
            Candidate(
                removed, self._score(removed, range(seen)), standing.sentences, standing.dropped_at, standing.bound
            )
            for removed, seen, standing in zip(candidates, result.blocks, result.standings, strict=True)
        ]
        self._last = {c.removed[-1]: c.score.value for c in records if c.score}
        facts = {"strategy": "race", "risk": self.options.risk, "looks": result.looks}
        winners = [candidates[c] for c in result.winners]
        if keep > 1:  # a race tells which they are, not their order
            winners.sort(key=lambda removed: (-self.full_score(removed).value, removed[-1]))
        return Choice(winners, records, facts)

    def _by_likelihood(self, candidates: list[Removed], keep: int) -> Choice:
        losses: dict[Removed, float] = {}
        for base in dict.fromkeys(removed[:-1] for removed in candidates):
            layers = [removed[-1] for removed in candidates if removed[:-1] == base]
            for layer, loss in self.evaluator.likelihood(base, layers).items():
                losses[(*base, layer)] = loss
        order = sorted(candidates, key=lambda removed: (losses[removed], removed[-1]))
        n = sum(self.evaluator.sizes)
        records = [Candidate(removed, None, n, importance=losses[removed]) for removed in candidates]
        return Choice(order[:keep], records, {"strategy": "sleb"})

    def _several(self, choice: Choice, gone: Removed) -> Removed:
        """As many of the round's best as cost no more together than `joint_tolerance` x the sum of their own losses."""
        layers = [winner[-1] for winner in choice.winners]
        before = self.full_score(gone).value
        losses = [before - self.full_score(winner).value for winner in choice.winners]
        tried = []
        sizes = range(1, len(layers) + 1)
        most = next((number for number in sizes if self.target.reached((*gone, *layers[:number]))), len(layers))
        for number in range(most, 1, -1):
            joint = (*gone, *layers[:number])
            score = self.full_score(joint)
            loss = before - score.value
            allowed = self.options.joint_tolerance * max(0.0, sum(losses[:number]))
            tried.append({"removed": list(joint), "loss": loss, "allowed": allowed})
            if loss <= allowed and not self._too_much(score):
                break
        else:
            number = 1
        choice.facts["joint"] = tried
        return (*gone, *layers[:number])

    def _after(self, best: Removed, choice: Choice) -> Score | None:
        """The score without `best`: on all sentences where a decision rests on it, else as far as it was measured."""
        decides = self.target.max_loss is not None or self.options.per_round > 1
        if decides or self.target.wanted(best) or self.target.reached(best):
            return self.full_score(best)
        return next((c.score for c in choice.records if c.removed == best), None)

    def _too_much(self, score: Score | None) -> bool:
        most = self.target.max_loss
        return (
            most is not None
            and score is not None
            and self._baseline is not None
            and (self._baseline.value - score.value > most)
        )

    def _stop(self, best: Removed, score: Score | None) -> None:
        assert score is not None and self._baseline is not None
        self.stopped = (
            f"without {list(best)} the loss would be {self._baseline.value - score.value:.2f}, at most "
            f"{self.target.max_loss:g} is allowed"
        )

    # --- one shot ---

    def _oneshot(self) -> None:
        before = self.evaluator.spent()
        free = self.target.free
        values = self.evaluator.importance(self.options.criterion, (), free)
        order = lowest_first({layer: values[layer] for layer in free})
        gone: Removed = ()
        for layer in order:
            if self.target.reached(gone) or len(gone) >= self.target.most:
                return
            best = (*gone, layer)
            score = self._after(best, Choice([best], []))
            if self._too_much(score):
                self._stop(best, score)
                return
            tried = [(*gone, other) for other in free if other not in gone]
            records = [Candidate(removed, None, 0, importance=values[removed[-1]]) for removed in tried]
            facts = {"strategy": "oneshot", "criterion": self.options.criterion}
            self._file(gone, best, score, records, {**facts, **self._cost(before)})
            before, gone = self.evaluator.spent(), best

    # --- refine ---

    def _swap(self) -> None:
        """Puts a removed layer back and takes another, while that helps on all sentences, and is no noise."""
        free = self.target.free
        for _ in range(self.options.swaps):
            before = self.evaluator.spent()
            gone = self.rounds[-1].gone
            now = self.full_score(gone)
            moves = [
                (*(layer for layer in gone if layer != back), other)
                for back in gone
                for other in free
                if other not in gone
            ]
            moves = [move for move in moves if self.target.depths or self.target.reached(move)]
            if not moves:
                return
            choice = self._by_objective(moves, 1)
            best = choice.winners[0]
            score = self.full_score(best)
            noise = self.evaluator.noise()
            helps = score.value > now.value and (noise is None or score.value > noise)
            facts = {**choice.facts, "move": "swap", **self._cost(before)}
            if not helps:
                self._file(gone, gone, now, choice.records, facts)
                return
            self._file(gone, best, score, choice.records, facts)

    # --- the record ---

    def _file(
        self, old: Removed, new: Removed, score: Score | None, records: list[Candidate], facts: dict[str, Any]
    ) -> None:
        taken = tuple(layer for layer in new if layer not in old)
        restored = tuple(layer for layer in old if layer not in new)
        self.rounds.append(Round(taken, restored, new, score, records, facts))
        self.on_round(self.rounds)

    def _cost(self, before: dict[str, float]) -> dict[str, Any]:
        """What a round took; seconds apart, since they are no part of the decision and differ from run to run."""
        spent = {key: value - before.get(key, 0) for key, value in self.evaluator.spent().items()}
        self.seconds.append({key: spent.pop(key) for key in TIMES if key in spent})
        return spent
