"""The pool: longest first, stragglers and dead workers, models on GPUs by arithmetic, one copy of the weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle

from raylp.errors import UserError
from raylp.generate import schedule
from raylp.generate.layout import Layout, gpus_per_model, on_cpus, on_gpus, places_in
from raylp.generate.pool import Pool, Worker, plan_workers
from raylp.generate.schedule import Pace, efficiency, even, makespan, most_copies
from raylp.progress import Reporter, Task
from raylp.recipe import Resources

GB = 1e9
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


class Waiter(Worker):
    """Only waits; what it was given is noted in its log. It imports no torch, so that many of them start quickly."""

    def __init__(self, threads: int, newline: bool, log: str, batch_size: int | None = None) -> None:
        self.log = Path(log)

    def wait(self, seconds: float, name: str = "") -> tuple[str, int]:
        """`once-...` waits that long the first time only; `kill-once-...` and `kill-...` end the process."""
        first = not (self.log / name).exists()
        with (self.log / name).open("a") as stream:
            stream.write("x")
        if name.startswith("kill") and (first or "once" not in name):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds if first or "once" not in name else 0)
        return name, os.getpid()


def times_given(log: Path, name: str) -> int:
    return len((log / name).read_text()) if (log / name).exists() else 0


def submit(worker: Any, unit: tuple[float, str]) -> Any:
    return worker.wait.remote(*unit)


@pytest.fixture
def task() -> Iterator[Task]:
    with Reporter(quiet=True).task("wait") as task:
        yield task


@pytest.fixture
def pool_of(ray_session: None, tmp_path: Path) -> Iterator[Callable[[int], Pool]]:
    made = []

    def make(size: int) -> Pool:
        made.append(Pool(size, True, tmp_path, Waiter, cpus=0.01))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def test_longest_first(pool_of: Callable[[int], Pool], task: Task) -> None:
    units = [(0.0, f"u{i}") for i in range(7)]
    results = list(pool_of(1).run(units, submit, task, cost=lambda unit: -int(unit[1][1:]) % 4))
    assert [unit for unit, _ in results] == [units[i] for i in (1, 5, 2, 6, 3, 0, 4)]
    assert all(unit[1] == name for unit, (name, _) in results)


def test_a_straggler_is_given_to_an_idle_worker(
    pool_of: Callable[[int], Pool], task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "COPY_AFTER_S", 0.5)
    pool = pool_of(2)
    units = [(60.0, "once-slow"), *((0.05, f"u{i}") for i in range(8))]
    started = time.monotonic()
    found = [unit for unit, _ in pool.run(units, submit, task)]
    assert sorted(found) == sorted(units) and time.monotonic() - started < 30
    assert pool.copies == 1 and times_given(tmp_path, "once-slow") == 2
    # The one that still waits gets nothing more while the other does all the work.
    pids = {pid for _, (_, pid) in pool.run([(0.0, f"v{i}") for i in range(6)], submit, task)}
    assert len(pids) == 1


def test_dead_workers_units_go_elsewhere(pool_of: Callable[[int], Pool], task: Task, tmp_path: Path) -> None:
    pool = pool_of(2)
    before = set(map(id, pool.workers))
    units = [(0.1, "kill-once-0"), *((0.1, f"u{i}") for i in range(6)), (0.1, "kill-once-1")]
    results = list(pool.run(units, submit, task))
    assert sorted(unit for unit, _ in results) == sorted(units)
    assert len(pool.workers) == 2 and set(map(id, pool.workers)) != before
    with pytest.raises(UserError, match="died 5 times over the same sentences"):
        list(pool.run([(0.0, "kill-always")], submit, task))
    assert times_given(tmp_path, "kill-always") == 5


def test_what_nobody_waits_for_is_not_begun(pool_of: Callable[[int], Pool], task: Task, tmp_path: Path) -> None:
    pool = pool_of(1)
    running = pool.run([(0.3, f"u{i}") for i in range(6)], submit, task)
    next(running)
    running.close()
    assert [name for _, (name, _) in pool.run([(0.0, "after")], submit, task)] == ["after"]
    assert sum(times_given(tmp_path, f"u{i}") for i in range(6)) <= 2


def test_many_waiting_workers_keep_what_the_schedule_promises(pool_of: Callable[[int], Pool], task: Task) -> None:
    """10 workers over two rounds: with real actors the time is near that of the arithmetic."""
    import ray

    workers, rounds = 10, [40, 30]
    seconds = [0.2 + 0.02 * (i * 7 % 20) for i in range(sum(rounds))]
    pool = pool_of(workers)
    ray.get([worker.pid.remote() for worker in pool.workers])
    list(pool.run([(0.05, f"warm{i}") for i in range(2 * workers)], submit, task))
    started = time.monotonic()
    first = 0
    for count in rounds:
        units = [(seconds[i], f"r{i}") for i in range(first, first + count)]
        assert len(list(pool.run(units, submit, task, cost=lambda unit: unit[0]))) == count
        first += count
    measured = sum(seconds) / (workers * (time.monotonic() - started))
    promised = efficiency(seconds, rounds, workers)
    assert promised > 0.9 and measured > promised - 0.2
    assert pool.copies == 0


@pytest.mark.faults
def test_a_dead_nodes_units_go_elsewhere(tmp_path: Path) -> None:
    """Two nodes of one worker each; one is taken away, and there is no place for a new worker."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from test_pool import Waiter, submit
