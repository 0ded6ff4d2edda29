"""The search of a run: blocks x candidates are pieces of work for resident models on a Ray cluster."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.context import Context
from raylp.data.tokens import Example
from raylp.errors import UserError
from raylp.generate.layout import Layout
from raylp.generate.pool import Pool, batch_size_of, plan_workers
from raylp.generate.translate import read_stop_rule
from raylp.heal.examples import choose, tokenise
from raylp.ledger import Ledger, decoding_of
from raylp.metrics.intervals import Score
from raylp.metrics.objective import Objective, objective_name
from raylp.models.checkpoint import stack_size
from raylp.models.load import load_tokenizer, read_config
from raylp.models.source import fingerprint
from raylp.progress import Task
from raylp.quantize.engines import are_shared, weights_bytes
from raylp.rundir import RunDir
from raylp.search import legs
from raylp.search.blocks import Block, make_blocks
from raylp.search.config import Search as Section
from raylp.search.evaluator import LedgerEvaluator
from raylp.search.plan import Removed, Round, num_evaluations, protected_layers
from raylp.search.short_heal import ShortHeal
from raylp.search.strategies import TIMES, Options, Search
from raylp.search.targets import Target, given_depths, most_evaluations, target_of
from raylp.search.worker import SearchWorker, Work, pieces

SCHEMA = 1
LEG = "leg.json"  # of a leg that is done: what it is the result of
RECORD = "search.json"  # what a search took, and how its backend was chosen: no part of its decisions
TIMED_SENTENCES = 8
MAX_HEAL_TOKENS = 512


def options_of(section: Section) -> Options:
    """The strategy of a recipe."""
    return Options(
        section.strategy,
        section.risk,
        section.criterion,
        section.beam,
        section.per_round,
        section.joint_tolerance,
        section.swaps,
        section.decided_floor,
        section.short_heal.best if section.short_heal else 0,
    )


def stack_path(path: Path) -> str:
    """Module path of the layer list, found on a model without weights."""
    import torch

    from raylp.models.load import model_class
    from raylp.models.stack import find_stack

    with torch.device("meta"):
        return find_stack(model_class(path)._from_config(read_config(path))).path


def search(context: Context) -> dict[str, Any]:
    """Runs the search, or takes the given list, and writes plan.json; where healing comes in between, the first leg.
    What the ledger knows is not computed again.
    """
    stops = leg_stops(context)
    return search_leg(context, stops, 0) if stops else search_from(context)


def leg_stops(context: Context) -> list[int]:
    """Numbers of layers at which the recipe heals; empty where it does so once."""
    return legs.stops_of(context.recipe, stack_size(context.baseline))


def search_leg(context: Context, stops: Sequence[int], number: int) -> dict[str, Any]:
    """Searches from the model healed at the stop before `stops[number]` (the unpruned one for the first) down to it, in
    a directory of its own, legs/N, unless that is done; then plan.json is put together of all legs that are done.
    """
    leg = _leg(context, stops, number)
    of = _of(leg)
    if not _is_done(leg.rundir, of):
        if number:
            context.reporter.line(f"search goes on from healed-{stops[number - 1]}, to {stops[number]} layers")
        search_from(leg)
        leg.rundir.write_json(LEG, {"of": of})
    return _join_legs(context, stops)


def _leg(context: Context, stops: Sequence[int], number: int) -> Context:
    """What the search of a leg is given; the legs before it are done."""
    section, num_layers = context.recipe.search, stack_size(context.baseline)
    assert section is not None
    start, gone = context.baseline, ()
    if number:
        start = context.rundir.local(f"models/healed-{stops[number - 1]}")
        gone = tuple(legs.joined(*_plans(context, stops[:number]))["removed"])
    recipe = context.recipe.model_copy(update={"search": legs.section_of(section, stops[number], num_layers, gone)})
    return replace(context, recipe=recipe, rundir=leg_folder(context, stops[number]), start=start, gone=gone)


def leg_folder(context: Context, stop: int) -> RunDir:
    """Where the leg down to so many layers has what is its own."""
    return RunDir(context.rundir.uri(f"legs/{stop}"))


def _of(leg: Context) -> str:
    assert leg.recipe.search is not None
    rows = [[pair.pair, pair.source, pair.target] for pair in leg.splits.search]
    return legs.of(leg.recipe.search, fingerprint(leg.baseline), [*rows, leg.prompt.model_dump(mode="json")])


def _is_done(folder: RunDir, of: str) -> bool:
    return folder.exists(LEG) and folder.read_json(LEG)["of"] == of and folder.exists("plan.json")


def _plans(context: Context, stops: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The plans of the legs down to these stops, and which models the later ones began with."""
    starts = [{"model": f"healed-{stop}", "layers": stop} for stop in stops[:-1]]
    return [leg_folder(context, stop).read_json("plan.json") for stop in stops], starts


