"""An OpenAI-compatible endpoint for the models of a run: Ray Serve in front, a vLLM engine for each model behind."""

import errno
import json
import logging
import math
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml

from raylp import cluster, machine
from raylp.context import Context
from raylp.data.languages import pair_of
from raylp.data.prompt import CHAT_OPTIONS
from raylp.errors import UserError
from raylp.generate.engine_log import error_lines
from raylp.generate.vllm_engine import (
    CPU_WORKER,
    cpu_environment,
    cpu_options,
    engine_options,
    kv_cache_bytes,
)
from raylp.models.checkpoint import sizes
from raylp.models.files import may_think
from raylp.models.load import max_positions, read_config
from raylp.names import choose_models
from raylp.quantize.engines import run_by, weights_bytes
from raylp.serve.config import INGRESS_CPUS, Serve
from raylp.serve.gate import key_hash, read_keys

APP = "raylp"
DEPLOYED = "raylp-deployed"  # what `serve deploy` runs from a file, which no driver may take for its own
HOLDER = "raylp-endpoint"
MARK = "VLLM_LOGGING_CONFIG_PATH"  # in the environment of every process of an engine, another for each model
BEAT_S = 2.0
LOOK_S = 10.0
PORT_PATIENCE_S = 5.0  # an endpoint whose driver was killed lets go of its port after about two seconds
# Measured with vLLM 0.29 on a CPU: the replica and its engine are two processes with torch and vllm in each, which hold
# tokenizers and logits besides (a model with 500 tokens takes 1.2 GB without weights and cache, one with 262144 takes
# 3.1 GB). Ingress, controller, proxy and Ray itself are the rest.
ENGINE_BYTES = 1.2e9
ENGINE_BYTES_PER_TOKEN = 7.5e3
SERVE_BYTES = 2.1e9
MIN_SEQUENCES = 16
SEQUENCES_PER_CORE = 4


