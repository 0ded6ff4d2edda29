"""The Ray cluster a run uses: one that is there, or one of its own on this machine."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylp.errors import UserError

if TYPE_CHECKING:
    from raylp.asks import Ask
    from raylp.recipe import Resources

# Ray counts logical CPUs. The engines' helper actors (Serve's controller, proxy and router, Ray Data's stages) ask for
# whole CPUs and mostly sleep; a small machine needs more logical CPUs than cores or they would wait for ever.
MIN_LOGICAL_CPUS = 8
OBJECT_STORE_BYTES = 512 * 1024**2
_own_node = ""  # id of the node of the Ray that `start` made last


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


def num_gpus() -> int:
    """GPUs torch can use here."""
    import torch

    return torch.cuda.device_count()


def worker_env() -> dict[str, str]:
    """Environment of every Ray worker. Models are local directories by then, so nothing is fetched from a hub."""
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Serve's controller kills a proxy that is not ready in 5 s; on a busy machine the imports alone take longer.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        # The controller looks at everything ten times a second by default, a twentieth of a slow core.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    }
    env = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        **{key: os.environ.get(key, value) for key, value in defaults.items()},
    }
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        env["VLLM_CPU_KVCACHE_SPACE"] = space
    return env


def use_token() -> None:
    """Shows Ray's token to a cluster that asks for one: `ray start` asks for it wherever a token file is."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def address_of(resources: "Resources") -> str | None:
    """The address of the Ray cluster to use, or None for a Ray of its own on this machine."""
    return resources.address or os.environ.get("RAY_ADDRESS") or None


def start(resources: "Resources") -> None:
    """Connects to `resources.address` or $RAY_ADDRESS, or starts a local Ray; nothing when already connected.

    Raises:
        UserError: the cluster at the address does not answer, or no Ray starts here.
    """
    global _own_node
    os.environ.setdefault("RAY_health_check_timeout_ms", "60000")
    os.environ.setdefault("RAY_health_check_failure_threshold", "20")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a checkpoint is taken at each, not at once
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray keeps as many idle workers as it has logical CPUs; each holds 100 MB and wakes a hundred times a second.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(cores()))
    # Workers are as nice as this command is; by default Ray puts them behind every program, its own servers among them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = address_of(resources)
    if address:
        use_token()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": worker_env()},
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
        "namespace": "raylp",
    }
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster answers at {address}: {error}; check resources.address", 1) from error
        return
    own = _of_its_own(resources)
    try:
        ray.init(
            address="local",  # without it, Ray would join any cluster that runs on this machine, and refuse num_cpus
            num_cpus=own["CPU"],
            num_gpus=own["GPU"],
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    except Exception as error:  # Ray has no class of its own for it; a machine with too much to do is the usual cause
        text = " ".join(str(error).split())
        raise UserError(
            f"Ray did not start on this machine: {text}; when it is less busy, the same command goes on", 1
        ) from error
    _own_node = ray.get_runtime_context().get_node_id()


def is_own() -> bool:
    """Whether the Ray this process is connected to is the one `start` made, not its caller's."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_node_id() == _own_node


def start_afresh(resources: "Resources") -> None:
    """As `start`; a Ray that `start` made is made anew, without the controllers that earlier stages' engines left."""
    if is_own():
        import ray

        ray.shutdown()
    start(resources)


def require(what: str, cpus: float, gpus: float = 0) -> None:
    """Refuses work that the cluster could never place; Ray would wait for ever and say nothing.

    Raises:
        UserError: with what is asked and what is there.
    """
    import ray

    _require(what, cpus, gpus, ray.cluster_resources(), is_own())


def require_early(resources: "Resources", asks: "Sequence[Ask]") -> None:
    """As `require`, before the work begins that ends with these: a Ray of its own is not started for that, a cluster is
    asked what it has.

    Raises:
        UserError: see `require`, and `start`.
    """
    if not asks:
        return
    import ray

    if own := address_of(resources) is None and (is_own() or not ray.is_initialized()):
        total = _of_its_own(resources)
    else:
        start(resources)
        total, own = ray.cluster_resources(), is_own()
    for what, cpus, gpus in asks:
        _require(what, cpus, gpus if total.get("GPU") else 0, total, own)


def _of_its_own(resources: "Resources") -> dict[str, int]:
    """Logical CPUs and GPUs of a Ray that `start` makes."""
    gpus = resources.gpus if resources.gpus is not None else num_gpus()
    return {"CPU": resources.cpus or max(MIN_LOGICAL_CPUS, cores()), "GPU": gpus}


def _require(what: str, cpus: float, gpus: float, total: Mapping[str, float], own: bool) -> None:
    for name, wanted, key in (("CPUs", cpus, "CPU"), ("GPUs", gpus, "GPU")):
        there = total.get(key, 0)
        if wanted > there:
            raises = own and key == "CPU"
            more = "raise resources.cpus (it may exceed the cores)" if raises else f"use a cluster with more {name}"
            raise UserError(
                f"{what} needs {wanted:g} {name}, the Ray cluster has {there:g}: lower the number of workers, engines "
                f"or models, or {more}"
            )


@contextmanager
def own_errors() -> Iterator[None]:
    """Raises a task's UserError as it was there: Ray wraps it together with its traceback."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from error


def num_nodes() -> int:
    """Machines of the cluster that are alive."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def on_head() -> bool:
    """Whether this process is on the cluster's head node."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def session_logs() -> str:
    """The directory of Ray's own logs in this session."""
    import ray

    return os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs") if ray.is_initialized() else ""
