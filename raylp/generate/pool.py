"""Resident models on a Ray cluster: work is handed out as workers become free, and outlives the workers."""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.errors import UserError
from raylp.generate.auto import Choice, choose_backend, close, free_memory
from raylp.generate.base import VLLM_LENGTH, Asked, Generator, Output, Request
from raylp.generate.layout import Layout, on_cpus, on_gpus
from raylp.generate.schedule import Pace, most_copies
from raylp.progress import Task
from raylp.quantize.engines import check_engine
from raylp.recipe import Resources

MAX_TRIES = 5  # workers lost over one unit: with fewer, kills from outside pass for a unit that kills its worker
MAX_STARTS = 3  # workers in a row that die before they are up
IN_FLIGHT = 2  # one unit in work and one waiting, so that a worker is never idle between two
SPARE = 3  # with fewer left for each worker, none waits behind another: it might be behind a long one
BEAT_S = 2.0
MOST_SORTED = 4096  # waiting units; sorting more of them after every result would take longer than it saves
START_S = 600.0  # a cluster without one worker that is up for so long has no place for any


def make_generator(
    path: Path,
    backend: str,
    dtype: str,
    newline: bool,
    batch_size: int | None = None,
    skippable: bool = False,
    gpus: float = 1.0,
    room: int = 0,
    at_once: int | None = None,
) -> Generator:
    """The model in `path`, resident in this process, which may use `gpus` GPUs or that share of one.

    `room`: tokens that a prompt and its translation may have together, where an engine sets them aside. Rows that are
    computed at a time at most: `batch_size` in transformers, `at_once` in vLLM.

    Raises:
        UserError: the backend cannot load the model, or not onto several GPUs.
    """
    check_engine(path, backend)
    if backend == "vllm":
        from raylp.generate.vllm_engine import GPU_MEMORY, VLLMGenerator

        if gpus > 1:
            raise UserError(f"model {path}: an engine of vLLM in a worker has one GPU: use backend transformers")
        share = GPU_MEMORY * (gpus or 1.0)
        length = max(VLLM_LENGTH, room)
        return VLLMGenerator(path, dtype, newline, length, skippable, share, at_once)
    import torch

    from raylp.generate.transformers_view import TransformersGenerator
    from raylp.models.load import load_model, load_tokenizer

    several = torch.cuda.device_count() > 1 and gpus > 1
    model = load_model(path, dtype, "cuda" if torch.cuda.is_available() and not several else "cpu")
    if several:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        # Weights first lie in the file's memory map; whole layers then go to each GPU.
        whole = list(model._no_split_modules or [])
        memory = get_balanced_memory(model, no_split_module_classes=whole)
        model = dispatch_model(model, infer_auto_device_map(model, memory, no_split_module_classes=whole))
    return TransformersGenerator(model, load_tokenizer(path), newline, batch_size, gpu_share=min(1.0, gpus or 1.0))


