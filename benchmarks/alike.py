"""Whether the benchmark finds differences that are there, and none that are not: one model against itself, many times.

    python benchmarks/alike.py RUN --model baseline --runs 20 --repeats 5 --keep alike.jsonl

For each run raylp's endpoint starts anew with the model under two names, an engine each, and compares the two as
`raylp bench` does: in turn, A B then B A, the ratio of pairs with its interval, a verdict. Then once more, with each
answer of the second held back for `--slower` of the time it took; both lead through one relay, which passes the others
on as they come. By its interval, one of twenty runs may find a difference by chance. A run is kept in `--keep` when it
is done, and not made again with the same settings.
"""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from rich.console import Console
from rich.table import Table
from run_dirs import open_run

from raylp.bench.load import Answering, Load, measure
from raylp.bench.stage import sentences_that_fit
from raylp.bench.stats import ratio, verdict
from raylp.generate.base import Request
from raylp.serve.endpoint import endpoint, free_port

NAMES = ("first", "second")
WAYS = ("same", "slow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="of a measurement")
    parser.add_argument("--output-tokens", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--slower", type=float, default=0.1)
    parser.add_argument("--keep", type=Path, default=Path("alike.jsonl"), help="what runs are kept in")
    given = parser.parse_args()
    context, _, path = open_run(given.run, given.model)
    prompts = sentences_that_fit(context, given.requests, given.output_tokens)
    load, answering = Load("closed", given.concurrency), Answering(given.output_tokens, stream=False)
    settings = {key: value for key, value in vars(given).items() if key not in ("runs", "keep")}
    runs = [run for run in read(given.keep) if run["settings"] == settings][: given.runs]
    while len(runs) < given.runs:
        with endpoint(context, dict.fromkeys(NAMES, path)) as served, relay(served.url, given.slower) as ways:
            for name in NAMES:
                measure(served.url, name, prompts, load, answering)
            run = {way: compare(ways, way, prompts, load, answering, given.repeats) for way in WAYS}
            run["settings"] = settings
        with given.keep.open("a") as stream:
            stream.write(json.dumps(run) + "\n")
        runs.append(run)
        print(f"{len(runs)} of {given.runs}: {[verdict(run[way]) for way in WAYS]}", file=sys.stderr, flush=True)
    print_table(runs, given.slower)


def read(kept: Path) -> list[dict[str, Any]]:
    """Runs that were made before; a line that a kill cut short is none."""
    lines = kept.read_text().splitlines(keepends=True) if kept.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept.write_text("".join(whole))
    return [json.loads(line) for line in whole]


def compare(
    ways: Mapping[str, str], way: str, prompts: Sequence[Request], load: Load, answering: Answering, repeats: int
) -> dict[str, Any]:
    """How many times as fast the second engine is as the first, with its answers led that way."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    urls = dict(zip(NAMES, (ways["same"], ways[way]), strict=True))
    for repeat in range(repeats):
        for name in NAMES[:: 1 if repeat % 2 == 0 else -1]:
            rates[name].append(measure(urls[name], name, prompts, load, answering).output_tokens_per_s)
    return ratio(rates["second"], rates["first"], "alike") | {"rates": rates}


def print_table(runs: Sequence[dict[str, Any]], slower: float) -> None:
    table = Table("second engine", "runs", "found slower", "found faster", "unclear", "ratios, least to most")
    for way, said in zip(WAYS, ("the same", f"{slower:.0%} slower"), strict=True):
        verdicts = [verdict(run[way]) for run in runs]
        ratios = [run[way]["value"] for run in runs]
        counts = (str(verdicts.count(each)) for each in ("less", "more", "unclear"))
        table.add_row(said, str(len(runs)), *counts, f"{min(ratios):.3f} to {max(ratios):.3f}")
    Console(width=110).print(table)


@contextmanager
def relay(url: str, slower: float) -> Iterator[dict[str, str]]:
    """Two ways to the endpoint at `url`: `same`, and `slow`, which holds an answer back for a share of its time."""
    client = httpx.AsyncClient(base_url=url, timeout=300, trust_env=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        way, _, path = scope["path"].lstrip("/").partition("/")
        started = time.perf_counter()
        headers = {"content-type": "application/json"}
        answer = await client.request(scope["method"], f"/{path}", content=body, headers=headers)
        if way == "slow":
            await asyncio.sleep(slower * (time.perf_counter() - started))
        told = [(b"content-type", answer.headers.get("content-type", "application/json").encode())]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": told})
        await send({"type": "http.response.body", "body": answer.content})

    port = free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield {way: f"http://127.0.0.1:{port}/{way}" for way in WAYS}
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
