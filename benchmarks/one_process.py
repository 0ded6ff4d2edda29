"""What a process of its own for the model costs an engine on the CPU: vLLM's way, with and without, behind no endpoint.

    python benchmarks/one_process.py RUN --model healed-14 --dtypes bfloat16,float32

RUN is a run directory with that model and test text. Engines start one after the other: vLLM's with a thread less than
there are cores, which leaves one to the engine that waits without sleeping, and with one for each; raylp's without the
process. Prints tokens/s and the median time to the first token, at one request at a time and at eight.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LOADS = (1, 8)


def main() -> None:
    if sys.argv[1:2] == ["--engine"]:
        asyncio.run(engine(json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=16)
    given = parser.parse_args()
    from run_dirs import open_run

    from raylp.bench.stage import sentences_that_fit
    from raylp.generate.vllm_engine import ONE_PROCESS

    context, _, path = open_run(given.run, given.model)
    asked = [list(request.tokens) for request in sentences_that_fit(context, given.requests, given.output_tokens)]
    cores = len(os.sched_getaffinity(0))
    ways: list[tuple[str, str, int, dict[str, str]]] = [
        ("the model's own process, a thread less", "mp", max(1, cores - 1), {}),
        ("the model's own process", "mp", cores, {}),
        ("one process", "uni", cores, ONE_PROCESS),
    ]
    table = Table("engine", "dtype", "threads", "requests at a time", "tokens/s", "TTFT p50, ms")
    for dtype in given.dtypes.split(","):
        for said, backend, threads, settings in ways:
            job = {"path": str(path), "dtype": dtype, "backend": backend, "asked": asked, "tokens": given.output_tokens}
            quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
            env = {**os.environ, **quiet, **settings, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, __file__, "--engine", json.dumps(job)]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
            (line,) = (line for line in told.splitlines() if line.startswith("["))
            for clients, (rate, first) in zip(LOADS, json.loads(line), strict=True):
                table.add_row(said, dtype, str(threads), str(clients), f"{rate:.1f}", f"{first:.0f}")
    Console(width=110).print(table)


async def engine(job: dict[str, Any]) -> None:
    """Prints [tokens/s, ms to the first token] for each of `LOADS`."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from raylp.generate.vllm_engine import CPU_WORKER, cpu_options

    length = max(map(len, job["asked"])) + job["tokens"]
    options = cpu_options(Path(job["path"]), job["dtype"], length, max(LOADS))
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=job["path"],
            dtype=job["dtype"],
            max_model_len=length,
            generation_config="vllm",
            worker_cls=CPU_WORKER,
            distributed_executor_backend=job["backend"],
            enable_prefix_caching=False,
            **options,
        )
    )
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], min_tokens=job["tokens"], ignore_eos=True)

    async def ask(number: int, name: str) -> float:
        began, first = time.perf_counter(), None
        async for _ in llm.generate({"prompt_token_ids": job["asked"][number]}, params, f"{name}-{number}"):
            first = first or time.perf_counter() - began
        return first or 0.0

    await ask(0, "warm")
    found = []
    for clients in LOADS:
        waiting = iter(range(len(job["asked"])))
        firsts: list[float] = []

        async def client(name: str, waiting: Any = waiting, firsts: list[float] = firsts) -> None:
            for number in waiting:
                firsts.append(await ask(number, name))

        began = time.perf_counter()
        await asyncio.gather(*(client(f"{clients}") for _ in range(clients)))
        rate = len(firsts) * job["tokens"] / (time.perf_counter() - began)
        found.append((rate, 1000 * statistics.median(firsts)))
    print(json.dumps(found))
    llm.shutdown()


if __name__ == "__main__":
    main()
