"""Whether the benchmark finds differences that are there, and none that are not: one model against itself, many times.

    python benchmarks/alike.py RUN --model baseline --runs 20 --repeats 5

Each run compares two as `raylp bench` does: in turn, A B then B A, the ratio of pairs with its interval, a verdict.
Both ways lead through a relay to one engine behind raylp's endpoint. In the first half of the runs the relay passes
answers on as they come; in the other half the second way holds each answer back for `--slower` of the time it took.
By its interval, one of twenty runs may find a difference by chance.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from rich.console import Console
from rich.table import Table
from runs import open_run

from raylp.bench.load import Answering, Load, measure
from raylp.bench.stage import sentences_that_fit
from raylp.bench.stats import ratio, verdict
from raylp.serve.endpoint import endpoint, free_port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--runs", type=int, default=20, help="of each half")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="of a measurement")
    parser.add_argument("--output-tokens", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--slower", type=float, default=0.1)
    given = parser.parse_args()
    context, name, path = open_run(given.run, given.model)
    prompts = sentences_that_fit(context, given.requests, given.output_tokens)
    load, answering = Load("closed", given.concurrency), Answering(given.output_tokens, stream=False)
    table = Table("second way", "runs", "found slower", "found faster", "unclear", "ratios, least to most")
    with endpoint(context, {name: path}) as served, relay(served.url, given.slower) as ways:
        measure(served.url, name, prompts, load, answering)
        for second, said in (("same", "the same"), ("slow", f"{given.slower:.0%} slower")):
            verdicts: Counter[str] = Counter()
            ratios = []
            for number in range(given.runs):
                rates: dict[int, list[float]] = {0: [], 1: []}
                for repeat in range(given.repeats):
                    for place in (0, 1)[:: 1 if repeat % 2 == 0 else -1]:
                        url = ways["same" if place == 0 else second]
                        rates[place].append(measure(url, name, prompts, load, answering).output_tokens_per_s)
                made = ratio(rates[1], rates[0], "alike")
                verdicts[verdict(made)] += 1
                ratios.append(made["value"])
                print(f"{said}: {number + 1} of {given.runs}, {dict(verdicts)}", file=sys.stderr, flush=True)
            span = f"{min(ratios):.3f} to {max(ratios):.3f}"
            table.add_row(said, str(given.runs), *(str(verdicts[v]) for v in ("less", "more", "unclear")), span)
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
        yield {way: f"http://127.0.0.1:{port}/{way}" for way in ("same", "slow")}
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
