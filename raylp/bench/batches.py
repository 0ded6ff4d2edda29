"""Sentences given to an engine itself, many at once and without an endpoint, as in offline translation."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from raylp import cluster
from raylp.bench.config import RESIDENT_CPUS
from raylp.bench.load import Load, Measurement
from raylp.bench.meters import EnergyMeter, MemoryMeter
from raylp.errors import UserError
from raylp.generate.base import NEVER, Request
from raylp.generate.pool import START_S, Worker

GONE_S = 30.0


class BatchWorker(Worker):
    """Holds one model, and tells what a batch of requests took it."""

    def start(self, path: str, backend: str, dtype: str, room: int) -> float:
        """Loads the model; the seconds that took."""
        started = time.perf_counter()
        self.hold(path, backend, dtype, room=room, at_once=self.batch_size)
        return time.perf_counter() - started

    def answer(self, requests: Sequence[Request], exactly: bool) -> tuple[float, int]:
        """Seconds, and tokens of all answers; `exactly`: each is as long as it may be."""
        generator = self.generator
        assert generator is not None, "started before"
        generator.forget()
        rule = generator.rule
        generator.rule = NEVER if exactly else rule
        try:
            started = time.perf_counter()
            outputs = generator.generate(requests)
            return time.perf_counter() - started, sum(len(output.tokens) for output in outputs)
        finally:
            generator.rule = rule

    def watch_memory(self) -> None:
        """What `memory` tells is from now on."""
        import torch

        self._memory = MemoryMeter(lambda: [psutil.Process()])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int | None]:
        """The most bytes since `watch_memory`: `memory_bytes`, and `gpu_bytes` set aside on a GPU."""
        import torch

        found = {"memory_bytes": self._memory.peak()}
        if torch.cuda.is_available():
            found["gpu_bytes"] = torch.cuda.max_memory_reserved()
        return found


@contextmanager
def resident(models: Sequence[str], gpus: float, newline: bool, log: Path, most: int) -> Iterator[dict[str, Any]]:
    """A worker for each model, by name, which computes at most `most` rows at a time; gone after the block.

    Raises:
        UserError: the cluster has no place for them all.
    """
    import ray

    cluster.require(f"holding {len(models)} models for bench.batches", RESIDENT_CPUS * len(models), gpus * len(models))
    options = {"num_cpus": RESIDENT_CPUS, "num_gpus": gpus, "runtime_env": {"env_vars": cluster.worker_env()}}
    actor = ray.remote(BatchWorker).options(**options)
    workers = {name: actor.remote(cluster.cores(), newline, str(log), most) for name in models}
    try:
        try:
            pids = ray.get([worker.pid.remote() for worker in workers.values()], timeout=START_S)
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"bench.batches: the cluster had no place for {len(models)} models in {START_S:.0f} s, though it is "
                f"large enough: end other work on it, or name fewer bench.models",
                1,
            ) from None
        processes = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(pid))
        yield workers
    finally:
        for worker in workers.values():
            ray.kill(worker)
    if cluster.num_nodes() == 1:  # their memory is free when they are gone
        psutil.wait_procs(processes, GONE_S)


def check_room(needed: Mapping[str, float], available: float) -> None:
    """Refuses a start that would end with a process killed for memory; bytes, by model.

    Raises:
        UserError: with what is needed and what there is.
    """
    total = sum(needed.values())
    if total > available:
        raise UserError(
            f"bench.batches holds {', '.join(needed)} in memory together, about {total / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are free: name fewer bench.models, or close other programs"
        )


def measure_batch(
    worker: Any,
    load: Load,
    requests: Sequence[Request],
    exactly: bool,
    on_part: Callable[[int], None],
    on_gpus: bool = False,
) -> dict[str, Any]:
    """One measurement: all `requests`, as many at once as the load says; `on_part` is told how many were answered."""
    import ray

    row: dict[str, Any] = {"time": time.time(), "load": os.getloadavg()[0]}
    ray.get(worker.watch_memory.remote())
    meter, seconds, tokens, size = EnergyMeter.of(cluster.num_nodes(), on_gpus), 0.0, 0, int(load.value)
    for first in range(0, len(requests), size):
        part = list(requests[first : first + size])
        took, made = ray.get(worker.answer.remote(part, exactly))
        seconds, tokens = seconds + took, tokens + made
        on_part(len(part))
    row |= {"joules": meter.joules(), "energy_source": meter.source, **ray.get(worker.memory.remote())}
    inputs = sum(len(request.tokens) for request in requests)
    counts = {"requests": len(requests), "tokens": tokens, "input_tokens": inputs}
    return {**row, "measurement": Measurement([], [], seconds, counts).as_dict()}
