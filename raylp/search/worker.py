"""What a worker computes for a search. It files its lines itself: what is done outlives the driver."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylp.data.languages import split_pair
from raylp.generate.base import Output
from raylp.generate.pool import Worker
from raylp.heal.pack import Example
from raylp.ledger import score_key, write_segment
from raylp.metrics.objective import load_metric
from raylp.rundir import RunDir
from raylp.search.blocks import Block
from raylp.search.short_heal import ShortHeal

if TYPE_CHECKING:
    from raylp.search.forced import ForcedScorer

MAX_SCORERS = 16
KEEP_BYTES = 1 << 30  # of states, over all scorers
TRANSLATION = "translation"  # the metric of a line that only keeps translations; its rows count their tokens


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


def pieces(works: Sequence[Work], rows: int, workers: int) -> list[Sequence[Work]]:
    """Which translations are made together: at most `rows` sentences, and enough pieces for all workers.

    Views of a transformers model share batches within a language pair, whose prompts begin alike; vLLM translates with
    one view at a time. Other work is a piece by itself.
    """
    together = sorted((work for work in works if isinstance(work, Translate)), key=_shared)
    most = min(rows, -(-sum(len(work.block) for work in together) // workers))
    found: list[list[Translate]] = []
    for work in together:
        fits = found and sum(len(other.block) for other in found[-1]) + len(work.block) <= most
        if not fits or _shared(found[-1][-1]) != _shared(work):
            found.append([])
        found[-1].append(work)
    return [*found, *([work] for work in works if not isinstance(work, Translate))]


def _shared(work: Translate) -> tuple[str, tuple[int, ...]]:
    """What translations that are made together have in common."""
    return (work.block.pair, ()) if work.backend == "transformers" else ("", work.removed)


def scored(
    block: Block, outputs: Sequence[Output], facts_by_name: dict[str, dict[str, Any]], seconds: float
) -> list[dict[str, Any]]:
    """The lines of a translated block, one for each metric; the first keeps the translations."""
    texts = [output.text for output in outputs]
    tokens = [len(output.tokens) for output in outputs]
    lines = []
    for name, facts in facts_by_name.items():
        if name == TRANSLATION:
            rows: Sequence[Any] = [[count] for count in tokens]
        else:
            metric = load_metric(name, split_pair(block.pair)[1])
            rows = metric.statistics(texts, block.references, block.sources).tolist()
        lines.append({"key": score_key(facts), **facts, "statistics": rows})
    lines[0] |= {
        "pair": block.pair,
        "texts": texts,
        "tokens": sum(tokens),
        "finish": [output.finish for output in outputs],
        "seconds": round(seconds, 4),
    }
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
        return self._file(work, self._lines(work))

    def do_together(self, works: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """The ledger lines of each of the works of a piece. Translations share batches, seconds go by their tokens."""
        if len(works) == 1:
            return [self.do(works[0])]
        made, seconds = self._made_together(works)
        tokens = [sum(len(output.tokens) for output in outputs) for outputs in made]
        shares = [seconds * own / max(1, sum(tokens)) for own in tokens]
        return [
            self._file(work, scored(work.block, outputs, work.facts, share))
            for work, outputs, share in zip(works, made, shares, strict=True)
        ]

    def _made_together(self, works: Sequence[Translate]) -> tuple[list[list[Output]], float]:
        path, dtype = works[0].path, next(iter(works[0].facts.values()))["dtype"]
        if works[0].backend == "transformers":
            asked = [(work.block.requests, work.removed, work.drafts) for work in works]
            return self.translate_together(path, dtype, asked)
        requests = [request for work in works for request in work.block.requests]
        outputs, seconds = self.translate(path, "vllm", dtype, requests, works[0].removed, True)
        every = iter(outputs)
        return [[next(every) for _ in work.block.requests] for work in works], seconds

    def _file(self, work: Work, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in lines:
            line["worker"] = f"{socket.gethostname()}:{self.pid()}"
        write_segment(RunDir(work.run_url), lines)
        return lines

    def _lines(self, work: Work) -> list[dict[str, Any]]:
        if isinstance(work, Translate):
            return self._translated(work)
        if isinstance(work, HealAndTranslate):
            return self._healed(work)
        return self._forced(work) if isinstance(work, Force) else self._weighed(work)

    def _translated(self, work: Translate) -> list[dict[str, Any]]:
        backend, dtype = work.backend, next(iter(work.facts.values()))["dtype"]
        outputs, seconds = self.translate(
            work.path, backend, dtype, work.block.requests, work.removed, backend == "vllm", work.drafts
        )
        return scored(work.block, outputs, work.facts, seconds)

    def _healed(self, work: HealAndTranslate) -> list[dict[str, Any]]:
        from raylp.search.short_heal import healed

        generator: Any = self.hold(work.path, "transformers", work.dtype)
        started = time.perf_counter()
        lines = []
        with healed(generator.model, work.removed, work.batches, work.options):
            training = time.perf_counter() - started
            for number, block in enumerate(work.blocks):
                started = time.perf_counter()
                outputs = generator.generate(block.requests)
                facts = {name: own for (other, name), own in work.facts.items() if other == number}
                lines += scored(block, outputs, facts, time.perf_counter() - started)
        lines[0]["seconds"] = round(lines[0]["seconds"] + training, 4)
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
        from raylp.search.forced import Example as Forced
        from raylp.search.forced import ForcedScorer

        model = self.hold(path, "transformers", dtype).model  # type: ignore[attr-defined]
        key = (path, dtype, *(block.hash for block in blocks))
        if key not in self.scorers:
            examples = [
                Forced(request.tokens, target)
                for block in blocks
                for request, target in zip(block.requests, block.targets, strict=True)
            ]
            while len(self.scorers) >= MAX_SCORERS:
                del self.scorers[next(iter(self.scorers))]
            self.scorers[key] = ForcedScorer(model, examples, keep_bytes=KEEP_BYTES // MAX_SCORERS)
        return self.scorers[key]