class Worker:
    """Runs in a Ray actor. Holds one model at a time; `threads` are torch's. Every use of the engine is noted first."""

    def __init__(self, threads: int, newline: bool, log: str, batch_size: int | None = None) -> None:
        import torch

        torch.set_num_threads(threads)
        self.newline, self.batch_size = newline, batch_size
        self.log = Path(log)
        self.log.mkdir(parents=True, exist_ok=True)
        self.loaded: tuple[Any, ...] | None = None
        self.generator: Generator | None = None
        self.gpus, self.room = _gpus_of_this_actor(), 0

    def pid(self) -> int:
        return os.getpid()

    def translate(
        self,
        path: str,
        backend: str,
        dtype: str,
        requests: Sequence[Request],
        removed: Sequence[int] = (),
        skippable: bool = False,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[Output], float]:
        """Outputs, and the seconds they took without loading."""
        (outputs,), seconds = self.translate_together(path, backend, dtype, [(requests, removed, drafts)], skippable)
        return outputs, seconds

    def translate_together(
        self, path: str, backend: str, dtype: str, asked: Sequence[Asked], skippable: bool = False, room: int = 0
    ) -> tuple[list[list[Output]], float]:
        """Outputs of several views, at once as far as the backend can, and the seconds that all took."""
        generator = self.hold(path, backend, dtype, skippable, room)
        with (self.log / f"generations-{os.getpid()}.jsonl").open("a") as stream:
            for requests, removed, _ in asked:
                note = {"path": path, "removed": list(removed), "sentences": len(requests)}
                stream.write(json.dumps(note) + "\n")
        started = time.perf_counter()
        outputs = generator.generate_together(asked)
        return outputs, time.perf_counter() - started

    def hold(
        self, path: str, backend: str, dtype: str, skippable: bool = False, room: int = 0, at_once: int | None = None
    ) -> Generator:
        """The model, resident from now on; another one is let go, and one with too little `room`."""
        wanted = (path, backend, dtype, skippable)
        small = backend == "vllm" and room > max(self.room, VLLM_LENGTH)
        if self.loaded != wanted or self.generator is None or small:
            self._unload()
            self.generator = make_generator(
                Path(path), backend, dtype, self.newline, self.batch_size, skippable, self.gpus, room, at_once
            )
            self.loaded, self.room = wanted, room
        return self.generator

    def choose_backend(
        self, path: str, dtype: str, requests: Sequence[Request], removed_sets: Sequence[Sequence[int]]
    ) -> Choice:
        """The quicker backend for these sentences and views, timed in this worker. See `raylp.generate.auto`."""
        self._unload()

        def load(backend: str) -> Generator:
            skippable = backend == "vllm" and any(removed_sets)
            return make_generator(Path(path), backend, dtype, self.newline, self.batch_size, skippable, self.gpus)

        return choose_backend(load, requests, removed_sets)

    def _unload(self) -> None:
        if self.generator is not None:
            close(self.generator)
            self.generator = self.loaded = None
            free_memory()


def _gpus_of_this_actor() -> float:
    """GPUs, or the share of one, that Ray gave to the actor this runs in; 1 outside of Ray."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return 1.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))


def plan_workers(resources: Resources, weights_bytes: float, shared: bool = True) -> Layout:
    """How many resident models of `weights_bytes`, and the GPUs of each: as the recipe says, else what fits.

    Several small models share a GPU; a model larger than a GPU takes several of one node.

    Raises:
        UserError: the cluster has not what was asked, or no place for the model; with the numbers.
    """
    import psutil
    import ray

    asked = None if resources.workers == "auto" else resources.workers
    gpus = [node["Resources"]["GPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if asked is not None:
        cluster.require(f"resources.workers: {asked}", asked)
    if not gpus:
        if resources.gpus_per_worker != "auto":
            raise UserError("resources.gpus_per_worker: the Ray cluster has no GPU: leave it out")
        return on_cpus(cluster.cores(), psutil.virtual_memory().available, weights_bytes, asked, shared)
    share = None if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    found = on_gpus(gpus, _gpu_bytes(), weights_bytes, asked, share)
    return Layout(min(found.workers, max(1, int(ray.cluster_resources().get("CPU", 1)))), found.gpus)


def batch_size_of(resources: Resources, layout: Layout) -> int:
    """Sentences that a resident model translates at once, as the recipe says or as its device takes."""
    from raylp.generate.transformers_view import ROWS

    return ROWS["cuda" if layout.gpus else "cpu"] if resources.batch_size == "auto" else resources.batch_size


def _gpu_bytes() -> int:
    """Memory of one of the cluster's GPUs; they are taken to be alike."""
    import ray

    def ask() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    return ask() if cluster.num_gpus() else int(ray.get(ray.remote(ask).options(num_gpus=0.01).remote()))


@dataclass(eq=False)
class _Member:
    """A worker. `starting` is there until it is up; `queue`: its calls in order, the first in work since `since`."""

    actor: Any
    starting: Any
    queue: list[Any] = field(default_factory=list)
    since: float = 0.0
    dead: bool = False


@dataclass(eq=False)
class _Job:
    """A unit on its way. `cost`: what it should take, as first thought; `flying`: in how many queues it is.

    `tries`: how many workers have died over it.
    """

    unit: Any
    cost: float
    flying: int = 0
    tries: int = 0
    helped: bool = False
    over: bool = False