def _join_legs(context: Context, stops: Sequence[int]) -> dict[str, Any]:
    """Writes plan.json and search.json of the legs that are done, one after the other; what they say in short."""
    done = 1
    while done < len(stops) and context.rundir.complete(f"models/healed-{stops[done - 1]}"):
        leg = _leg(context, stops, done)
        if not _is_done(leg.rundir, _of(leg)):
            break
        done += 1
    plan = legs.joined(*_plans(context, stops[:done]))
    took = [folder.read_json(RECORD) for stop in stops[:done] if (folder := leg_folder(context, stop)).exists(RECORD)]
    spent = {key: sum(one["spent"].get(key, 0) for one in took) for key in took[-1]["spent"]} if took else {}
    context.rundir.write_json("plan.json", plan)
    if took:
        rounds = [seconds for one in took for seconds in one["rounds"]]
        context.rundir.write_json(RECORD, {**took[0], "rounds": rounds, "spent": spent})
    return {
        "removed": plan["removed"],
        "strategy": plan["strategy"],
        "legs": plan["legs"],
        "baseline": plan["baseline"],
        "score": plan["rounds"][-1]["score"],
        "spent": spent,
    }


def search_from(context: Context) -> dict[str, Any]:
    """One search on `context.baseline`; `search` says what it writes."""
    section = context.recipe.search
    assert section is not None
    path = context.baseline
    if section.given is not None:
        depths = given_depths(section, stack_size(path))
        gone = depths[-1]["removed"]
        write_plan(context, stack_size(path), gone, [], None, {"depths": depths})
        return {"removed": gone, "evaluations": 0}
    target = target_of(section, path)
    cache = RunDir(context.recipe.cache) if context.recipe.cache else None
    ledger = Ledger(context.rundir, cache)
    already = len(ledger.lines)
    cluster.start(context.recipe.resources)
    dtype = _dtype(context)
    layout = plan_workers(context.recipe.resources, weights_bytes(path, dtype), are_shared(path, dtype))
    objective = Objective.of(section.objective, [example.pair for example in context.splits.search])
    rows = batch_size_of(context.recipe.resources, layout)
    pool = Pool(layout, context.prompt.newline, context.rundir.logs(), SearchWorker, batch_size=rows)
    try:
        with context.reporter.task("search") as task:
            progress = Progress(context, task, section, target)
            evaluator = make_evaluator(context, objective, ledger, pool, task, progress, layout)
            task.expect(most_evaluations(section, target) * len(evaluator.blocks))
            work = Search(evaluator, target, options_of(section), progress.round, progress.look)
            baseline = work.full_score(())
            progress.baseline(baseline)
            rounds = work.run()
            noise = evaluator.noise() if section.strategy in ("race", "exhaustive") else None
    finally:
        pool.close()
        objective.close()
    gone, spent = rounds[-1].gone if rounds else (), evaluator.spent()
    record = {
        **_record(context),
        "rounds": work.seconds,
        "spent": spent,
        "workers": layout.workers,
        "gpus": layout.gpus,
    }
    context.rundir.write_json(RECORD, record)
    extra = {
        "strategy": section.strategy,
        "risk": section.risk if section.strategy == "race" else None,
        "objective": section.objective,
        "depths": depths_of(target, rounds),
        "noise": noise,
        "stopped": work.stopped,
        "spent": {key: value for key, value in spent.items() if key not in TIMES},
        "backend": evaluator.backend,
        "dtype": evaluator.dtype,
    }
    write_plan(context, target.num_layers, gone, rounds, baseline, extra)
    if not gone:
        raise UserError(f"no layer can go: {work.stopped}; raise search.max_loss", 1)
    return {
        "removed": list(gone),
        "strategy": section.strategy,
        "sentences": sum(evaluator.sizes),
        "baseline": baseline.as_dict(),
        "score": rounds[-1].score.as_dict() if rounds and rounds[-1].score else None,
        "spent": spent,
        "workers": layout.workers,
        "lines_known_before": already,
        "stopped": work.stopped,
    }


