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
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from raylp import cluster
from raylp.bench.batches import check_room, measure_batch, resident
from raylp.bench.config import ENOUGH_REPEATS, Bench
from raylp.bench.ideal import Text, ideal
from raylp.bench.load import SEED, Answering, Load, Measurement, measure
from raylp.bench.meters import EnergyMeter, MemoryMeter
from raylp.bench.stats import mean_of_repeats, percentiles, ratio, verdict
from raylp.context import Context
from raylp.errors import UserError
from raylp.generate.base import Request
from raylp.generate.vllm_engine import CPU_BLOCK
from raylp.machine import SERVING, machine, versions
from raylp.models.checkpoint import sizes
from raylp.models.load import BYTES_PER_WEIGHT, load_tokenizer
from raylp.models.source import fingerprint
from raylp.names import choose_models, kind_of, whole_of
from raylp.quantize.engines import engine_of, weights_bytes
from raylp.rundir import RunDir
from raylp.serve.endpoint import (
    MARK,
    Endpoint,
    api_keys,
    endpoint,
    engine_bytes,
    engine_length,
    engine_threads,
    gpu_share,
    serve_dtype,
)

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
# Of a process with transformers, without weights; measured on a CPU, 16 sentences at once, 262144 tokens.
TRANSFORMERS_BYTES = 1.5e9
GPU_BLOCK = 16  # tokens of a block of vLLM's cache on a GPU
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
RATES = ("output_tokens_per_s", "input_tokens_per_s", "total_tokens_per_s", "requests_per_s")


@dataclass(frozen=True)
class Cell:
    """One measurement: which model, under what load, which repeat."""

    model: str
    load: Load
    repeat: int

    def __str__(self) -> str:
        return f"{self.model}-{self.load.name}-r{self.repeat}"


@dataclass(frozen=True)
class Plan:
    """What is measured. `places`: the directory each model's measurements are kept in."""

    config: Bench
    models: dict[str, Path]
    prompts: list[Request]
    answering: Answering
    cells: list[Cell]
    places: dict[str, str]

    def file(self, cell: Cell) -> str:
        """Where the measurement is kept in the run directory."""
        engine = f"-max{self.config.largest_batch}" if cell.load.kind == "batch" else ""
        prompts = [prompt.tokens for prompt in self.prompts[: self.config.num_requests(cell.load)]]
        text = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]
        return f"{self.places[cell.model]}/{cell.load.name}{engine}-{text}-r{cell.repeat}.json"

    @property
    def exactly(self) -> bool:
        """Whether every model gives as many tokens."""
        return self.answering.exactly is not None

    def missing(self, rundir: RunDir) -> list[Cell]:
        """What is not measured yet, or not without failures, in order.

        Models are compared in pairs made side by side, so of one load and repeat all are measured at one start of the
        engines, and again where one is missing.
        """
        found = {cell: self._read(rundir, cell) for cell in self.cells}
        together: dict[tuple[Load, int], list[dict[str, Any] | None]] = {}
        for cell, row in found.items():
            together.setdefault((cell.load, cell.repeat), []).append(row)
        done = {
            key: all(row and not row["measurement"]["errors"] for row in rows)
            and len({row["start"] for row in rows if row}) == 1
            for key, rows in together.items()
        }
        return [cell for cell in self.cells if not done[cell.load, cell.repeat]]

    def _read(self, rundir: RunDir, cell: Cell) -> dict[str, Any] | None:
        file = self.file(cell)
        return rundir.read_json(file) if rundir.exists(file) else None


