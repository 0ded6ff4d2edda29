"""Scores sets of removed layers: from the ledger, else by workers; what is found once is never computed again."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raylp.data.tokens import Example
from raylp.ledger import TRANSLATION, Ledger, decoding_of, score_facts, score_key, unit_key, write_segment
from raylp.metrics.ngram import Statistics
from raylp.metrics.objective import FORCED, Objective
from raylp.search.blocks import Block
from raylp.search.plan import Removed
from raylp.search.short_heal import ShortHeal, chosen_examples
from raylp.search.worker import Force, HealAndTranslate, Translate, Weigh, Work

ROTATIONS = 20
GREEDY = decoding_of(chat=False)
Compute = Callable[[list[Work]], Iterable[tuple[Work, list[dict[str, Any]]]]]


class LedgerEvaluator:
    """See `raylp.search.strategies.Evaluator`.

    `compute` does pieces of work, in any order, and yields each with its lines, which it has already filed.
    `gpus_per_worker`: to count GPU-seconds. `encode`: tokens of a translation, to make drafts of known ones.
    `heals_on`: what candidates are healed on, as `short_heal` says. `on_unit` hears of every piece that is done.
    `at_once`: see the protocol.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        blocks: Sequence[Block],
        objective: Objective,
        ledger: Ledger,
        compute: Compute,
        backend: str,
        dtype: str,
        decoding: str = GREEDY,
        gpus_per_worker: float = 0,
        seed: int = 0,
        encode: Callable[[str], list[int]] | None = None,
        heals_on: Sequence[Example] = (),
        short_heal: ShortHeal | None = None,
        on_unit: Callable[[Work], None] = lambda _: None,
        at_once: int = 0,
    ) -> None:
        self.path, self.model, self.blocks, self.objective = path, model, list(blocks), objective
        self.ledger, self.compute, self.backend, self.dtype = ledger, compute, backend, dtype
        self.gpus_per_worker, self.seed, self.encode, self.on_unit = gpus_per_worker, seed, encode, on_unit
        self.heals_on, self.short_heal, self.at_once = list(heals_on), short_heal, at_once
        self.sizes = [len(block) for block in self.blocks]
        self.decoding = decoding
        self.run_url = ledger.rundir.uri("")  # workers have a working directory of their own
        self._used: dict[str, dict[str, Any]] = {}  # lines this search rests on, by key
        self._said: dict[Any, float] = {}  # tokens said, as a share of their bound: by set, and by last layer
        self._noise: float | None = None

    # --- facts and lines ---

    def facts(self, removed: Removed, block: Block, name: str, healed: str = "") -> dict[str, Any]:
        """What the line of one metric is a fact about; probabilities are always transformers'.

        `healed`: names the short heal before, if there was one.
        """
        forced = name in FORCED
        return score_facts(
            self.model,
            removed,
            block.hash,
            name if name == TRANSLATION else self.objective.filed(name, block.pair),
            "transformers" if forced or healed else self.backend,
            self.dtype,
            "forced" if forced else f"{self.decoding}|healed:{healed}" if healed else self.decoding,
        )

    def _find(self, removed: Removed, block: Block, name: str) -> dict[str, Any] | None:
        line = self.ledger.find(score_key(self.facts(removed, block, name)))
        if line is not None:
            self._used[line["key"]] = line
        return line

    # --- what strategies ask for ---

    def measure(self, units: list[tuple[Removed, int]]) -> None:
        for line in self._missing(units):
            self.ledger.remember(line)

    def rows(self, removed: Removed, block: int) -> Statistics:
        there = self.blocks[block]
        parts = {}
        for name, _ in self.objective.weights:
            line = self._find(removed, there, name)
            assert line is not None, "measured before"
            parts[name] = line["statistics"]
        return self.objective.rows(parts, there.pair)

    def likelihood(self, base: Removed, layers: Sequence[int]) -> dict[int, float]:
        everything = range(len(self.blocks))
        self._force([((*base, layer), block) for block in everything for layer in layers], ["likelihood"])
        found = {}
        for layer in layers:
            lines = [self._find((*base, layer), block, "likelihood") for block in self.blocks]
            totals = np.concatenate([np.asarray(line["statistics"]) for line in lines if line]).sum(0)
            found[layer] = -float(totals[0] / totals[1])
        return found

    def importance(self, criterion: str, base: Removed, layers: Sequence[int]) -> dict[int, float]:
        if criterion == "perplexity":
            return {layer: float(np.exp(loss)) for layer, loss in self.likelihood(base, layers).items()}
        everything = "+".join(block.hash for block in self.blocks)
        name = f"{criterion}|{self.seed}|{','.join(map(str, layers))}"
        facts = score_facts(self.model, base, everything, name, "transformers", self.dtype, "forced")
        line = self.ledger.find(score_key(facts))
        if line is None:
            work = Weigh(
                str(self.path),
                self.run_url,
                tuple(self.blocks),
                base,
                tuple(layers),
                self.dtype,
                criterion,
                self.seed,
                facts,
            )
            for _, (line,) in self.compute([work]):
                self.ledger.remember(line)
        assert line is not None
        self._used[line["key"]] = line
        return dict(zip(layers, (row[0] for row in line["statistics"]), strict=True))

    def healed(self, candidates: Sequence[Removed]) -> dict[Removed, Statistics]:
        """The objective's rows of every candidate after a short heal, on all blocks."""
        assert self.short_heal is not None
        names = [name for name, _ in self.objective.weights]
        batches = tuple(map(tuple, chosen_examples(self.heals_on, self.short_heal)))
        options = self.short_heal.model_dump(exclude={"best"})
        content = json.dumps([options, [[e.prompt, e.target] for b in batches for e in b]])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        here = [name for name in names if self.objective.is_cheap(name)] or [TRANSLATION]
        works: list[Work] = []
        for removed in candidates:
            facts = {(n, m): self.facts(removed, b, m, digest) for n, b in enumerate(self.blocks) for m in here}
            if any(self.ledger.find(score_key(own)) is None for own in facts.values()):
                url, blocks, how = self.run_url, tuple(self.blocks), self.short_heal
                works.append(HealAndTranslate(str(self.path), url, blocks, removed, batches, how, self.dtype, facts))
        for work, lines in self.compute(works) if works else []:
            for line in lines:
                self.ledger.remember(line)
            self.on_unit(work)
        return {removed: self._healed_rows(removed, names, digest) for removed in candidates}

    def _healed_rows(self, removed: Removed, names: Sequence[str], digest: str) -> Statistics:
        rows = []
        for block in self.blocks:
            parts = {}
            for name in names:
                key = score_key(self.facts(removed, block, name, digest))
                line = self.ledger.find(key)
                if line is None:
                    kept = self.ledger.translated(unit_key(self.facts(removed, block, TRANSLATION, digest)))
                    assert kept is not None
                    (line,) = self._score(removed, block, [name], kept["texts"], digest)
                    self.ledger.remember(line)
                self._used[line["key"]] = line
                parts[name] = line["statistics"]
            rows.append(self.objective.rows(parts, block.pair))
        return np.concatenate(rows)

    def noise(self) -> float | None:
        """The best score that the unpruned model's translations reach against other sentences' references."""
        names = self.objective.text_names
        if self.objective.forced_names or any(not self.objective.is_cheap(name) for name in names):
            return None
        if self._noise is None:
            self.measure([((), block) for block in range(len(self.blocks))])
            self._noise = max(self._rotated(), default=0.0)
        return self._noise

    def _rotated(self) -> Iterator[float]:
        """Scores of the unpruned model's translations against the references of the k-th next sentences of the pair."""
        by_pair: dict[str, tuple[list[str], list[str], list[str]]] = {}
        for block in self.blocks:
            texts, references, sources = by_pair.setdefault(block.pair, ([], [], []))
            texts += self._texts((), block) or []
            references += block.references
            sources += block.sources
        for k in range(1, 1 + min(ROTATIONS, *(len(texts) - 1 for texts, _, _ in by_pair.values()))):
            rows = []
            for pair, (texts, references, sources) in by_pair.items():
                other = references[k:] + references[:k]
                parts = {
                    n: self.objective.metric(n, pair).statistics(texts, other, sources)
                    for n, _ in self.objective.weights
                }
                rows.append(self.objective.rows(parts, pair))
            yield self.objective.score(np.concatenate(rows).sum(0))

    def spent(self) -> dict[str, float]:
        used = list(self._used.values())
        translated = [line for line in used if "texts" in line]
        forced = [line for line in used if line["metric"] in FORCED]
        seconds = sum(line.get("seconds", 0.0) for line in used)
        return {
            "units": len(translated),
            "sentences": sum(len(line["texts"]) for line in translated),
            "forced_sentences": sum(len(line["statistics"]) for line in forced),
            "seconds": round(seconds, 3),
            "gpu_seconds": round(seconds * self.gpus_per_worker, 3),
        }

    # --- work ---

    def expected(self, work: Work) -> float:
        """Tokens a piece of work should take, going by its set of layers so far, or by the last set with its layer."""
        if not isinstance(work, Translate) or not work.removed:
            return work.cost
        return work.cost * self._said.get(frozenset(work.removed), self._said.get(work.removed[-1], 1.0))

    def _heard(self, work: Translate, tokens: int) -> None:
        """Broken candidates ramble, to the bound and from the first sentence on: their other blocks take as long."""
        share = tokens / max(1.0, work.cost)
        name = frozenset(work.removed)
        self._said[name] = (self._said.get(name, share) + share) / 2
        if work.removed:
            self._said[work.removed[-1]] = self._said[name]

    def _texts(self, removed: Removed, block: Block) -> list[str] | None:
        """Translations that are known, whatever metric they were made for."""
        line = self.ledger.translated(unit_key(self.facts(removed, block, TRANSLATION)))
        if line is None:
            return None
        self._used[line["key"]] = line
        return line["texts"]

    def _missing(self, units: list[tuple[Removed, int]]) -> Iterator[dict[str, Any]]:
        """Computes what is missing and yields its lines."""
        names = self.objective.text_names
        works: list[Work] = []
        for removed, number in units if names else []:
            block = self.blocks[number]
            lacking = [name for name in names if self._find(removed, block, name) is None]
            if not lacking:
                continue
            texts = self._texts(removed, block)
            if texts is not None:
                yield from self._score(removed, block, lacking, texts)
                continue
            here = [name for name in lacking if self.objective.is_cheap(name)] or [TRANSLATION]
            facts = {name: self.facts(removed, block, name) for name in here}
            works.append(Translate(str(self.path), self.run_url, block, removed, facts, self._drafts(removed, block)))
        for work, lines in self.compute(works) if works else []:
            assert isinstance(work, Translate)
            self._heard(work, lines[0]["tokens"])
            yield from lines
            self.on_unit(work)
            later = [name for name in names if not self.objective.is_cheap(name)]
            yield from self._score(work.removed, work.block, later, lines[0]["texts"])
        if self.objective.forced_names:
            self._force(units, self.objective.forced_names)

    def _drafts(self, removed: Removed, block: Block) -> tuple[tuple[int, ...], ...] | None:
        """What the model said with the last layer still in it, or with all of them, if that is known."""
        if self.encode is None or not removed:
            return None
        for known in (removed[:-1], ()):
            line = self.ledger.translated(unit_key(self.facts(known, block, TRANSLATION)))
            if line is not None:
                return tuple(tuple(self.encode(text)) for text in line["texts"])
        return None

    def _score(
        self, removed: Removed, block: Block, names: list[str], texts: list[str], healed: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Lines of metrics computed here, from translations that are there."""
        for name in names:
            facts = self.facts(removed, block, name, healed)
            rows = self.objective.metric(name, block.pair).statistics(texts, block.references, block.sources)
            line = {"key": score_key(facts), **facts, "statistics": rows.tolist(), "seconds": 0.0, "worker": "driver"}
            write_segment(self.ledger.rundir, [line])
            yield line

    def _force(self, units: list[tuple[Removed, int]], names: list[str]) -> None:
        """Probabilities of the references, for all candidates of one base and block in one sweep."""
        lacking = [
            (removed, number)
            for removed, number in units
            if any(self._find(removed, self.blocks[number], name) is None for name in names)
        ]
        works: list[Work] = []
        key = lambda unit: (unit[1], unit[0][:-1], not unit[0])  # noqa: E731
        for (number, base, whole), group in itertools.groupby(sorted(lacking, key=key), key=key):
            block, layers = self.blocks[number], [] if whole else [removed[-1] for removed, _ in group]
            tried: list[int | None] = [None] if whole else [*layers]
            facts = {
                (layer, name): self.facts(base if layer is None else (*base, layer), block, name)
                for layer in tried
                for name in names
            }
            works.append(Force(str(self.path), self.run_url, block, base, tuple(layers), self.dtype, facts))
        for work, lines in self.compute(works) if works else []:
            for line in lines:
                self.ledger.remember(line)
            self.on_unit(work)
