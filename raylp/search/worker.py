"""What a worker computes for a search. It files its lines itself: what is done outlives the driver."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylp.data.languages import split_pair
from raylp.data.tokens import Example
from raylp.generate.base import Output
from raylp.generate.pool import Worker
from raylp.generate.schedule import even
from raylp.ledger import TRANSLATION, said, score_key, shares, write_segment
from raylp.metrics.objective import load_metric
from raylp.rundir import RunDir
from raylp.search.blocks import Block
from raylp.search.short_heal import ShortHeal

if TYPE_CHECKING:
    from raylp.search.forced import ForcedScorer

MAX_SCORERS = 16
KEEP_BYTES = 1 << 30  # of states, over all scorers


@dataclass(frozen=True)
class Translate:
    """Work: translate a block without some layers, and score it. `facts`: of the line for each metric, by its name.

    `drafts`: tokens of translations that are thought to be near, if there are any.
    """

    path: str
    run_url: str
    block: Block
    removed: tuple[int, ...]
    facts: dict[str, dict[str, Any]]
    drafts: tuple[tuple[int, ...], ...] | None = None

    @property
    def backend(self) -> str:
        """What it is to be translated by."""
        return next(iter(self.facts.values()))["backend"]

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        return next(iter(self.facts.values()))["dtype"]

    @property
    def cost(self) -> float:
        """Tokens at most, which its time goes with."""
        return sum(request.max_new_tokens for request in self.block.requests)


@dataclass(frozen=True)
class HealAndTranslate:
    """Work: heal the model without some layers for a few steps, then translate and score all blocks.

    `batches`: what each step learns from; `facts`: of the line for each (block number, metric).
    """

    path: str
    run_url: str
    blocks: tuple[Block, ...]
    removed: tuple[int, ...]
    batches: tuple[tuple[Example, ...], ...]
    options: ShortHeal
    dtype: str
    facts: dict[tuple[int, str], dict[str, Any]]

    @property
    def cost(self) -> float:
        """Tokens, learned and generated."""
        return sum(r.max_new_tokens for b in self.blocks for r in b.requests) + sum(
            example.length for batch in self.batches for example in batch
        )


@dataclass(frozen=True)
class Force:
    """Work: probabilities of a block's references without `base` and each of `layers`, or of `base` alone.

    `facts`: of the line for each (layer, metric); the layer is None for `base` alone.
    """

    path: str
    run_url: str
    block: Block
    base: tuple[int, ...]
    layers: tuple[int, ...]
    dtype: str
    facts: dict[tuple[int | None, str], dict[str, Any]]

    @property
    def cost(self) -> float:
        """Tokens to score."""
        return sum(map(len, self.block.targets)) * max(1, len(self.layers))


@dataclass(frozen=True)
class Weigh:
    """Work: a cheap criterion for each of `layers` in the model without `base`, on all blocks."""

    path: str
    run_url: str
    blocks: tuple[Block, ...]
    base: tuple[int, ...]
    layers: tuple[int, ...]
    dtype: str
    criterion: str
    seed: int
    facts: dict[str, Any]

    @property
    def cost(self) -> float:
        """Tokens to look at."""
        return sum(len(target) for block in self.blocks for target in block.targets)


Work = Translate | HealAndTranslate | Force | Weigh


def pieces(
    works: Sequence[Work],
    rows: int,
    workers: int,
    cost: Callable[[Translate], float] = lambda work: work.cost,
    block: int | None = None,
) -> list[Sequence[Work]]:
    """Which translations are made together: at most `rows` sentences, and as many pieces for each worker.

    Views of a transformers model share batches within a language pair, whose prompts begin alike; vLLM translates with
    one view at a time. Other work is a piece by itself. By what they should `cost`, translations are dealt out evenly
    where every worker gets one piece; where it gets several, those of like cost go together, as a batch lasts for its
    longest row. With no more `rows` than a `block` has (default: the largest here), every translation is one by itself.
    """
    found: list[Sequence[Work]] = [[work] for work in works if not isinstance(work, Translate)]
    translations = [work for work in works if isinstance(work, Translate)]
    sizes = [len(work.block) for work in translations]
    if rows <= (block or max(sizes, default=0)):
        return [*found, *([work] for work in translations)]
    groups: dict[Any, list[Translate]] = {}
    for work in sorted(translations, key=cost, reverse=True):  # what is equally long stays in the order given
        groups.setdefault(work.block.pair if work.backend == "transformers" else work.removed, []).append(work)
    if len(groups) == 1 and sum(sizes) <= rows * workers:
        (group,) = groups.values()
        return [*found, *_dealt(group, rows, workers, cost)]
    most = even(sum(sizes), rows, workers)
    return [*found, *(piece for group in groups.values() for piece in _filled(group, most))]


def _filled(group: Sequence[Translate], most: int) -> list[list[Translate]]:
    """In the order given, as many in each piece as have at most `most` sentences; one at least."""
    found: list[list[Translate]] = []
    room = 0
    for work in group:
        if len(work.block) > room:
            found.append([])
            room = most
        found[-1].append(work)
        room -= len(work.block)
    return found


def _dealt(
    group: Sequence[Translate], rows: int, workers: int, cost: Callable[[Translate], float]
) -> list[list[Translate]]:
    """A piece for each worker, or more where `rows` asks for it; in the order given, each goes where least is to do."""
    found: list[list[Translate]] = [[] for _ in range(min(workers, len(group)))]
    loads = [0.0] * len(found)
    for work in group:
        open_ = [i for i, piece in enumerate(found) if sum(len(w.block) for w in piece) + len(work.block) <= rows]
        if not open_:
            found.append([])
            loads.append(0.0)
            open_ = [len(found) - 1]
        chosen = min(open_, key=loads.__getitem__)
        found[chosen].append(work)
        loads[chosen] += cost(work)
    return found


def scored(
    block: Block, outputs: Sequence[Output], facts_by_name: dict[str, dict[str, Any]], seconds: float
) -> list[dict[str, Any]]:
    """The lines of a translated block, one for each metric; the first keeps the translations."""
    texts = [output.text for output in outputs]
    lines = []
    for name, facts in facts_by_name.items():
        if name == TRANSLATION:
            rows: Sequence[Any] = [[len(output.tokens)] for output in outputs]
        else:
            metric = load_metric(name, split_pair(block.pair)[1])
            rows = metric.statistics(texts, block.references, block.sources).tolist()
        lines.append({"key": score_key(facts), **facts, "statistics": rows})
    lines[0] |= said(block.pair, outputs, seconds)
    return lines


class SearchWorker(Worker):
    """A worker that also scores."""

    def __init__(self, threads: int, newline: bool, log: str, batch_size: int | None = None) -> None:
        super().__init__(threads, newline, log, batch_size)
        self.scorers: dict[tuple[str, ...], ForcedScorer] = {}

    def _unload(self) -> None:
        self.scorers = {}
        super()._unload()

    def do(self, work: Work) -> list[dict[str, Any]]:
        """The ledger lines of a piece of work."""
        return self.do_together([work])[0]

    def do_together(self, works: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """The ledger lines of each of `works`, which are one of `pieces`."""
        made = self._translated(works) if isinstance(works[0], Translate) else [self._lines(work) for work in works]
        for work, lines in zip(works, made, strict=True):
            for line in lines:
                line["worker"] = f"{socket.gethostname()}:{self.pid()}"
            write_segment(RunDir(work.run_url), lines)
        return made

    def _lines(self, work: HealAndTranslate | Force | Weigh) -> list[dict[str, Any]]:
        if isinstance(work, HealAndTranslate):
            return self._healed(work)
        return self._forced(work) if isinstance(work, Force) else self._weighed(work)

    def _translated(self, works: Sequence[Translate]) -> list[list[dict[str, Any]]]:
        first, skippable = works[0], works[0].backend == "vllm"
        asked = [(work.block.requests, work.removed, work.drafts) for work in works]
        made, seconds = self.translate_together(first.path, first.backend, first.dtype, asked, skippable)
        return [
            scored(work.block, outputs, work.facts, share)
            for work, outputs, share in zip(works, made, shares(seconds, made), strict=True)
        ]

    def _healed(self, work: HealAndTranslate) -> list[dict[str, Any]]:
        from raylp.search.short_heal import healed

        generator: Any = self.hold(work.path, "transformers", work.dtype)
        started = time.perf_counter()
        with healed(generator.model, work.removed, work.batches, work.options):
            made: dict[int, list[Output]] = {}
            for pair in dict.fromkeys(block.pair for block in work.blocks):  # whose prompts begin alike
                own = [number for number, block in enumerate(work.blocks) if block.pair == pair]
                asked = [(work.blocks[number].requests, (), None) for number in own]
                made |= zip(own, generator.generate_together(asked), strict=True)
        lines = []
        outputs_of = [made[number] for number in range(len(work.blocks))]
        parts = shares(time.perf_counter() - started, outputs_of)
        for number, (block, outputs, share) in enumerate(zip(work.blocks, outputs_of, parts, strict=True)):
            facts = {name: own for (other, name), own in work.facts.items() if other == number}
            lines += scored(block, outputs, facts, share)
        return lines

    def _forced(self, work: Force) -> list[dict[str, Any]]:
        started = time.perf_counter()
        scorer = self._scorer(work.path, work.dtype, (work.block,))
        lines = []
        found: list[tuple[int | None, Any]]
        for name in dict.fromkeys(name for _, name in work.facts):
            objective: Any = name
            if work.layers:
                found = [*scorer.sweep(work.base, work.layers, objective).items()]
            else:
                found = [(None, scorer.score(work.base, objective))]
            for layer, own in found:
                facts = work.facts[layer, name]
                lines.append({"key": score_key(facts), **facts, "statistics": own.tolist()})
        lines[0]["seconds"] = round(time.perf_counter() - started, 4)
        return lines

    def _weighed(self, work: Weigh) -> list[dict[str, Any]]:
        from raylp.search.criteria import importance

        started = time.perf_counter()
        scorer = self._scorer(work.path, work.dtype, work.blocks)
        values = importance(work.criterion, scorer, work.base, seed=work.seed)
        seconds = round(time.perf_counter() - started, 4)
        rows = [[values[layer]] for layer in work.layers]
        return [{"key": score_key(work.facts), **work.facts, "statistics": rows, "seconds": seconds}]

    def _scorer(self, path: str, dtype: str, blocks: tuple[Block, ...]) -> "ForcedScorer":
        """For these blocks, the one of last time if it is still there: it keeps states for the next round."""
        from raylp.search.forced import ForcedScorer

        model = self.hold(path, "transformers", dtype).model  # type: ignore[attr-defined]
        key = (path, dtype, *(block.hash for block in blocks))
        if key not in self.scorers:
            examples = [
                Example(request.tokens, target, block.pair)
                for block in blocks
                for request, target in zip(block.requests, block.targets, strict=True)
            ]
            while len(self.scorers) >= MAX_SCORERS:
                del self.scorers[next(iter(self.scorers))]
            self.scorers[key] = ForcedScorer(model, examples, keep_bytes=KEEP_BYTES // MAX_SCORERS)
        return self.scorers[key]