def serve(context: Context, out: TextIO) -> None:
    """The models of the run on one endpoint until Ctrl-C or SIGTERM; one line on `out` says how to use it.

    Raises:
        UserError: see `endpoint`; or it was taken down from elsewhere.
    """
    config = context.recipe.serve
    models = served(config, context.models())
    stop = threading.Event()
    with ExitStack() as stack:
        with context.reporter.task("starting the endpoint") as task:
            url = stack.enter_context(endpoint(context, models, task.beat)).url
        print(usage(context, url, list(models)), file=out, flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        while not stop.wait(LOOK_S):
            if not _is_there():
                raise UserError("the endpoint was taken down from elsewhere (serve shutdown): start it again", 1)
        context.reporter.line("shutting the endpoint down")


def served(config: Serve, there: Mapping[str, Path]) -> dict[str, Path]:
    """The models that are asked for, or of all of them those that vLLM runs.

    Raises:
        UserError: the run has no such model, or vLLM does not run it.
    """
    return run_by("vllm", choose_models(config.models, there, "serve.models"), config.models is not None)


def usage(context: Context, url: str, names: Sequence[str]) -> str:
    """One line: where the endpoint is, what it serves, and a request to try, in the words of the run's prompt."""
    asked = context.prompt.ask("Hello", run_pairs(context)[0])
    body: dict[str, Any] = {"model": names[-1], "max_tokens": 16, "temperature": 0}
    if context.prompt.chat:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": asked}]
        if may_think(context.original):
            body["chat_template_kwargs"] = CHAT_OPTIONS
    else:
        path, body["prompt"], body["stop"] = "completions", asked, "\n"
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    key = "-H 'Authorization: Bearer KEY' " if context.recipe.serve.api_keys else ""
    example = f"curl {url}/v1/{path} {key}-H 'Content-Type: application/json' -d {data}"
    return f"{url}/v1  models: {', '.join(names)}  page: {url}/  try: {example}"


@dataclass(frozen=True)
class Endpoint:
    """`url`: without `/v1`; `ready_s`: how long each engine took to be ready, to two seconds, all starting at once.

    `marks`: of each engine, the value of `MARK` in the environment of its processes.
    """

    url: str
    ready_s: dict[str, float]
    marks: dict[str, str]


@contextmanager
def endpoint(
    context: Context, models: Mapping[str, Path], on_progress: Callable[[str], None] = lambda note: None
) -> Iterator[Endpoint]:
    """The models behind one endpoint while the block runs.

    Raises:
        UserError: the port is taken, CPUs, GPUs or memory are too few, or an engine does not start in time.
    """
    config = context.recipe.serve
    if cluster.address_of(context.recipe.resources) is None:
        free_port(config.host, config.port)  # no Ray is started for nothing
    cluster.start(context.recipe.resources)
    with nullcontext() if cluster.is_own() else _held(f"{context.rundir.root}, process {os.getpid()}"):
        _clear_leftovers()  # which would hold the port and the memory that are looked at next
        with _running(context, models, on_progress) as served:
            yield served


@contextmanager
def _running(context: Context, models: Mapping[str, Path], on_progress: Callable[[str], None]) -> Iterator[Endpoint]:
    """As `endpoint`, on a Ray that serves nothing."""
    import ray

    config = context.recipe.serve
    port = free_port(config.host, config.port)
    engines = len(models) * config.replicas
    gpus = engine_gpus(config, engines, ray.cluster_resources().get("GPU", 0))
    dtype = serve_dtype(config, context.recipe.model.dtype, gpus)
    what = f"serving {', '.join(models)} ({engines} engines)" if engines > 1 else f"serving {next(iter(models))}"
    if not cluster.on_head():
        raise UserError(
            f"{what}: the endpoint is on the cluster's head node, and this is another: start it there, or with "
            f"raylp submit"
        )
    cluster.require(what, config.num_cpus(len(models)), engines * gpus * config.tensor_parallel)
    if gpus == 0 and cluster.num_nodes() == 1:
        most = config.max_replicas or config.replicas
        weights = [most * weights_bytes(path, dtype) for path in models.values()]
        processes = SERVE_BYTES + sum(most * engine_bytes(path) for path in models.values())
        sequences = num_sequences(config)
        caches = sum(
            most * kv_cache_bytes(path, dtype, engine_length(config, path), sequences) for path in models.values()
        )
        check_memory(what, sum(weights), caches, processes, psutil.virtual_memory().available)
    logs = {name: context.rundir.logs() / f"serve-{name}.log" for name in models}
    url = f"http://{config.host}:{port}"
    marks = {name: _logging_file(log) for name, log in logs.items()}
    try:
        _deploy(context, models, dtype, gpus, logs, port)
        ready_s = _wait_until_ready(list(models), config.ready_timeout_s, logs, on_progress)
        try:
            yield Endpoint(url, ready_s, {name: str(mark) for name, mark in marks.items()})
        finally:
            _drain(config.drain_s)
    finally:
        _shut_down(port)
        for mark in marks.values():
            mark.unlink(missing_ok=True)


def serve_args(
    context: Context,
    models: Mapping[str, Path],
    dtype: str,
    gpus: float = 0,
    logs: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """What `raylp.serve.app.build` takes: plain data.

    `gpus` of each engine, 0 for the CPU; `logs`: the file each engine writes its log to (default: Ray's own).

    Raises:
        UserError: the file of API keys is not there or has none.
    """
    config = context.recipe.serve
    configs = []
    for name, path in models.items():
        env = cluster.worker_env()
        if logs is not None:
            env[MARK] = _logging_config(logs[name])
        engine: dict[str, Any] = {"dtype": dtype, "max_model_len": engine_length(config, path), **engine_options(path)}
        engine["tensor_parallel_size"] = config.tensor_parallel
        # No penalties or sampling but those that are asked for: what is served is what was scored.
        engine["generation_config"] = "vllm"
        if gpus:
            engine |= {"gpu_memory_utilization": 0.9 * min(gpus, 1), "max_num_seqs": 2 * config.target_ongoing_requests}
            bundle = {"CPU": 0, "GPU": gpus}
        else:
            engine |= cpu_options(path, dtype, engine_length(config, path), num_sequences(config))
            engine["worker_cls"] = CPU_WORKER
            env |= cpu_environment(engine_threads(config))
            bundle = {"CPU": 0}
        configs.append(
            {
                "model_loading_config": {"model_id": name, "model_source": str(path)},
                "accelerator_config": {"kind": "gpu" if gpus else "cpu"},
                "placement_group_config": {"bundle_per_worker": bundle},
                "deployment_config": {
                    "autoscaling_config": {
                        "min_replicas": config.replicas,
                        "initial_replicas": config.replicas,
                        "max_replicas": config.max_replicas or config.replicas,
                        "target_ongoing_requests": config.target_ongoing_requests,
                    },
                    "max_ongoing_requests": 2 * config.target_ongoing_requests,
                    "max_constructor_retry_count": 1,
                    "graceful_shutdown_timeout_s": config.drain_s,
                    "graceful_shutdown_wait_loop_s": 0.2,
                    "health_check_timeout_s": 60,
                    "ray_actor_options": {"num_cpus": config.cpus},
                },
                "engine_kwargs": engine,
                "runtime_env": {"env_vars": env},
                "callback_config": {"callback_class": "raylp.serve.callback.Prepare"},
                # Ray's default holds tokens back up to 50 ms and sends them bunched.
                "experimental_configs": {"stream_batching_interval_ms": 0},
                "log_engine_metrics": False,
            }
        )
    return {
        "llm_configs": configs,
        "ingress": {
            "num_replicas": 1,
            "graceful_shutdown_timeout_s": config.drain_s,
            "graceful_shutdown_wait_loop_s": 0.2,
            # The gate before it says when there are too many; here nothing may wait unseen.
            "max_ongoing_requests": 2 * config.max_waiting,
            "ray_actor_options": {"num_cpus": INGRESS_CPUS},
        },
        "gate": {
            "max_body_bytes": config.max_body_bytes,
            "max_waiting": config.max_waiting,
            "keys": [key_hash(key.encode()) for key in api_keys(config)],
        },
        "run": {
            "prompt": context.prompt.model_dump(mode="json"),
            "pairs": run_pairs(context),
            "models": {name: {"path": str(path), "layers": sizes(path)["layers"]} for name, path in models.items()},
            "slo": config.slo,
            "keys": config.api_keys is not None,
            "max_sentences": config.max_sentences,
            "max_waiting": config.max_waiting,
            "max_model_len": min(engine_length(config, path) for path in models.values()),
        },
    }


def run_pairs(context: Context) -> list[str]:
    """The language pairs of the recipe's data, each once."""
    data = context.recipe.data.items()
    return list(dict.fromkeys(pair_of(name, corpus.pair) for name, corpus in data))


def api_keys(config: Serve) -> list[str]:
    """Every key that may ask; none where the endpoint is open.

    Raises:
        UserError: the file of keys cannot be read or has none.
    """
    if config.api_keys is None:
        return []
    try:
        keys = read_keys(Path(config.api_keys).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serve.api_keys: {config.api_keys} cannot be read: {error}") from error
    if not keys:
        raise UserError(f"serve.api_keys: {config.api_keys} has no key: write one a line")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise UserError(f"serve.api_keys: {config.api_keys}: no client can send such a key; use ASCII letters, digits")
    return keys


def deploy_file(context: Context) -> str:
    """The endpoint as a file for `serve deploy`, or for the `serveConfigV2` of a RayService.

    Raises:
        UserError: the run has no such model.
    """
    config = context.recipe.serve
    models = served(config, context.models())
    engines = len(models) * config.replicas
    if config.port == 0:
        raise UserError("serve.port: 0 means any free port, which a file for a cluster cannot say: choose one")
    gpus = engine_gpus(config, engines, cluster.num_gpus())
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {
                "name": DEPLOYED,
                "route_prefix": "/",
                "import_path": "raylp.serve.app:build",
                "args": serve_args(context, models, serve_dtype(config, context.recipe.model.dtype, gpus), gpus),
            }
        ],
    }
    seen = f"{gpus:g} GPUs for each, as for the {cluster.num_gpus()} of this machine" if gpus else "no GPU, as here"
    notes = (
        f"# {engines} engines, {seen}; for another cluster: --set serve.gpus=1\n"
        f"# It listens on {config.host}; behind a Kubernetes service: --set serve.host=0.0.0.0, and serve.api_keys.\n"
        f"# Every node needs raylp, and the models under the same paths.\n"
    )
    return notes + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def engine_gpus(config: Serve, engines: int, total: float) -> float:
    """GPUs of each worker of an engine; `total`: of the cluster.

    Raises:
        UserError: weights are to be spread over GPUs that are not there, or over parts of them.
    """
    share = gpu_share(config.gpus, engines * config.tensor_parallel, total)
    if config.tensor_parallel > 1 and (share < 1 or share % 1):
        raise UserError(
            f"serve.tensor_parallel: {config.tensor_parallel} GPUs for each of {engines} engines, there are "
            f"{total:g}: serve fewer models, or set it to 1"
        )
    return share


def serve_dtype(config: Serve, model_dtype: str, gpus: float) -> str:
    """The data type of weights and activations in the engines.

    `model_dtype`: as the recipe has it, and not as this machine would compute: the GPUs may be on others.
    """
    if config.dtype != "auto":
        return config.dtype
    if gpus:
        return "bfloat16" if model_dtype == "auto" else model_dtype
    return "bfloat16" if machine.computes_bfloat16() else "float32"


def engine_length(config: Serve, path: Path) -> int:
    """Tokens of a prompt and its answer that an engine with the model in `path` takes."""
    return min(config.max_model_len, max_positions(path) or config.max_model_len)


def gpu_share(wanted: float | str, engines: int, total: float) -> float:
    """GPUs of each engine: as asked, else one, or 1/k of one where k engines must share it; 0 where there are none."""
    if not isinstance(wanted, str):
        return wanted
    if total < 1:
        return 0
    return 1 if engines <= total else 1 / math.ceil(engines / int(total))


def free_port(host: str, port: int, patience_s: float = PORT_PATIENCE_S) -> int:
    """`port` if nobody listens there, or stops to within `patience_s`; any free one for 0.

    Raises:
        UserError: the port is taken, or the host is not this machine.
    """
    deadline = time.monotonic() + patience_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return int(probe.getsockname()[1])
            except OSError as error:
                if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                raise UserError(
                    f"serve.port: {host}:{port} cannot be used ({error.strerror}): stop what listens there, or choose "
                    f"another port with --set serve.port=8001 (0 takes any free one)"
                ) from error


def num_sequences(config: Serve) -> int:
    """Requests an engine on a CPU computes at a time; more wait. Beyond a few for each core all only get slower."""
    return min(2 * config.target_ongoing_requests, max(MIN_SEQUENCES, SEQUENCES_PER_CORE * cluster.cores()))


def engine_threads(config: Serve) -> int:
    """Threads of an engine on a CPU: the cores, shared by a model's replicas; `serve.cpus` if that is more.

    Ray would give a replica with one CPU one thread. How many models there are changes nothing, so that the speed of
    one does not depend on who else is served and waits.
    """
    return max(1, int(config.cpus), cluster.cores() // config.replicas)


def engine_bytes(path: Path) -> float:
    """Memory the processes of one CPU engine take, without weights and key-value cache."""
    return ENGINE_BYTES + ENGINE_BYTES_PER_TOKEN * read_config(path).get_text_config(decoder=True).vocab_size


def check_memory(what: str, weights: float, kv_cache: float, processes: float, available: float) -> None:
    """Refuses a start that would end with a process killed for memory; sizes in bytes.

    Raises:
        UserError: with what is needed and what there is.
    """
    needed = weights + kv_cache + processes
    if needed > available:
        raise UserError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory (weights {weights / 1e9:.1f}, key-value caches "
            f"{kv_cache / 1e9:.1f}, processes {processes / 1e9:.1f}), {available / 1e9:.1f} GB are free: serve fewer "
            f"models (--set 'serve.models=[healed]') or replicas at a time, or close other programs"
        )


def _deploy(
    context: Context, models: Mapping[str, Path], dtype: str, gpus: float, logs: Mapping[str, Path], port: int
) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # importing ray.serve.llm imports vllm here too
    for name in ("ray.serve", "ray.llm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from ray import serve
    from ray.serve import RunTarget

    for log in logs.values():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    from raylp.serve.app import build

    app = build(serve_args(context, models, dtype, gpus, logs if cluster.num_nodes() == 1 else None))
    serve.start(proxy_location="HeadOnly", http_options={"host": context.recipe.serve.host, "port": port})
    serve.run_many([RunTarget(app, name=APP, route_prefix="/")], wait_for_applications_running=False)


def _is_there() -> bool:
    """Whether Serve still has the endpoint; yes where it is too busy to say."""
    from ray import serve
    from ray.exceptions import RayError

    try:
        return APP in serve.status().applications
    except (RayError, TimeoutError):
        return True


@contextmanager
def _held(owner: str) -> Iterator[None]:
    """The cluster's Serve for this driver alone, by an actor that ends with it however it ends.

    Raises:
        UserError: another driver that is alive holds it.
    """
    import ray

    class Holder:
        def owner(self) -> str:
            return owner

    holding = ray.remote(Holder).options(name=HOLDER, namespace="raylp", num_cpus=0)
    deadline = time.monotonic() + PORT_PATIENCE_S
    while True:
        try:
            holder = holding.remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            try:
                other = ray.get(ray.get_actor(HOLDER, "raylp").owner.remote(), timeout=BEAT_S)
            except (ValueError, ray.exceptions.RayError):
                other = "one that does not say which"
            raise UserError(
                f"this cluster already serves a run ({other}): stop that first, or use a Ray of its own (unset "
                f"resources.address and RAY_ADDRESS)"
            ) from None
    try:
        yield
    finally:
        ray.kill(holder)


def _clear_leftovers() -> None:
    """A driver that was killed on a lasting cluster leaves its Serve behind. Somebody else's is left alone.

    Only for a driver that holds the cluster's Serve (`_held`), or has a Ray of its own.

    Raises:
        UserError: the cluster's Serve has other applications.
    """
    from ray import serve

    others = [name for name in serve.status().applications if name != APP]
    if others:
        raise UserError(
            f"Ray Serve on this cluster already serves {', '.join(others)}: stop it with `serve shutdown`, or use a "
            f"Ray of its own (unset resources.address and RAY_ADDRESS)"
        )
    serve.shutdown()


def _wait_until_ready(
    names: Sequence[str], timeout_s: float, logs: Mapping[str, Path], on_progress: Callable[[str], None]
) -> dict[str, float]:
    """Seconds after which each engine was seen to be ready."""
    from ray import serve

    started = time.monotonic()
    ready_s: dict[str, float] = {}
    while True:
        status = serve.status().applications[APP]
        waiting = [n for n in names if _state(status, n) != "HEALTHY"]
        seconds = time.monotonic() - started
        ready_s |= {name: round(seconds, 1) for name in names if name not in (*waiting, *ready_s)}
        if status.status == "RUNNING":
            return ready_s
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise UserError(_why(status, waiting, logs), 1)
        if seconds > timeout_s:
            raise UserError(
                f"the endpoint was not ready after {seconds:.0f} s (serve.ready_timeout_s): still waiting for "
                f"{', '.join(waiting) or 'the ingress'}; {_why(status, waiting, logs)}",
                1,
            )
        on_progress(f"starting {', '.join(waiting)}" if waiting else "starting the ingress")
        time.sleep(BEAT_S)


def _state(status: Any, name: str) -> str:
    found = [d.status for key, d in status.deployments.items() if key == _deployment(name)]
    return str(found[0].value) if found else "MISSING"


def _deployment(name: str) -> str:
    """What Ray Serve calls the engine of a model."""
    return f"LLMServer:{name.replace('.', '_')}"


def _why(status: Any, waiting: Sequence[str], logs: Mapping[str, Path]) -> str:
    """What the first engine that failed wrote last about it, and where to read more."""
    for name in waiting:
        log = logs[name]
        messages = [deployment.message for key, deployment in status.deployments.items() if key == _deployment(name)]
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = error_lines(text) or error_lines("\n".join(messages)) or error_lines(status.message)
        if lines:
            return f"model {name}: {lines[-1][:300]} (log: {log if text else cluster.session_logs()})"
    return f"{status.message or 'no engine reported an error'} (logs: {', '.join(str(logs[n]) for n in waiting)})"


def _drain(most_s: float) -> None:
    """Lets nothing new in, and waits until what is at work is answered, or `most_s` are over."""
    from ray import serve

    deadline = time.monotonic() + most_s
    try:
        handle = serve.get_app_handle(APP)
        while time.monotonic() < deadline:
            try:
                if handle.drain.remote().result(timeout_s=5) == 0:
                    return
            except TimeoutError:  # it is busy
                continue
            time.sleep(0.2)
    except Exception as error:  # whatever keeps it from draining, it is shut down next
        logging.getLogger(__name__).debug("not drained: %s", error)


def _shut_down(port: int) -> None:
    """Serve off, and the port free again: the proxy lets go of it a moment later."""
    from ray import serve

    serve.shutdown()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)


def _logging_config(log: Path) -> str:
    """A file that sends vLLM's log of all processes of an engine to `log`; its path."""
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "line"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    path = _logging_file(log)
    path.write_text(json.dumps(config))
    return str(path)


def _logging_file(log: Path) -> Path:
    """Another for each driver: two may serve one run at a time, and by this their engines are told apart."""
    return log.with_name(f".{log.stem}-logging-{os.getpid()}.json")
