"""Resident models on a Ray cluster: work is handed out as workers become free, and outlives the workers."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.errors import UserError
from raylp.generate.base import Generator, Output, Request
from raylp.progress import Task
from raylp.recipe import Resources

MAX_TRIES = 3
IN_FLIGHT = 2  # one unit in work and one waiting, so that a worker is never idle between two
BEAT_S = 2.0
WORKER_BYTES = 1.2e9  # interpreter, libraries, activations and cache of a worker with a small model


def make_generator(
    path: Path, backend: str, dtype: str, newline: bool, batch_size: int = 16, skippable: bool = False
) -> Generator:
    """The model in `path`, resident in this process."""
    if backend == "vllm":
        from raylp.generate.vllm_engine import VLLMGenerator

        return VLLMGenerator(path, dtype, newline=newline, skippable=skippable)
    import torch

    from raylp.generate.transformers_view import TransformersGenerator
    from raylp.models.load import load_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersGenerator(load_model(path, dtype, device), load_tokenizer(path), newline, batch_size)


class Worker:
    """Runs in a Ray actor. Holds one model at a time; `threads` are torch's. Every use of the engine is noted first."""

    def __init__(self, threads: int, newline: bool, log: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self.newline = newline
        self.log = Path(log)
        self.log.mkdir(parents=True, exist_ok=True)
        self.loaded: tuple[Any, ...] | None = None
        self.generator: Generator | None = None

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
    ) -> tuple[list[Output], float]:
        """Outputs, and the seconds they took without loading."""
        wanted = (path, backend, dtype, skippable)
        if self.loaded != wanted:
            if self.generator is not None and hasattr(self.generator, "close"):
                self.generator.close()
            self.generator = None
            self.generator = make_generator(Path(path), backend, dtype, self.newline, skippable=skippable)
            self.loaded = wanted
        assert self.generator is not None
        with (self.log / f"generations-{os.getpid()}.jsonl").open("a") as stream:
            stream.write(json.dumps({"path": path, "removed": list(removed), "sentences": len(requests)}) + "\n")
        started = time.perf_counter()
        outputs = self.generator.generate(requests, removed)
        return outputs, time.perf_counter() - started


def num_workers(resources: Resources, weights_bytes: float) -> int:
    """How many resident models: as asked, else one a GPU, or one for each core of a CPU up to 4 as memory allows."""
    import psutil
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    room = psutil.virtual_memory().available
    if resources.workers != "auto":
        cluster.require(f"resources.workers: {resources.workers}", resources.workers)
        needed = weights_bytes + resources.workers * WORKER_BYTES
        if gpus == 0 and needed > room:
            raise UserError(
                f"{resources.workers} workers need about {needed / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are "
                f"free: lower resources.workers or close other programs"
            )
        return resources.workers
    if gpus:
        return gpus
    if weights_bytes + WORKER_BYTES > room:
        raise UserError(
            f"the model needs about {(weights_bytes + WORKER_BYTES) / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are "
            f"free: close other programs or take a smaller model"
        )
    return int(max(1, min(cluster.cores(), 4, (room - weights_bytes) // WORKER_BYTES)))


class Pool:
    """`size` workers of the class `kind`, which share the machine's cores (or GPUs) evenly."""

    def __init__(self, size: int, newline: bool, log: Path, kind: type[Worker] = Worker) -> None:
        import ray

        gpus = ray.cluster_resources().get("GPU", 0)
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0}
        if gpus:
            options["num_gpus"] = min(1.0, gpus / size)
        threads = max(1, cluster.cores() // size)
        self._start: Callable[[], Any] = lambda: ray.remote(kind).options(**options).remote(threads, newline, str(log))
        self.workers = [self._start() for _ in range(size)]

    def run(self, units: Iterable[Any], submit: Callable[[Any, Any], Any], task: Task) -> Iterator[tuple[Any, Any]]:
        """Yields (unit, result) as they finish. `submit(worker, unit)` makes the remote call.

        A unit whose worker dies goes to a new worker, three times at most.

        Raises:
            UserError: a unit's worker died three times.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = list(units)[::-1]
        flying: dict[Any, tuple[Any, Any]] = {}
        tries: dict[int, int] = {}
        while waiting or flying:
            for worker in self.workers:
                while waiting and sum(w is worker for w, _ in flying.values()) < IN_FLIGHT:
                    unit = waiting.pop()
                    flying[submit(worker, unit)] = (worker, unit)
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=BEAT_S)
            if not ready:
                task.beat()
            for reference in ready:
                worker, unit = flying.pop(reference)
                try:
                    result = ray.get(reference)
                except RayActorError as error:
                    tries[id(unit)] = tries.get(id(unit), 0) + 1
                    if tries[id(unit)] >= MAX_TRIES:
                        raise UserError(
                            f"a worker died {MAX_TRIES} times over the same sentences ({_first_line(error)}): most "
                            f"often memory is short; lower resources.workers",
                            1,
                        ) from error
                    if worker in self.workers:
                        self.workers[self.workers.index(worker)] = self._start()
                    waiting.append(unit)
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from error
                    raise
                else:
                    yield unit, result

    def close(self) -> None:
        import ray

        for worker in self.workers:
            with contextlib.suppress(Exception):
                ray.kill(worker)
        self.workers = []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