def make_evaluator(
    context: Context,
    objective: Objective,
    ledger: Ledger,
    pool: Pool,
    task: Task,
    progress: "Progress",
    layout: Layout,
) -> LedgerEvaluator:
    """Scores over the pool's workers."""
    section = context.recipe.search
    assert section is not None
    path, tokenizer = context.baseline, load_tokenizer(context.baseline)
    blocks = make_blocks(context.splits.search, context.prompt, tokenizer, section.block)
    dtype = _dtype(context)
    rows = batch_size_of(context.recipe.resources, layout)

    def compute(works: list[Work]) -> Iterable[tuple[Work, list[dict[str, Any]]]]:
        together = pieces(works, rows, layout.workers, evaluator.expected, section.block)
        submit = lambda worker, piece: worker.do_together.remote(piece)  # noqa: E731
        for piece, lines in pool.run(together, submit, task, lambda piece: sum(map(evaluator.expected, piece))):
            yield from zip(piece, lines, strict=True)

    evaluator = LedgerEvaluator(
        path,
        fingerprint(path),
        blocks,
        objective,
        ledger,
        compute,
        pinned_backend(context, pool, task, blocks, dtype),
        dtype,
        decoding_of(context.prompt.chat, read_stop_rule(path, tokenizer, context.prompt.newline).stop),
        layout.gpus,
        section.seed,
        (lambda text: context.prompt.target_tokens(tokenizer, text)) if layout.gpus else None,
        heals_on(context, tokenizer),
        section.short_heal or ShortHeal(),
        progress.unit,
        # A GPU's step takes as long for one row as for a batch of them; a CPU's grows with every row.
        layout.workers * (rows if layout.gpus else section.block),
    )
    return evaluator


def _dtype(context: Context) -> str:
    section = context.recipe.search
    return context.dtype if section is None or section.dtype == "auto" else section.dtype


def heals_on(context: Context, tokenizer: Any) -> list[Example]:
    """What candidates are healed on for a few steps: training pairs, but those that the prompt shows."""
    section = context.recipe.search
    assert section is not None
    if not section.heals:
        return []
    pairs = choose(context.splits.train, [], "authentic", context.prompt.examples)
    examples = tokenise(pairs, context.prompt, tokenizer, MAX_HEAL_TOKENS)
    if not examples:
        raise UserError(
            f"search.short_heal: no training pair has at most {MAX_HEAL_TOKENS} tokens with its prompt and stands not "
            f"in the prompt itself: give more training text, or leave short_heal out"
        )
    return examples


