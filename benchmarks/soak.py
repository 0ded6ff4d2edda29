"""Half an hour of mixed load on the endpoint, with bad requests among the good, and a replica that is killed.

    python benchmarks/soak.py RUN --model baseline --minutes 30

RUN is a run directory with that model and test text. Clients ask for completions, streams and translations; one request
in four is wrong in one of the ways of `WRONG`, or leaves in the middle of its stream. Told at the end: good requests
and how many were not answered, what wrong ones were answered with, memory (USS of all processes of the endpoint) after
each minute and its growth from the tenth on. After that a replica is killed under load: failed requests, and how long
until the next answer. Every minute is written to --out as it passes. --minutes 0: the killed replica alone.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from processes import by_kind, unique_bytes
from rich.console import Console
from rich.table import Table
from run_dirs import open_run

from raylp.bench.load import Answering, Load, measure
from raylp.bench.stage import sentences_that_fit
from raylp.serve.endpoint import endpoint

SETTLED_MIN = 10
WRONG: dict[str, tuple[str, Any]] = {
    "malformed JSON": ("/v1/completions", b'{"model": '),
    "nothing": ("/v1/completions", b""),
    "no prompt": ("/v1/completions", {"model": "MODEL"}),
    "wrong model": ("/v1/completions", {"model": "nobody", "prompt": "a"}),
    "too long": ("/v1/completions", {"model": "MODEL", "prompt": "word " * 20000, "max_tokens": 4}),
    "huge": ("/translate", b"x" * (3 << 20)),
    "no list": ("/translate", {"sentences": "one", "model": "MODEL"}),
    "wrong chat": ("/v1/chat/completions", {"model": "MODEL", "messages": [{"role": "user", "content": [1]}]}),
    "half a character": ("/v1/completions", {"model": "MODEL", "prompt": "\ud800"}),
    "minus answers": ("/v1/completions", {"model": "MODEL", "prompt": "a", "n": -9}),
    "wrong pair": ("/translate", {"sentences": ["a"], "pair": "xx-xx", "model": "MODEL"}),
    "not there": ("/nowhere", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"))
    given = parser.parse_args()
    context, name, path = open_run(given.run, given.model)
    texts = [example.source for examples in context.splits.test.values() for example in examples]
    prompts = sentences_that_fit(context, 64, 12)
    with endpoint(context, {name: path}) as served:
        measure(served.url, name, prompts[:8], Load("closed", given.clients), Answering(12))
        soak = Soak(served.url, name, texts, [list(prompt.tokens) for prompt in prompts])
        memory = asyncio.run(soak.run(given.clients, given.minutes * 60, given.out))
        print_table(soak, memory)
        asyncio.run(kill_a_replica(served.url, name, [list(prompt.tokens) for prompt in prompts]))


class Soak:
    """Clients that ask well and badly, and what they were told."""

    def __init__(self, url: str, model: str, texts: list[str], prompts: list[list[int]]) -> None:
        self.url, self.model, self.texts, self.prompts = url, model, texts, prompts
        self.good: Counter[str] = Counter()
        self.failed: list[str] = []
        self.told: dict[str, Counter[int]] = {}

    async def run(self, clients: int, seconds: float, out: Path) -> list[dict[str, int]]:
        """Memory after each minute."""
        ends = time.monotonic() + seconds
        work = [asyncio.create_task(self.client(number, ends)) for number in range(clients)]
        memory: list[dict[str, int]] = []
        with out.open("w") as stream:
            while time.monotonic() < ends:
                await asyncio.sleep(min(60.0, max(0.1, ends - time.monotonic())))
                memory.append(dict(await asyncio.to_thread(unique_bytes)))
                row = {"good": dict(self.good), "failed": self.failed, "memory": memory[-1], "minute": len(memory)}
                stream.write(json.dumps(row) + "\n")
                stream.flush()
        await asyncio.gather(*work)
        return memory

    async def client(self, number: int, ends: float) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
            while time.monotonic() < ends:
                if draw.random() < 0.25:
                    await self.wrong(http, draw)
                else:
                    await self.right(http, draw)

    async def right(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        kind = draw.choice(("completion", "stream", "translate"))
        body: dict[str, Any] = {"model": self.model, "prompt": draw.choice(self.prompts), "max_tokens": 12}
        try:
            if kind == "translate":
                body = {"model": self.model, "sentences": draw.sample(self.texts, 2)}
                answer = await http.post("/translate", json=body)
                fine = answer.status_code == 200 and len(answer.json()["translations"]) == 2
            elif kind == "completion":
                answer = await http.post("/v1/completions", json=body)
                fine = answer.status_code == 200 and bool(answer.json()["choices"])
            else:
                async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    lines = [line async for line in answer.aiter_lines()]
                parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
                fine = lines[-2:] == ["data: [DONE]", ""] and bool(parts) and not any("error" in part for part in parts)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            fine, answer = False, error  # type: ignore[assignment]
        self.good[kind] += 1
        if not fine:
            self.failed.append(f"{kind}: {answer!r}"[:300])

    async def wrong(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        what = draw.choice((*WRONG, "left in the middle"))
        told = self.told.setdefault(what, Counter())
        if what == "left in the middle":
            body = {"model": self.model, "prompt": draw.choice(self.prompts), "max_tokens": 200, "stream": True}
            try:
                async with http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as answer:
                    await anext(answer.aiter_lines())
                told[answer.status_code] += 1
            except (httpx.HTTPError, StopAsyncIteration):
                told[0] += 1
            return
        path, body = WRONG[what]
        content = body if isinstance(body, bytes) else json.dumps(body).replace("MODEL", self.model).encode()
        try:
            answer = await http.post(path, content=content, headers={"content-type": "application/json"})
            told[answer.status_code] += 1
        except httpx.HTTPError:  # refused before all of it was read
            told[0] += 1


async def kill_a_replica(url: str, model: str, prompts: list[list[int]]) -> None:
    """Ends the process of a replica while four clients ask; tells what failed until ten in a row were answered."""
    killed: list[float] = []
    answered: list[tuple[float, bool]] = []

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            while not killed or not well():
                body = {"model": model, "prompt": random.choice(prompts), "max_tokens": 12}
                try:
                    fine = (await http.post("/v1/completions", json=body)).status_code == 200
                except httpx.HTTPError:
                    fine = False
                answered.append((time.monotonic(), fine))
                if not fine:
                    await asyncio.sleep(0.5)

    def well() -> bool:
        last = [fine for when, fine in answered if when > killed[0]][-10:]
        return len(last) == 10 and all(last) and any(not fine for when, fine in answered if when > killed[0])

    clients = [asyncio.create_task(client()) for _ in range(4)]
    await asyncio.sleep(10)
    (replica, *_) = by_kind()["replica"]
    os.kill(replica.pid, signal.SIGKILL)
    killed.append(time.monotonic())
    await asyncio.wait_for(asyncio.gather(*clients), 600)
    after = [(when, fine) for when, fine in answered if when > killed[0]]
    last = max(when for when, fine in after if not fine)
    back = min(when for when, fine in after if fine and when > last) - killed[0]
    # Requests wait for the new replica; the first of them that is answered tells when it is there.
    print(f"replica killed: {sum(not fine for _, fine in after)} requests failed, the next answer after {back:.0f} s")


def print_table(soak: Soak, memory: list[dict[str, int]]) -> None:
    console = Console(width=110)
    console.print(f"good: {dict(soak.good)}, not answered: {len(soak.failed)} {soak.failed[:3]}")
    table = Table("wrong in this way", "answered with, how often")
    for what, told in sorted(soak.told.items()):
        table.add_row(what, ", ".join(f"{status} x {count}" for status, count in sorted(told.items())))
    console.print(table)
    if not memory:
        return
    settled = memory[min(SETTLED_MIN, len(memory)) - 1]
    table = Table("process", f"MB after {min(SETTLED_MIN, len(memory))} min", f"after {len(memory)}", "growth")
    for kind in sorted(settled):
        before, after = settled[kind], memory[-1].get(kind, 0)
        table.add_row(kind, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before - 1:+.1%}")
    before, after = sum(settled.values()), sum(memory[-1].values())
    table.add_row("all", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before - 1:+.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
