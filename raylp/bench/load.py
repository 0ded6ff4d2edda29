"""Clients that ask the endpoint for translations and keep the time.

A closed loop is so many clients that each send request after request; an open loop sends requests as they would come
from outside, at random moments at a mean rate, whether or not earlier ones are answered.
"""

import asyncio
import json
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import httpx

from raylp.errors import UserError
from raylp.generate.base import Request

REQUEST_TIMEOUT_S = 300.0
SEED = 12345


@dataclass(frozen=True)
class Load:
    """`closed`: `value` clients at a time; `open`: `value` requests a second; `batch`: `value` sentences at once.

    A batch is given to an engine of `backend` itself, without an endpoint.
    """

    kind: Literal["closed", "open", "batch"]
    value: float
    backend: str = ""

    @property
    def name(self) -> str:
        """`c8` for eight clients, `r2.5` for a rate, `vllm-b16` for sixteen sentences at once."""
        if self.kind == "batch":
            return f"{self.backend}-b{self.value:g}"
        return f"{'c' if self.kind == 'closed' else 'r'}{self.value:g}"


@dataclass(frozen=True)
class Answering:
    """How answers end. `exactly`: after that many tokens, so that no model is quicker for saying less; None: at `stop`
    or the end of text, as a translation does, within the prompt's own bound. Without `stream` an answer comes whole,
    its first token with its last.
    """

    exactly: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = True


@dataclass(frozen=True)
class Timing:
    """One request. `ttft_ms`: to the first token; `tpot_ms`: between two tokens, on average, None where all came at
    once; `e2e_ms`: to the last; `itl_ms`: each wait between two parts of the stream; `tokens`: of the answer. All from
    when it was due.
    """

    ttft_ms: float
    tpot_ms: float | None
    e2e_ms: float
    tokens: int
    itl_ms: tuple[float, ...] = ()
    input_tokens: int = 0

    def meets(self, objective: Mapping[Any, float]) -> bool:
        """Whether each latency that is named, as far as it has it, is at most that many ms."""
        found = ((getattr(self, name), ms) for name, ms in objective.items())
        return all(took is None or took <= ms for took, ms in found)


@dataclass(frozen=True)
class Measurement:
    """All requests of one measurement; `seconds` from the first one's start to the last one's end.

    `counts`: `requests`, `tokens` and `input_tokens` where requests were not timed one by one.
    """

    timings: list[Timing]
    errors: list[str]
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return self.counts.get("tokens", sum(timing.tokens for timing in self.timings))

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens made a second, over all clients."""
        return self.tokens / self.seconds

    @property
    def input_tokens_per_s(self) -> float:
        """Tokens of prompts a second."""
        return self.counts.get("input_tokens", sum(timing.input_tokens for timing in self.timings)) / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        """Of prompts and answers."""
        return self.input_tokens_per_s + self.output_tokens_per_s

    @property
    def requests_per_s(self) -> float:
        """Requests answered a second."""
        return self.counts.get("requests", len(self.timings)) / self.seconds

    def goodput(self, objective: Mapping[Any, float]) -> float:
        """Requests a second that were answered within the objective."""
        return sum(timing.meets(objective) for timing in self.timings) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Measurement":
        timings = [
            Timing(**{**t, "tpot_ms": t["tpot_ms"] or None, "itl_ms": tuple(t.get("itl_ms", ()))})
            for t in value["timings"]
        ]
        return cls(timings, value["errors"], value["seconds"], value.get("counts", {}))


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests come that know nothing of each other (Poisson), the first at 0."""
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times