def bench(context: Context) -> dict[str, Any]:
    """Measures what is not measured yet, writes bench.json, and returns tokens per second by model and load.

    Raises:
        UserError: a model is missing, no test sentence fits, or see `raylp.serve.endpoint.endpoint`.
    """
    plan = plan_bench(context)
    measure_batches(context, plan)
    if missing := [cell for cell in plan.missing(context.rundir) if cell.load.kind != "batch"]:
        wanted = {name: path for name, path in plan.models.items() if any(cell.model == name for cell in missing)}
        with ExitStack() as stack:
            with context.reporter.task("starting the endpoint") as task:
                cluster.start_afresh(context.recipe.resources)
                served = stack.enter_context(endpoint(context, wanted, task.beat))
            measure_missing(context, plan, served)
    config, models = plan.config, plan.models
    found = {cell: context.rundir.read_json(plan.file(cell)) for cell in plan.cells}
    dtype, *others = sorted({row["dtype"] for row in found.values()})
    if others:
        raise UserError(
            f"{context.rundir.url}/bench has measurements in {dtype} and in {', '.join(others)}, made with and without "
            f"GPUs: set serve.dtype, or remove that directory to measure again"
        )
    measured = {cell: Measurement.from_dict(row["measurement"]) for cell, row in found.items()}
    table = summary(list(models), config, measured)
    each = [m.tokens / (m.requests_per_s * m.seconds) for m in measured.values() if m.requests_per_s]
    at_work = {load.name: int(load.value) for load in config.loads if load.kind != "open"}
    on_gpus = bool(machine()["gpus"]) and context.recipe.serve.gpus != 0
    prompt_tokens, shared = prompt_lengths(plan.prompts, GPU_BLOCK if on_gpus else CPU_BLOCK)
    text = Text(prompt_tokens, shared, sum(each) / max(1, len(each)))
    result = {
        "schema": 1,
        "models": table,
        "ratios": ratios(list(models), config, measured),
        "metric": config.metric,
        "sizes": {name: sizes(path) for name, path in models.items()},
        "ideal": ideal(models, at_work, text, BYTES_PER_WEIGHT[dtype]),
        "goodput_within_ms": config.goodput,
        **resources(list(models), config, found),
        "machine": {**machine(), "dtype": dtype},
        "versions": versions(SERVING),
        "requests": config.requests,
        "sent": {load.name: config.num_requests(load) for load in config.loads},
        "distinct_prompts": {
            load.name: len({tuple(prompt.tokens) for prompt in plan.prompts[: config.num_requests(load)]})
            for load in config.loads
        },
        "output_tokens": config.output_tokens,
        "repeats": config.repeats,
        "errors": sum(len(measurement.errors) for measurement in measured.values()),
        "failed": failures(measured),
        # Measurements of several starts of the engines are less alike than those of one.
        "starts": len({row["start"] for row in found.values()}),
        "load_before": {str(cell): row["load"] for cell, row in found.items()},
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
    models = compared(config, context.models())
    prompts = sentences_that_fit(context, max(map(config.num_requests, config.loads)), config.output_tokens)
    for name, path in models.items():
        if not any(runs(path, load) for load in config.loads):
            how = (
                "bench.batches with bench.backends: [transformers]"
                if engine_of(path) != "vllm"
                else "bench.concurrency"
            )
            raise UserError(f"bench.models: {name} is quantised for {engine_of(path)}, which no load asks: set {how}")
    cells = [c for c in schedule(list(models), config.loads, config.repeats) if runs(models[c.model], c.load)]
    places = {name: _place(context, name, path) for name, path in models.items()}
    answering = Answering(config.output_tokens, ("\n",) if context.prompt.newline else ())
    return Plan(config, models, prompts, answering, cells, places)


def compared(config: Bench, there: Mapping[str, Path]) -> dict[str, Path]:
    """The models to measure, of those that are there.

    Raises:
        UserError: one that is named is not there.
    """
    if config.models is not None:
        return choose_models(config.models, there, "bench.models")
    kinds = {kind_of(name) for name in there}
    cut = [kind for kind in ("healed", "pruned") if kind in kinds][:1]
    chosen = choose_models(["baseline", *cut], there, "bench.models")
    chosen |= {name: path for name, path in there.items() if whole_of(name) in chosen}
    return {name: path for name, path in chosen.items() if any(runs(path, load) for load in config.loads)}


def runs(path: Path, load: Load) -> bool:
    """Whether the engine behind this load runs the checkpoint in `path`."""
    return engine_of(path) in (None, load.backend if load.kind == "batch" else "vllm")


def measure_missing(context: Context, plan: Plan, served: Endpoint) -> None:
    """Measures at the endpoint what is not measured yet; each measurement is written as soon as it is made."""
    import ray

    config, missing = plan.config, [cell for cell in plan.missing(context.rundir) if cell.load.kind != "batch"]
    models = sorted({cell.model for cell in missing})
    key = next(iter(api_keys(context.recipe.serve)), None)
    gpus = ray.cluster_resources().get("GPU", 0) if context.recipe.serve.gpus != 0 else 0
    dtype = serve_dtype(context.recipe.serve, context.recipe.model.dtype, gpus)
    start = secrets.token_hex(4)
    total = sum(config.num_requests(cell.load) for cell in missing) + len(models) * config.warmup
    most = Load("closed", max(config.concurrency, default=1))
    with context.reporter.task("bench", total) as task:
        for model in models:
            hand = [plan.prompts[i % len(plan.prompts)] for i in range(config.warmup)]
            tell = partial(task.advance, 1, f"warming {model} up")
            measure(served.url, model, hand, most, plan.answering, tell, key=key)
        for cell in missing:
            load = os.getloadavg()[0]
            hand = plan.prompts[: config.num_requests(cell.load)]
            tell = partial(task.advance, 1, f"{cell.model}, {_told(cell.load)}")
            # Of one repeat, every model meets the same moments.
            memory = MemoryMeter.of_mark(MARK, served.marks[cell.model])
            meter = EnergyMeter.of(cluster.num_nodes(), gpus > 0)
            found = measure(served.url, cell.model, hand, cell.load, plan.answering, tell, SEED + cell.repeat, key)
            about = {"start": start, "time": time.time(), "load": load, "dtype": dtype}
            about |= {"joules": meter.joules(), "energy_source": meter.source}
            about |= {"memory_bytes": memory.peak(), "ready_s": served.ready_s.get(cell.model)}
            context.rundir.write_json(plan.file(cell), {**about, "measurement": found.as_dict()})


def measure_batches(context: Context, plan: Plan) -> None:
    """Measures what is missing of the batches: each model resident in an engine of its own, taking turns.

    Raises:
        UserError: the models do not fit into the cluster, or the memory, together.
    """
    import ray

    waiting = [cell for cell in plan.missing(context.rundir) if cell.load.kind == "batch"]
    if not waiting:
        return
    cluster.start_afresh(context.recipe.resources)
    gpus = gpu_share(context.recipe.serve.gpus, len(plan.models), ray.cluster_resources().get("GPU", 0))
    dtype = serve_dtype(context.recipe.serve, context.recipe.model.dtype, gpus)
    config, length = plan.config, engine_length(context.recipe.serve, context.baseline)
    start = secrets.token_hex(4)
    total = sum(config.num_requests(cell.load) for cell in waiting)
    with context.reporter.task("bench in batches", total) as task:
        for backend in dict.fromkeys(cell.load.backend for cell in waiting):
            own = [cell for cell in waiting if cell.load.backend == backend]
            models = {cell.model: plan.models[cell.model] for cell in own}
            if not gpus and cluster.num_nodes() == 1:
                needed = {
                    name: weights_bytes(path, dtype) + (engine_bytes(path) if backend == "vllm" else TRANSFORMERS_BYTES)
                    for name, path in models.items()
                }
                check_room(needed, psutil.virtual_memory().available)
            log = context.rundir.logs() / "bench"
            engines = resident(list(models), gpus, context.prompt.newline, log, config.largest_batch)
            with cluster.own_errors(), engines as workers:
                ready_s = {}
                for name, worker in workers.items():
                    task.advance(0, f"starting {name}, {backend}")
                    ready_s[name] = ray.get(worker.start.remote(str(models[name]), backend, dtype, length))
                    # What an engine sets up for a size, it sets up now.
                    for size in sorted({int(cell.load.value) for cell in own}):
                        ray.get(worker.answer.remote(warming(plan.prompts, size), True))
                for cell in own:
                    tell = partial(task.advance, note=f"{cell.model}, {_told(cell.load)}")
                    hand = plan.prompts[: config.num_requests(cell.load)]
                    row = measure_batch(workers[cell.model], cell.load, hand, plan.exactly, tell, gpus > 0)
                    about = {"start": start, "dtype": dtype, "ready_s": ready_s[cell.model]}
                    context.rundir.write_json(plan.file(cell), {**row, **about})


def _told(load: Load) -> str:
    if load.kind == "batch":
        return f"{load.value:g} at once, {load.backend}"
    return f"{load.value:g} at a time" if load.kind == "closed" else f"{load.value:g} a second"


def schedule(models: Sequence[str], loads: Sequence[Load], repeats: int) -> list[Cell]:
    """The order of measurements: models side by side (A B, then B A), so that a slow drift of the machine hits all."""
    return [
        Cell(model, load, repeat)
        for repeat in range(repeats)
        for load in loads
        for model in (models if repeat % 2 == 0 else models[::-1])
    ]


def summary(models: Sequence[str], config: Bench, found: Mapping[Cell, Measurement]) -> dict[str, Any]:
    """{model: {setting: {latency: {"p50", "p90", "p99": S}, rate: S}}}, for `LATENCIES` and `RATES`.

    With an objective for it, `goodput_per_s` too.
    """
    table: dict[str, Any] = {}
    for model in models:
        for load in _measured(config, found, model):
            repeats = [found[Cell(model, load, r)] for r in range(config.repeats)]
            signature = _signature(config, load)
            timed = LATENCIES if load.kind != "batch" else ()
            values = {key: [own for repeat in repeats if (own := _each(repeat, key))] for key in timed}
            setting: dict[str, Any] = {key: percentiles(own, signature) for key, own in values.items() if own}
            for key in RATES:
                setting[key] = mean_of_repeats([getattr(r, key) for r in repeats], signature)
            if config.goodput and timed:
                good = [repeat.goodput(config.goodput) for repeat in repeats]
                within = ",".join(f"{key}<={ms:g}" for key, ms in sorted(config.goodput.items()))
                setting["goodput_per_s"] = mean_of_repeats(good, f"{signature}|within:{within}")
            table.setdefault(model, {})[load.name] = setting
    return table


def ratios(models: Sequence[str], config: Bench, found: Mapping[Cell, Measurement]) -> dict[str, Any]:
    """How many times as fast as the first model each other is, by `bench.metric`: {model: {setting: S and "verdict"}}.

    Of each repeat, the medians of a latency are compared, or the rates; the two were measured in the same turn, by the
    same start of the engines. Of few repeats nothing is concluded.
    """
    first, *others = models
    table: dict[str, Any] = {}
    for model in others:
        for load in _measured(config, found, first, model):
            metric = compared_by(config.metric, load)
            was, now = (
                [_figure(found[Cell(name, load, r)], metric) for r in range(config.repeats)] for name in (first, model)
            )
            above, below = (was, now) if metric in LATENCIES else (now, was)
            if min(*above, *below) <= 0:  # answers that came in one piece have no time between their tokens
                continue
            made = ratio(above, below, f"{_signature(config, load)}|{metric}")
            found_so = verdict(made) if config.repeats >= ENOUGH_REPEATS else "unclear"
            said = {"more": "faster", "less": "slower", "unclear": "unclear"}[found_so]
            table.setdefault(model, {})[load.name] = {**made, "over": first, "verdict": said, "metric": metric}
    return table


def compared_by(metric: str, load: Load) -> str:
    """What models are compared by under a load: `metric`, where it tells them apart.

    A batch's sentences are not timed one by one; what comes at a rate goes at that rate, whoever answers, so the time
    of a whole request is compared instead.
    """
    if load.kind == "batch":
        return "output_tokens_per_s" if metric in LATENCIES else metric
    return "e2e_ms" if load.kind == "open" and metric in RATES else metric


def failures(found: Mapping[Cell, Measurement]) -> dict[str, dict[str, int]]:
    """Requests that failed, by model and setting, where any did."""
    table: dict[str, dict[str, int]] = {}
    for cell, measurement in found.items():
        if measurement.errors:
            own = table.setdefault(cell.model, {})
            own[cell.load.name] = own.get(cell.load.name, 0) + len(measurement.errors)
    return table


def resources(models: Sequence[str], config: Bench, rows: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Memory and start-up time by model and engine, energy by model and setting, as far as they were noted.

    {"memory_bytes": {model: {engine: the most of a measurement}}, "gpu_bytes": the same, "ready_s": {model:
    {engine: the longest start}}, "energy": {model: {setting: S in joules for 1,000 tokens of answers}}}; engines are
    `endpoint` and `bench.backends`.
    """
    found: dict[str, Any] = {"memory_bytes": {}, "gpu_bytes": {}, "ready_s": {}, "energy": {}}
    for model in models:
        own = [(cell.load.backend or "endpoint", row) for cell, row in rows.items() if cell.model == model]
        for key in ("memory_bytes", "gpu_bytes", "ready_s"):
            for engine, row in own:
                if row.get(key) is not None:
                    noted = found[key].setdefault(model, {})
                    noted[engine] = max(row[key], noted.get(engine, row[key]))
        for load in _measured(config, rows, model):
            repeats = [rows[Cell(model, load, r)] for r in range(config.repeats)]
            tokens = [Measurement.from_dict(row["measurement"]).tokens for row in repeats]
            if all(tokens) and all(row.get("joules") is not None for row in repeats):
                each = [1000 * row["joules"] / made for row, made in zip(repeats, tokens, strict=True)]
                signature = f"{_signature(config, load)}|{repeats[0]['energy_source']}"
                found["energy"].setdefault(model, {})[load.name] = mean_of_repeats(each, signature)
    return {key: value for key, value in found.items() if value}


def _measured(config: Bench, found: Mapping[Cell, Any], *models: str) -> list[Load]:
    """The loads that all of `models` were put under: not every engine runs every model."""
    return [load for load in config.loads if all(Cell(model, load, 0) in found for model in models)]


def _figure(measurement: Measurement, metric: str) -> float:
    if metric in LATENCIES:
        each = _each(measurement, metric)
        return float(np.median(np.concatenate(each))) if each else 0.0
    return float(getattr(measurement, metric))


def _each(measurement: Measurement, key: str) -> list[Sequence[float]]:
    """The values of a latency in each request that has any: one, or, of `itl_ms`, one for each part of an answer."""
    values = [getattr(timing, key) for timing in measurement.timings]
    listed = [value if isinstance(value, tuple) else (value,) for value in values if value is not None]
    return [own for own in listed if own]


def _signature(config: Bench, load: Load) -> str:
    kinds = {"closed": "clients", "open": "rate", "batch": f"{load.backend}-batch"}
    what = f"{kinds[load.kind]}:{load.value:g}"
    return f"raylp|{what}|out:{config.output_tokens or 'natural'}|requests:{config.num_requests(load)}x{config.repeats}"


def sentences_that_fit(context: Context, count: int, exactly: int | None) -> list[Request]:
    """Requests for `count` test sentences, of each test set in turn, over and over where there are fewer.

    Those that the engine takes, with answers of `exactly` so many tokens, or of the prompt's own bound.

    Raises:
        UserError: none fits.
    """
    tokenizer = load_tokenizer(context.baseline)
    sets = list(context.splits.test.values())
    longest = max(map(len, sets), default=0)
    mixed = [examples[i] for i in range(longest) for examples in sets if i < len(examples)]
    room = engine_length(context.recipe.serve, context.baseline)
    fitting: list[Request] = []
    for example in mixed:
        (request,) = context.prompt.requests(tokenizer, [(example.source, example.pair)])
        most = exactly or request.max_new_tokens
        if len(request.tokens) + most <= room:
            fitting.append(Request(request.tokens, most))
        if len(fitting) == count:
            break
    if not fitting:
        raise UserError(
            f"bench: no test sentence fits into the {room} tokens of an engine "
            f"(serve.max_model_len, or the model's own limit) with bench.output_tokens: {exactly}"
        )
    return [fitting[i % len(fitting)] for i in range(count)]


def prompt_lengths(prompts: Sequence[Request], block: int) -> tuple[float, int]:
    """Tokens of a prompt, on average, and of the beginning that all have in common and an engine knows from others.

    vLLM keeps whole blocks of so many tokens, and always reads a prompt's last token.
    """
    lengths = [len(prompt.tokens) for prompt in prompts]
    columns = zip(*(prompt.tokens for prompt in prompts), strict=False)
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return sum(lengths) / len(lengths), min(shared, min(lengths) - 1) // block * block


def warming(prompts: Sequence[Request], count: int) -> list[Request]:
    """So many requests for two tokens each."""
    return [Request(prompts[i % len(prompts)].tokens, 2) for i in range(count)]


def _place(context: Context, name: str, path: Path) -> str:
    """The directory of a model's measurements: other weights, load, engine setting or machine is another directory."""
    config, served = context.recipe.bench or Bench(), context.recipe.serve
    what = {
        "model": fingerprint(path),
        "load": config.model_dump(include={"requests", "output_tokens"}),
        "serve": served.model_dump(include=_ENGINE_SETTINGS),
        "threads": engine_threads(served),
        "dtype": context.dtype,
        "kv_cache": os.environ.get("VLLM_CPU_KVCACHE_SPACE"),
        "machine": machine(),
        "versions": versions(SERVING),
    }
    return f"bench/{name}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]}"
