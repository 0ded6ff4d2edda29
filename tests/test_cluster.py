"""Whose Ray it is: raylp makes its own anew, and leaves its caller's alone."""

import subprocess
import sys

SCRIPT = """
import ray
from raylp import cluster
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
"""


def test_only_its_own_ray_is_made_anew() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "own anew: True",
        "caller's kept: True",
        "it needs 2 CPUs, the Ray cluster has 1: lower the number of workers, engines or models, or use a cluster with "
        "more CPUs",
    ], done.stderr