def measure(
    url: str,
    model: str,
    prompts: Sequence[Request],
    load: Load,
    answering: Answering,
    on_done: Callable[[], None] = lambda: None,
    seed: int = SEED,
    key: str | None = None,
) -> Measurement:
    """Sends every prompt once to `model`, under that load.

    What the prompts have in common is cached within this measurement, as it would be in use, but nothing from earlier
    ones. `on_done` follows each request; `seed`: of an open loop's moments; `key`: of the endpoint, if it wants one.

    Raises:
        UserError: no request was answered.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asker = _Asker(url, model, answering, key)
    found = asyncio.run(
        _closed(asker, prompts, int(load.value), on_done)
        if load.kind == "closed"
        else _open(asker, prompts, arrivals(load.value, len(prompts), seed), on_done)
    )
    if not found.timings:
        raise UserError(f"the endpoint answered none of {len(prompts)} requests to model {model}: {found.errors[0]}", 1)
    return found


async def _closed(
    asker: "_Asker", prompts: Sequence[Request], clients: int, on_done: Callable[[], None]
) -> Measurement:
    waiting = iter(prompts)

    async def client(http: httpx.AsyncClient) -> None:
        for prompt in waiting:
            await asker.ask(http, prompt, time.perf_counter())
            on_done()

    async with asker.http(clients) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return asker.measurement(started)


async def _open(
    asker: "_Asker", prompts: Sequence[Request], times: Sequence[float], on_done: Callable[[], None]
) -> Measurement:
    async def one(http: httpx.AsyncClient, prompt: Request, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        # Timed from when it was due: a client that falls behind must not make the endpoint look quicker.
        await asker.ask(http, prompt, due)
        on_done()

    async with asker.http(len(prompts)) as http:
        started = time.perf_counter()
        await asyncio.gather(*(one(http, p, started + at) for p, at in zip(prompts, times, strict=True)))
        return asker.measurement(started)


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream of events. httpx's own would also end at a line separator inside of an answer's JSON."""
    rest = ""
    async for text in answer.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line
    if rest:
        yield rest


class _Asker:
    """Asks one model, and keeps what came of it."""

    def __init__(self, url: str, model: str, answering: Answering, key: str | None) -> None:
        self.url = url
        self.answering = answering
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.timings: list[Timing] = []
        self.errors: list[str] = []
        self.fixed: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "cache_salt": secrets.token_hex(8),
        }
        if answering.stream:
            self.fixed |= {"stream": True, "stream_options": {"include_usage": True}}
        if answering.exactly is not None:
            self.fixed |= {"min_tokens": answering.exactly, "max_tokens": answering.exactly, "ignore_eos": True}
        elif answering.stop:
            self.fixed["stop"] = list(answering.stop)

    def http(self, connections: int) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(
            base_url=self.url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False, headers=self.headers
        )

    def measurement(self, started: float) -> Measurement:
        return Measurement(self.timings, self.errors, time.perf_counter() - started)

    async def ask(self, http: httpx.AsyncClient, prompt: Request, due: float) -> None:
        """One request, timed from `due`; an error is kept, too."""
        try:
            self.timings.append(await self._ask(http, prompt, due))
        except (httpx.HTTPError, ValueError) as error:
            self.errors.append(f"{type(error).__name__}: {str(error)[:300]}")

    async def _ask(self, http: httpx.AsyncClient, prompt: Request, due: float) -> Timing:
        body = {"max_tokens": prompt.max_new_tokens, **self.fixed, "prompt": list(prompt.tokens)}
        came: list[float] = []
        usage: dict[str, int] = {}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}: {(await answer.aread()).decode(errors='replace')}")
            async for line in _lines(answer):
                if self.answering.stream and (not line.startswith("data: ") or line == "data: [DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(str(chunk["error"]))
                if chunk.get("choices"):
                    came.append(time.perf_counter())
                usage = chunk.get("usage") or usage
        tokens = usage.get("completion_tokens", 0)
        wanted = self.answering.exactly
        if not came or (wanted is not None and tokens != wanted):
            raise ValueError(f"{tokens} tokens came, {wanted or 'at least one'} were asked for")
        return Timing(
            ttft_ms=(came[0] - due) * 1000,
            tpot_ms=(came[-1] - came[0]) / (tokens - 1) * 1000 if min(len(came), tokens) > 1 else None,
            e2e_ms=(came[-1] - due) * 1000,
            tokens=tokens,
            itl_ms=tuple(round((b - a) * 1000, 3) for a, b in pairwise(came)),
            input_tokens=usage.get("prompt_tokens", len(prompt.tokens)),
        )
