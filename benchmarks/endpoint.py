"""What the endpoint costs: raylp serve and bare vLLM, the same model, prompts and engine settings, taking turns.

    python benchmarks/endpoint.py RUN --model healed-15 --concurrency 1,8 --repeats 5

RUN is a run directory with that model and test text. Prints tokens/s without streaming and the time to the first token
with it, raylp's over bare vLLM's with an interval over the repeats, and on one machine the CPU time a token takes in
each kind of process.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from processes import cpu_seconds
from rich.console import Console
from rich.table import Table
from run_dirs import open_run

from raylp.bench.load import Answering, Load, Measurement, measure
from raylp.bench.stage import sentences_that_fit
from raylp.bench.stats import ratio
from raylp.context import Context
from raylp.generate.vllm_engine import CPU_WORKER, cpu_environment, cpu_options, engine_options
from raylp.serve.endpoint import endpoint, engine_length, engine_threads, num_sequences, serve_dtype

START_S = 300
SHARE = 0.5  # of a GPU, for each of the two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    context, name, path = open_run(given.run, given.model)
    prompts = sentences_that_fit(context, given.requests, given.output_tokens)
    loads = [Load("closed", int(clients)) for clients in given.concurrency.split(",")]
    if torch.cuda.is_available():
        serve = context.recipe.serve.model_copy(update={"gpus": SHARE})
        context = replace(context, recipe=context.recipe.model_copy(update={"serve": serve}))
    with endpoint(context, {name: path}) as served, bare_vllm(context, path) as bare:
        servers = {"bare vllm": (bare, str(path)), "raylp": (served.url, name)}
        found: dict[tuple[str, str, bool], list[Measurement]] = {}
        spent: dict[tuple[str, str], Counter[str]] = {}
        for url, model in servers.values():
            measure(url, model, prompts[:4], Load("closed", 4), Answering(given.output_tokens))
        for repeat in range(given.repeats):
            order = list(servers) if repeat % 2 == 0 else list(servers)[::-1]
            for load in loads:
                for stream in (False, True):
                    for server in order:
                        url, model = servers[server]
                        before = cpu_seconds()
                        made = measure(url, model, prompts, load, Answering(given.output_tokens, stream=stream))
                        found.setdefault((server, load.name, stream), []).append(made)
                        if not stream:
                            used = spent.setdefault((server, load.name), Counter())
                            used.update({k: v - before[k] for k, v in cpu_seconds().items()})
                            used["tokens"] += made.tokens
                print(f"repeat {repeat + 1} of {given.repeats}, {load.name}", file=sys.stderr, flush=True)
    print_table(loads, found, spent)


class bare_vllm:  # noqa: N801
    """vLLM's own server with the engine settings that raylp gives its engines."""

    def __init__(self, context: Context, path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = context.recipe.serve
        gpus = torch.cuda.device_count()
        self.settings = {} if gpus else cpu_environment(engine_threads(config))
        dtype, length = serve_dtype(config, context.recipe.model.dtype, gpus), engine_length(config, path)
        options = {"model": path, "dtype": dtype, "max-model-len": length, "port": self.port, "host": "127.0.0.1"}
        options["generation-config"] = "vllm"
        mine: dict[str, Any] = dict(engine_options(path))
        if gpus:
            mine |= {"gpu_memory_utilization": 0.9 * SHARE, "max_num_seqs": 2 * config.target_ongoing_requests}
        else:
            mine |= {**cpu_options(path, dtype, length, num_sequences(config)), "worker_cls": CPU_WORKER}
            mine["distributed_executor_backend"] = "uni"
        options |= {key.replace("_", "-"): value for key, value in mine.items()}
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for key, value in options.items():
            self.command += [f"--{key}"] if value is True else [f"--{key}", str(value)]

    def __enter__(self) -> str:
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)
        env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", **self.settings}
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, env=env, start_new_session=True)
        url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    return url
            except httpx.HTTPError:
                pass
            time.sleep(1)
        self.__exit__()
        raise SystemExit(f"bare vLLM did not start: {self.log.name}")

    def __exit__(self, *_: object) -> None:
        with suppress(psutil.NoSuchProcess):  # it has ended by itself
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.wait()


def print_table(
    loads: list[Load],
    found: dict[tuple[str, str, bool], list[Measurement]],
    spent: dict[tuple[str, str], Counter[str]],
) -> None:
    table = Table("load", "measure", "bare vLLM", "raylp", "raylp / bare", "95%")
    for load in loads:
        rates = {s: [m.output_tokens_per_s for m in found[s, load.name, False]] for s in ("bare vllm", "raylp")}
        first = {
            s: [float(np.median([t.ttft_ms for t in m.timings])) for m in found[s, load.name, True]]
            for s in ("bare vllm", "raylp")
        }
        for what, values in (("tokens/s, whole answers", rates), ("TTFT p50, ms", first)):
            made = ratio(values["raylp"], values["bare vllm"], what)
            means = [f"{np.mean(values[s]):.1f}" for s in ("bare vllm", "raylp")]
            table.add_row(load.name, what, *means, f"{made['value']:.3f}", f"{made['low']:.3f} to {made['high']:.3f}")
        gap = np.asarray(first["raylp"]) - np.asarray(first["bare vllm"])
        table.add_row(load.name, "TTFT p50, ms more", "", f"{gap.mean():+.1f}", "", "")
    Console(width=120).print(table)
    table = Table("load", "server", "process", "CPU-ms a token")
    for (server, load_name), used in spent.items():
        for kind, seconds in sorted(used.items()):
            if kind != "tokens" and seconds > 0:
                table.add_row(load_name, server, kind, f"{1000 * seconds / used['tokens']:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