class Pool:
    """Workers of the class `kind`. `size`: how many, or a `Layout`; a mere number shares GPUs and cores evenly.

    `cpus`: logical CPUs of each; `batch_size`: sentences it translates at once (default: by its device). `copies`
    counts the units that were given to a second worker.
    """

    def __init__(
        self,
        size: int | Layout,
        newline: bool,
        log: Path,
        kind: type[Worker] = Worker,
        cpus: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        import ray

        if isinstance(size, int):
            size = Layout(size, min(1.0, ray.cluster_resources().get("GPU", 0) / size))
        options: dict[str, Any] = {"num_cpus": cpus, "max_restarts": 0}
        if size.gpus:
            options["num_gpus"] = size.gpus
        threads = max(1, cluster.cores() // size.workers)
        given = (threads, newline, str(log), batch_size)
        self._new: Callable[[], Any] = lambda: ray.remote(kind).options(**options).remote(*given)
        self._members = [self._start() for _ in range(size.workers)]
        self._flying: dict[Any, tuple[_Member, _Job]] = {}
        self._failed_starts = 0
        self._last_up = time.monotonic()
        self.copies = 0

    @property
    def workers(self) -> list[Any]:
        """The actors, those that are still starting included."""
        return [member.actor for member in self._members]

    def run(
        self,
        units: Iterable[Any],
        submit: Callable[[Any, Any], Any],
        task: Task,
        cost: Callable[[Any], float] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (unit, result) as they finish. `submit(worker, unit)` makes the remote call.

        `cost`: how long a unit should take, in any measure; the longest go first. As results come in it is asked again
        for what still waits: it may have learnt. A unit whose worker or node dies goes to another worker, three times
        at most. A unit that takes much longer than it should, while a worker is idle, is
        given to that one too, and the first result counts; see `raylp.generate.schedule` for when, and how often.

        Raises:
            UserError: a unit's worker died three times, or no worker comes up.
        """
        import ray

        jobs = [_Job(unit, cost(unit) if cost else 1.0) for unit in units]
        waiting = deque(sorted(jobs, key=lambda job: -job.cost))
        pace, left, copies = Pace(), len(jobs), most_copies(len(jobs))
        try:
            while left:
                self._hand_out(waiting, submit)
                if not waiting:
                    copies -= self._help_stragglers(pace, submit, waiting, copies)
                starting = [member.starting for member in self._members if member.starting is not None]
                ready, _ = ray.wait([*starting, *self._flying], num_returns=1, timeout=BEAT_S)
                if not ready:
                    task.beat()
                self._check_started()
                for reference in ready:
                    if reference not in self._flying:
                        self._up(reference)
                        continue
                    member, job = self._flying[reference]
                    in_work = member.queue[0] == reference and not member.dead
                    seconds = self._leave(reference)
                    result = self._result(reference, member, job, waiting, in_work)
                    if result is not None and not job.over:
                        job.over = True
                        left -= 1
                        pace.done(job.cost, seconds)
                        self._cancel(job)
                        yield job.unit, result[0]
                        if cost and len(waiting) <= MOST_SORTED:
                            waiting = deque(sorted(waiting, key=lambda job: -cost(job.unit)))
        finally:
            for job in jobs:  # what nobody waits for any more
                job.over = True
                self._cancel(job)

    def _start(self) -> _Member:
        actor = self._new()
        return _Member(actor, actor.pid.remote())

    def _hand_out(self, waiting: deque[_Job], submit: Callable[[Any, Any], Any]) -> None:
        """Every worker that is up gets a unit; a second one behind it only while enough are left for all."""
        for depth in range(IN_FLIGHT):
            for member in self._members:
                while waiting and waiting[0].over:  # its first worker has done it after all
                    waiting.popleft()
                enough = waiting and (depth == 0 or len(waiting) > SPARE * len(self._members))
                if enough and member.starting is None and len(member.queue) == depth:
                    self._give(member, waiting.popleft(), submit)

    def _give(self, member: _Member, job: _Job, submit: Callable[[Any, Any], Any]) -> None:
        reference = submit(member.actor, job.unit)
        if not member.queue:
            member.since = time.monotonic()
        member.queue.append(reference)
        job.flying += 1
        self._flying[reference] = (member, job)

    def _help_stragglers(self, pace: Pace, submit: Callable[[Any, Any], Any], waiting: deque[_Job], most: int) -> int:
        """Gives late units to idle workers too (at most `most`; how many). What is queued behind them waits anew."""
        import ray

        now = time.monotonic()
        idle = [member for member in self._members if member.starting is None and not member.queue]
        given = 0
        for member in self._members if idle else []:
            jobs = [self._flying[reference][1] for reference in member.queue]
            if not jobs or not pace.late(jobs[0].cost, now - member.since):
                continue
            if idle and given < most and not jobs[0].helped and not jobs[0].over:
                jobs[0].helped = True
                self._give(idle.pop(), jobs[0], submit)
                given += 1
            for reference, job in zip(member.queue[1:], jobs[1:], strict=True):
                if not job.helped and not job.over:
                    job.helped = True
                    ray.cancel(reference)  # it says so only when its turn comes, so nobody waits for the answer
                    waiting.append(job)
        self.copies += given
        return given

    def _leave(self, reference: Any) -> float:
        """The call is no longer with its worker; seconds that it was in work there."""
        member, job = self._flying.pop(reference)
        now = time.monotonic()
        seconds = now - member.since
        if member.queue[0] == reference:
            member.since = now
        member.queue.remove(reference)
        job.flying -= 1
        return seconds

    def _result(
        self, reference: Any, member: _Member, job: _Job, waiting: deque[_Job], in_work: bool
    ) -> tuple[Any] | None:
        """What the call gave; None where its worker died, and the unit waits again unless another has it.

        `in_work`: it was not queued behind another, so it may be why the worker died.
        """
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, TaskCancelledError

        try:
            return (ray.get(reference),)
        except TaskCancelledError:
            # Nobody waits for it, unless whoever was given it instead has died.
            if not (job.over or job.flying or job in waiting):
                waiting.append(job)
            return None
        except (RayActorError, ObjectLostError) as error:
            self._replace(member)
            job.tries += in_work
            member.dead = member.dead or in_work
            if job.over or job.flying or job in waiting:
                return None
            if job.tries >= MAX_TRIES:
                raise UserError(
                    f"a worker died {MAX_TRIES} times over the same sentences ({_first_line(error)}): most "
                    f"often memory is short; lower resources.workers",
                    1,
                ) from error
            waiting.appendleft(job)
            return None
        except RayTaskError as error:
            if job.over:
                return None
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise

    def _replace(self, member: _Member) -> None:
        """A new worker instead of a dead one; it gets units once it is up, which on a smaller cluster may be never."""
        if member in self._members:
            _kill(member.actor)
            self._members[self._members.index(member)] = self._start()

    def _up(self, reference: Any) -> None:
        """A worker has answered for the first time, or died before it could."""
        import ray
        from ray.exceptions import RayActorError

        member = next((member for member in self._members if member.starting == reference), None)
        if member is None:
            return
        try:
            ray.get(reference)
        except RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_STARTS:
                raise UserError(
                    f"workers die as they start ({_last_line(error)}): is this raylp on every node?",
                    1,
                ) from error
            self._replace(member)
        else:
            member.starting = None
            self._failed_starts = 0

    def _check_started(self) -> None:
        import ray

        now = time.monotonic()
        if any(member.starting is None for member in self._members):
            self._last_up = now
        elif now - self._last_up > START_S:
            there = {key: ray.available_resources().get(key, 0) for key in ("CPU", "GPU")}
            raise UserError(
                f"no worker has come up in {START_S:.0f} s; the cluster has {there['CPU']:g} CPUs and {there['GPU']:g} "
                f"GPUs free: end other work on it, or lower resources.workers or resources.gpus_per_worker",
                1,
            )

    def _cancel(self, job: _Job) -> None:
        """Takes the unit out of the queues it still is in; a worker that is already at it goes on to its end."""
        import ray

        if job.flying:
            for reference, (member, other) in self._flying.items():
                if other is job and reference != member.queue[0]:
                    ray.cancel(reference)

    def close(self) -> None:
        for member in self._members:
            _kill(member.actor)
        self._members = []
        self._flying = {}


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
