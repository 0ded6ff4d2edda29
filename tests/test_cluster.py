"""Whose Ray it is: raylp makes its own anew, and leaves its caller's alone."""

import os
import subprocess
import sys

import pytest

from raylp.asks import Ask, asks, to_measure
from raylp.cluster import own_errors
from raylp.errors import UserError
from raylp.recipe import parse_recipe

SCRIPT = """
import ray
from raylp import cluster
from raylp.asks import Ask
from raylp.recipe import Resources

def node():
    return ray.get_runtime_context().get_node_id()

cluster.start(Resources())
first = node()
cluster.start_afresh(Resources())
print("own anew:", node() != first)
ray.shutdown()
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
callers = node()
cluster.start_afresh(Resources())
print("caller's kept:", node() == callers)
try:
    cluster.require("it", 2)
except cluster.UserError as error:
    print(error)
cluster.require_early(Resources(), [Ask("fits", 1, 4)])
try:
    cluster.require_early(Resources(cpus=64), [Ask("fits", 1), Ask("it", 2)])
except cluster.UserError as error:
    print("early:", error)
ray.shutdown()
try:
    cluster.require_early(Resources(cpus=64), [Ask("fits", 64, 4), Ask("it", 65)])
except cluster.UserError as error:
    print("early, no Ray:", error)
print("still none:", not ray.is_initialized())
"""


def test_only_its_own_ray_is_made_anew() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "own anew: True",
        "caller's kept: True",
        "it needs 2 CPUs, the Ray cluster has 1: lower the number of workers, engines or models, or use a cluster with "
        "more CPUs",
        "early: it needs 2 CPUs, the Ray cluster has 1: lower the number of workers, engines or models, or use a "
        "cluster with more CPUs",
        "early, no Ray: it needs 65 CPUs, the Ray cluster has 64: lower the number of workers, engines or models, or "
        "raise resources.cpus (it may exceed the cores)",
        "still none: True",
    ], done.stderr


def test_what_stages_ask_is_known_from_the_recipe() -> None:
    content = {
        "model": "a/b",
        "data": {"en-de": {"test": "t.tsv"}},
        "search": {"remove": 3},
        "distill": {"engines": 2, "gpus_per_engine": 2},
        "heal": {"workers": 3},
        "quantize": {"models": ["healed", "pruned"], "schemes": ["w8a8", "nf4"]},
        "serve": {"cpus": 2, "replicas": 2},
        "bench": {"batches": [8], "backends": ["vllm", "transformers"]},
        "run_dir": "runs/x",
    }
    recipe = parse_recipe(content)
    assert to_measure(recipe) == ("baseline", "healed", "healed-w8a8", "healed-nf4")
    stages = ["search", "distill", "heal", "evaluate", "bench"]
    assert asks(recipe, [*stages, "heal"]) == [
        Ask("distill with 2 engines", 3, 4),
        Ask("heal with 3 workers", 3, 3),
        Ask("serving baseline, healed, healed-w8a8 for bench", 12.5),
        Ask("holding 3 models for bench.batches", 1.5),
    ]
    few = parse_recipe({**content, "resources": {"workers": 5}, "heal": {"when": "before"}, "bench": {"batches": []}})
    assert asks(few, ["search"]) == asks(few, ["search", "evaluate"]) == [Ask("resources.workers: 5", 5)]
    given = parse_recipe({**content, "resources": {"workers": 5}, "search": {"given": [3, 4]}})
    assert asks(given, ["search"]) == []
    assert to_measure(few) == ("baseline", "pruned", "pruned-w8a8", "pruned-nf4")
    named = parse_recipe({**content, "bench": {"models": ["healed-14", "healed-14-nf4"], "concurrency": [1]}})
    assert asks(named, ["bench"]) == [Ask("serving healed-14 for bench", 4.5)]


def test_a_ray_that_does_not_start_is_told_in_a_line() -> None:
    script = "from raylp import cluster; from raylp.recipe import Resources\ntry: cluster.start(Resources())\n"
    script += "except cluster.UserError as error: print(error)"
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_TMPDIR": "/proc/none"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("Ray did not start on this machine: ") and done.stdout.count("\n") == 1, done.stderr


def test_an_error_of_a_task_is_told_without_its_traceback(ray_session: None) -> None:
    import ray

    def fail(error: Exception) -> None:
        raise error

    task = ray.remote(fail)
    with pytest.raises(UserError) as told, own_errors():
        ray.get(task.remote(UserError("no room")))
    assert str(told.value) == "no room"
    with pytest.raises(ray.exceptions.RayTaskError), own_errors():
        ray.get(task.remote(ValueError("a bug")))