from raylp.generate.pool import Pool
from raylp.progress import Reporter
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
pool = Pool(2, True, Path({str(tmp_path)!r}), Waiter)
units = [(0.5, f"u{{i}}") for i in range(24)]
seen = []
with Reporter(quiet=True).task("wait") as task:
    for unit, (name, pid) in pool.run(units, submit, task):
        seen.append((name, pid))
        if len(seen) == 6:
            cluster.remove_node(other, allow_graceful=False)
names = [name for name, _ in seen]
assert sorted(names) == sorted(name for _, name in units), names
assert len({{pid for _, pid in seen[:6]}}) == 2 and len({{pid for _, pid in seen[12:]}}) == 1, seen
print("all there")
"""
    env = {**os.environ, "RAY_health_check_period_ms": "1000", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=env)
    # Ray's own words on the node that is gone may come at any moment, behind this line too.
    assert done.returncode == 0 and "all there" in done.stdout.splitlines(), done.stderr[-2000:]


# --- one copy of the weights ---


class Loader(Worker):
    """Measures what loading a model adds to its private memory."""

    def load(self, path: str, small: str) -> tuple[float, float]:
        """Bytes of private memory (USS) that loading adds, and a pass over all the weights besides.

        A small model of the family is loaded first: the libraries' own memory is not the weights'.
        """
        import psutil

        from raylp.models.load import load_model

        load_model(Path(small))(input_ids=torch.tensor([[1, 2, 3]]))
        process = psutil.Process()
        before = process.memory_full_info().uss
        self.model = load_model(Path(path))
        loaded = process.memory_full_info().uss
        with torch.inference_mode():
            for parameter in self.model.parameters():
                parameter.max()
        return loaded - before, process.memory_full_info().uss - before


def test_the_second_worker_shares_the_weights(ray_session: None, tmp_path: Path) -> None:
    import ray
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    toy.toy_tokenizer().save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 250e6
    pool = Pool(2, True, tmp_path, Loader, cpus=0.01)
    try:
        paths = str(tmp_path / "model"), str(toy.tiny_random("llama"))
        first, second = [ray.get(worker.load.remote(*paths)) for worker in pool.workers]
    finally:
        pool.close()
        (tmp_path / "model" / "model.safetensors").unlink()
    assert max(second) < 0.1 * size, f"{first} {second} of {size}"


# --- arithmetic ---


def test_models_on_gpus() -> None:
    assert on_gpus([8.0], 80 * GB, 16 * GB) == Layout(24, 1 / 3)
    assert on_gpus([8.0, 4.0], 24 * GB, 16 * GB) == Layout(12, 1.0)
    assert on_gpus([8.0, 3.0], 80 * GB, 140 * GB) == Layout(3, 3.0)
    assert on_gpus([1.0], 141 * GB, 0.5 * GB) == Layout(4, 0.25)
    assert on_gpus([2.0], 141 * GB, 0.5 * GB, workers=2) == Layout(2, 0.25)
    assert on_gpus([2.0], 141 * GB, 0.5 * GB, gpus_per_worker=1) == Layout(2, 1)
    assert on_gpus([2.0], 80 * GB, 16 * GB, gpus_per_worker=2) == Layout(1, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([2.0, 2.0], 80 * GB, 400 * GB), "400.0 GB of weights.*takes 6 GPUs.*2, 2 GPUs of 80 GB"),
        (([8.0], 80 * GB, 140 * GB, 4), "resources.workers: 4.*room for 2"),
        (([8.0], 80 * GB, 140 * GB, None, 1.0), "gpus_per_worker: 1.*takes 3 GPUs"),
        (([8.0], 80 * GB, 140 * GB, None, 3.5), "gpus_per_worker: 3.5.*whole number"),
        (([8.0], 2 * GB, 1 * GB), "has 2.0 GB of memory, 3.0 GB are needed"),
    ],
)
def test_models_that_have_no_place_are_refused_with_numbers(arguments: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        on_gpus(*arguments)


@given(st.floats(0.1, 500), st.floats(4, 200), st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_what_is_placed_fits(weights: float, memory: float, nodes: list[int]) -> None:
    share = gpus_per_model(weights * GB, memory * GB)
    per_gpu = weights / share + 3 if share >= 1 else (weights + 3) / share
    assert per_gpu <= 0.9 * memory + 1e-6
    for gpus in nodes:
        assert places_in(gpus, share) * share <= gpus + 1e-6


@given(st.integers(0, 3000), st.integers(1, 300), st.integers(1, 64))
def test_every_worker_gets_as_many_pieces(count: int, most: int, workers: int) -> None:
    size = even(count, most, workers)
    assert 1 <= size <= most
    pieces = -(-count // size)
    assert -(-pieces // workers) == -(-count // (most * workers)), "no more turns than needed"
    assert even(500, 128, 3) == 84


def test_models_on_cpus() -> None:
    assert on_cpus(8, 16 * GB, 2 * GB) == Layout(4)
    assert on_cpus(2, 16 * GB, 2 * GB) == Layout(2)
    assert on_cpus(8, 6.5 * GB, 2 * GB) == Layout(2)
    assert on_cpus(2, 16 * GB, 2 * GB, 6) == Layout(6)
    with pytest.raises(UserError, match=r"6 workers need about 14\.0 GB of memory, 8\.0 GB are free"):
        on_cpus(2, 8 * GB, 2 * GB, 6)
    assert on_cpus(8, 16 * GB, 2 * GB, shared=False) == Layout(4)
    assert on_cpus(8, 16 * GB, 4 * GB, shared=False) == Layout(2)
    with pytest.raises(UserError, match=r"3 workers need about 18\.0 GB"):
        on_cpus(8, 16 * GB, 4 * GB, 3, shared=False)
    with pytest.raises(UserError, match=r"the model needs about 18\.0 GB"):
        on_cpus(2, 8 * GB, 16 * GB)


def test_gpus_are_not_asked_of_a_cluster_without(ray_session: None) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("this cluster has GPUs")
    with pytest.raises(UserError, match="no GPU"):
        plan_workers(Resources(gpus_per_worker=0.5), GB)
    assert plan_workers(Resources(workers=2), 0.1 * GB) == Layout(2)


def test_makespan_and_efficiency() -> None:
    assert makespan([3, 3, 2, 2, 2], 2) == 7  # the classical case where longest first is not the best
    assert makespan([5], 64) == 5 and makespan([], 4) == 0
    assert efficiency([1.0] * 8, [4, 4], 4) == 1
    assert efficiency([1.0] * 10, [5, 5], 4) == 10 / (4 * 4)
    assert efficiency([2.0, 1.0, 1.0], [3], 2) == 1
    with pytest.raises(ValueError, match="rounds of 3 units together, but 2 times"):
        efficiency([1.0, 1.0], [3], 2)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=60), st.integers(1, 16))
def test_no_schedule_is_shorter_than_its_work(seconds: list[float], workers: int) -> None:
    span = makespan(seconds, workers)
    assert span >= max(max(seconds), sum(seconds) / workers) - 1e-9
    assert span <= sum(seconds) / workers + max(seconds) + 1e-9
    assert 0 < efficiency(seconds, [len(seconds)], workers) <= 1 + 1e-9


def test_the_published_loop_on_64_gpus() -> None:
    """32 to 16 layers, blocks of 16 sentences, alike: whole waves of 64 are the loss, less with more sentences."""
    candidates = range(30, 14, -1)
    shares = {}
    for blocks in (8, 13, 32, 64):
        rounds = [count * blocks for count in candidates]
        shares[blocks] = efficiency([1.0] * sum(rounds), rounds, 64)
    assert shares[8] < shares[13] < shares[32] < shares[64] and shares[32] > 0.9


def test_who_is_late() -> None:
    pace = Pace()
    for _ in range(2):
        pace.done(2.0, 20.0)
    assert not pace.late(1.0, 1e6)
    pace.done(1.0, 10.0)
    assert not pace.late(2.0, 59.0) and pace.late(2.0, 61.0)
    assert not pace.late(0.1, 19.0) and pace.late(0.1, 21.0)
    assert [most_copies(n) for n in (1, 19, 20, 100)] == [1, 1, 2, 6]


def test_worker_notes_what_it_generates(ray_session: None, toy_checkpoint: Path, tmp_path: Path, task: Task) -> None:
    """A draft goes through the pool to the model, and outputs are those without."""
    from raylp.generate.base import Request
    from raylp.models.load import load_tokenizer

    tokenizer = load_tokenizer(toy_checkpoint)
    asked = [Request(tuple(tokenizer(f"{row['source']} =").input_ids), 16) for row in toy.toy_pairs(4, 5)]
    pool = Pool(1, True, tmp_path)

    def ask(worker: Any, drafts: Any) -> Any:
        return worker.translate.remote(str(toy_checkpoint), "transformers", "float32", asked, (1,), False, drafts)

    try:
        ((_, (plain, _)),) = pool.run([None], ask, task)
        ((_, (drafted, _)),) = pool.run([[output.tokens for output in plain]], ask, task)
    finally:
        pool.close()
    assert drafted == plain
    notes = [json.loads(line) for file in tmp_path.glob("generations-*") for line in file.read_text().splitlines()]
    assert [(note["removed"], note["sentences"]) for note in notes] == [([1], 4), ([1], 4)]
