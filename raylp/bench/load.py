"""Clients that ask the endpoint for translations and keep the time: a closed loop, as many at once as asked."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from raylp.errors import UserError

REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Timing:
    """One request. `ttft_ms`: to the first token; `tpot_ms`: between two tokens, on average; `e2e_ms`: to the last."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    tokens: int


@dataclass(frozen=True)
class Measurement:
    """All requests of one measurement; `seconds` from the first one's start to the last one's end."""

    timings: list[Timing]
    errors: list[str]
    seconds: float

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens made a second, over all clients."""
        return sum(timing.tokens for timing in self.timings) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Measurement":
        return cls([Timing(**timing) for timing in value["timings"]], value["errors"], value["seconds"])


def measure(
    url: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    output_tokens: int,
    on_done: Callable[[], None] = lambda: None,
) -> Measurement:
    """Sends every prompt once to `model`, `concurrency` at a time; every answer has `output_tokens` tokens.

    The length is forced, so that a model is not quicker for saying less. What the prompts have in common is cached
    within this measurement, as it would be in use, but nothing from earlier ones. `on_done` follows each request.

    Raises:
        UserError: no request was answered.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    found = asyncio.run(_measure(url, model, prompts, concurrency, output_tokens, on_done))
    if not found.timings:
        raise UserError(f"the endpoint answered none of {len(prompts)} requests to model {model}: {found.errors[0]}", 1)
    return found


async def _measure(
    url: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    output_tokens: int,
    on_done: Callable[[], None],
) -> Measurement:
    waiting = iter(prompts)
    timings: list[Timing] = []
    errors: list[str] = []
    salt = secrets.token_hex(8)

    async def client(http: httpx.AsyncClient) -> None:
        for prompt in waiting:
            try:
                timings.append(await _ask(http, model, prompt, output_tokens, salt))
            except (httpx.HTTPError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {str(error)[:300]}")
            on_done()

    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(concurrency)))
        return Measurement(timings, errors, time.perf_counter() - started)


async def _ask(http: httpx.AsyncClient, model: str, prompt: Sequence[int], output_tokens: int, salt: str) -> Timing:
    body = {
        "model": model,
        "prompt": list(prompt),
        "temperature": 0,
        "max_tokens": output_tokens,
        "min_tokens": output_tokens,
        "ignore_eos": True,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = last = None
    tokens = 0
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"status {answer.status_code}: {(await answer.aread()).decode(errors='replace')}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            if chunk.get("choices"):
                last = time.perf_counter()
                first = first or last
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    if first is None or last is None or tokens != output_tokens:
        raise ValueError(f"{tokens} tokens came, {output_tokens} were asked for")
    return Timing(
        ttft_ms=(first - started) * 1000,
        tpot_ms=(last - first) / (tokens - 1) * 1000,
        e2e_ms=(last - started) * 1000,
        tokens=tokens,
    )