def pinned_backend(context: Context, pool: Pool, task: Task, blocks: Sequence[Block], dtype: str) -> str:
    """The recipe's backend; for `auto` the quicker of both, timed once for a run and noted in search.json."""
    section = context.recipe.search
    assert section is not None
    if section.backend != "auto":
        return section.backend
    if "backend" not in _record(context):
        num_layers = stack_size(context.baseline)
        free = sorted(set(range(num_layers)) - protected_layers(section.protect, num_layers))
        views = [(), *((free[len(free) * k // 3],) for k in range(min(3, len(free))))]
        asked = blocks[0].requests[:TIMED_SENTENCES]
        path = str(context.baseline)
        work = [None]
        call = lambda worker, _: worker.choose_backend.remote(path, dtype, asked, views)  # noqa: E731
        ((_, choice),) = pool.run(work, call, task)
        timed = {"backend": choice.backend, "backend_seconds": choice.seconds, "backend_problems": choice.problems}
        context.rundir.write_json(RECORD, timed)
        context.reporter.line(choice.text())
    return _record(context)["backend"]


def _record(context: Context) -> dict[str, Any]:
    return context.rundir.read_json(RECORD) if context.rundir.exists(RECORD) else {}


class Progress:
    """What a search says while it runs: round, candidates alive, leader, units a second, time left."""

    def __init__(self, context: Context, task: Task, section: Section, target: Target) -> None:
        self.context, self.task, self.section, self.target = context, task, section, target
        self.reporter = context.reporter
        self.name = objective_name(section.objective)
        self.left = legs.remaining(target.num_layers + len(context.gone), context.gone)
        self.rounds, self.tried, self.units = 0, 0, 0
        self.note = "with all layers"
        self.started = time.monotonic()

    def baseline(self, score: Score) -> None:
        """The unpruned model is scored."""
        self.note = f"{self.name} {score.value:.1f} with all layers"
        self.task.beat(self.note)

    def unit(self, work: Work) -> None:
        """A piece of work is done."""
        self.units += 1
        if self.task.total is not None and self.task.done >= self.task.total:
            self.task.expect(self.task.done + 1)  # what is to come was only estimated
        pace = self.units / max(1e-3, time.monotonic() - self.started)
        self.task.advance(1, f"{self.note}, {pace:.1f} units/s")

    def look(self, told: dict[str, Any]) -> None:
        """Candidates were compared."""
        if "noise" in told:
            self.note = f"round {self.rounds + 1}: best {told['best']:.1f}, noise {told['noise']:.1f}"
            if (floor := self.section.decided_floor) != "keep":
                self.note += f": {'a short heal' if floor == 'heal' else 'the likelihood'} decides"
        else:
            self.note = (
                f"round {self.rounds + 1}: {told['alive']} alive after {told['sentences']} sentences, layer "
                f"{self.left[told['leader']]} leads with {told['score']:.1f}"
            )
        self.task.beat(self.note)

    def round(self, rounds: Sequence[Round]) -> None:
        """A decision was made: what is left is taken to cost as much a candidate as so far."""
        last = rounds[-1]
        self.rounds, self.tried = len(rounds), self.tried + len(last.candidates)
        self.note = f"round {self.rounds + 1}"
        left = num_evaluations(
            self.target.num_layers - len(last.gone), len(self.target.protected), self._rounds_left(last)
        )
        self.task.expect(self.task.done + left * self.units / max(1, self.tried))
        took, comes_back = (", ".join(str(self.left[i]) for i in layers) for layers in (last.removed, last.restored))
        back = f", {comes_back} comes back" if comes_back else ""
        without = [*self.context.gone, *(self.left[i] for i in last.gone)]
        score = f", {self.name} {last.score.value:.2f}" if last.score else ""
        self.reporter.line(f"round {self.rounds}: layer {took or 'none'} goes{back}{score} without {without}")

    def _rounds_left(self, last: Round) -> int:
        return max(0, self.target.most - len(last.gone)) if self.target.depths else 0


def depths_of(target: Target, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """For every depth that was asked for, and the last: layers that stay, and those removed, in order."""
    found: dict[int, Removed] = {}
    for r in rounds:
        if target.wanted(r.gone) or r is rounds[-1]:
            found[target.num_layers - len(r.gone)] = r.gone
    return [{"layers": layers, "removed": list(gone)} for layers, gone in sorted(found.items(), reverse=True)]


def write_plan(
    context: Context,
    num_layers: int,
    removed: Removed,
    rounds: Sequence[Round],
    baseline: Score | None,
    extra: dict[str, Any],
) -> None:
    """plan.json: `removed` in order and in the original model's numbers, and the record of every round."""
    context.rundir.write_json(
        "plan.json",
        {
            "schema": SCHEMA,
            "model": context.recipe.model.name,
            "fingerprint": fingerprint(context.baseline),
            "stack": stack_path(context.baseline),
            "num_layers": num_layers,
            "removed": list(removed),
            "baseline": baseline.as_dict() if baseline else None,
            "rounds": [r.as_dict() for r in rounds],
            "backend": None,
            "dtype": None,
            **extra,
        },
    )
