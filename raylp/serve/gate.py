"""What stands before the endpoint: keys, limits, and the count of what passes. Pure ASGI; no engine is needed."""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Answered without a key, and while the endpoint drains.
OPEN = frozenset({"/", "/health", "/metrics"})
# What is named in metrics; others share one name, so that strangers cannot make up series without end.
KNOWN = (*OPEN, "/translate", "/v1/chat/completions", "/v1/completions", "/v1/models")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
RETRY_AFTER_S = 1
# Where there may be one: as JSON writes surrogates, which may be whole pairs, or in what is no UTF-8.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
BODY_S = 30.0  # in which a request must have come whole


class Traffic:
    """What has passed a gate and what is at work behind it. While `draining`, nothing new is let in."""

    def __init__(self) -> None:
        self.draining = False
        self.at_work = 0
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "raylp_requests", "Requests answered, by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "raylp_request_seconds",
            "From a request to its last byte",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        gauge = Gauge("raylp_requests_at_work", "Requests let through and not yet answered", registry=self.registry)
        gauge.set_function(lambda: self.at_work)

    @contextmanager
    def more(self, count: int, most: int) -> Iterator[None]:
        """A request that is let in holds `count` more while the block runs: sentences, prompts, samples.

        Raises:
            TooManyError: there would be more than `most`, and others are at work; one alone is let through.
        """
        if self.at_work > 1 and self.at_work + count > most:
            raise TooManyError(
                f"{self.at_work} requests are at work, and this one holds {count + 1}: {most} are the most"
            )
        self.at_work += count
        try:
            yield
        finally:
            self.at_work -= count


class TooManyError(Exception):
    """More at work than may be."""


class Held:
    """The parts of an answer; what the stack holds is let go with the last of them, or when nobody takes any more.

    `failure_in`: the error that a part tells of instead of raising it; what is held learns of it as if it were raised.
    A generator would not do: one that is never begun lets nothing go.
    """

    def __init__(
        self,
        parts: AsyncIterable[Any],
        stack: ExitStack,
        failure_in: Callable[[Any], Exception | None] = lambda part: None,
    ) -> None:
        self._parts = aiter(parts)
        self._stack = stack
        self._failure_in = failure_in

    def __aiter__(self) -> "Held":
        return self

    async def __anext__(self) -> Any:
        try:
            part = await anext(self._parts)
        except StopAsyncIteration:
            self._stack.close()
            raise
        except BaseException as error:
            self._give_up(error)
            raise
        if (failure := self._failure_in(part)) is not None:
            self._give_up(failure)
        return part

    def __del__(self) -> None:
        self._give_up(GeneratorExit())

    def _give_up(self, error: BaseException) -> None:
        self._stack.__exit__(type(error), error, None)


def told_error(part: Any) -> dict[str, Any] | None:
    """The error in a part of a stream of server-sent events, as OpenAI's servers write it; None where there is none.

    An engine that fails in the middle of a stream, or has died, says so in an event and ends the stream in good order.
    """
    text = part.decode(errors="replace") if isinstance(part, bytes) else str(part)
    if '"error"' not in text:
        return None
    for line in text.split("\n"):
        with suppress(ValueError):
            event = json.loads(line.removeprefix("data: "))
            if isinstance(event, dict) and isinstance(event.get("error"), dict):
                return event["error"]
    return None


TRAFFIC = Traffic()  # of the endpoint of this process: the framework makes the gate, others ask about it


class Gate:
    """Lets a request through to `app`, or answers it with what is wrong and what to do.

    `max_body_bytes`: a longer request is refused with 413; `max_waiting`: requests at work at a time, beyond which 429
    says when to come again; `keys`: SHA-256 of each API key, none for an open endpoint (401 without a right one).
    While the traffic drains, what is at work is finished and all else is refused with 503.
    """

    def __init__(
        self,
        app: App,
        max_body_bytes: int,
        max_waiting: int,
        keys: Iterable[str] = (),
        traffic: Traffic = TRAFFIC,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_waiting = max_waiting
        self.keys = tuple(keys)
        self.traffic = traffic

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in KNOWN else "other"
        started = time.perf_counter()
        status = 499  # what proxies write where the client left before an answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        except Exception:
            status = 500  # what the server says then
            raise
        finally:
            self.traffic.requests.labels(path, str(status)).inc()
            self.traffic.seconds.labels(path).observe(time.perf_counter() - started)

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        free = scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")
        if self.keys and not free and not self._knows(headers.get(b"authorization", b"")):
            said = "an API key is wanted: send the header 'Authorization: Bearer KEY'"
            await refuse(send, 401, said, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        traffic = self.traffic
        if traffic.draining:
            await refuse(send, 503, "the endpoint is shutting down: send this elsewhere", "shutting_down")
            return
        if traffic.at_work >= self.max_waiting:
            said = f"{traffic.at_work} requests are at work, the most there may be: come again in {RETRY_AFTER_S} s"
            await refuse(send, 429, said, "too_many_requests", {"Retry-After": str(RETRY_AFTER_S)})
            return
        traffic.at_work += 1
        try:
            try:
                body = await asyncio.wait_for(self._whole(headers, receive), BODY_S)
            except TimeoutError:
                await refuse(send, 408, f"the request did not come within {BODY_S:g} s", "request_timeout")
                return
            if body is None:
                said = f"the request is longer than {self.max_body_bytes} bytes: send less at a time"
                await refuse(send, 413, said, "request_too_large")
                return
            if _holds_half_a_character(body.get("body", b"")):
                await refuse(send, 400, "the request holds half a character (a lone surrogate)", "invalid_request")
                return
            await self.app(scope, _again(body, receive), send)
        finally:
            traffic.at_work -= 1

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = key_hash(key.strip())
        known = [hmac.compare_digest(given, other) for other in self.keys]  # all of them, in the same time
        return scheme.lower() == b"bearer" and any(known)

    async def _whole(self, headers: dict[bytes, bytes], receive: Receive) -> Message | None:
        """The body as one message, or the client's farewell; None where it is too long."""
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.max_body_bytes:
            return None
        parts: list[bytes] = []
        length = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            length += len(parts[-1])
            if length > self.max_body_bytes:
                return None
            if not message.get("more_body"):
                return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def _holds_half_a_character(body: bytes) -> bool:
    """Whether a JSON text holds a lone surrogate, which JSON can write and no tokenizer or answer can hold."""
    if not _SURROGATE.search(body):
        return False
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):  # no JSON, which is for others to say
        pass
    return False


def _again(first: Message, receive: Receive) -> Receive:
    """Gives `first`, then whatever comes."""
    waiting = [first]

    async def give() -> Message:
        return waiting.pop() if waiting else await receive()

    return give


async def refuse(send: Send, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
    """An error in the form OpenAI's clients read."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": code}}).encode()
    told = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def read_keys(text: str) -> list[str]:
    """The keys in a file of one key a line; blank lines and comments (#) are left out."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def key_hash(key: bytes) -> str:
    """What is kept of a key: its SHA-256, in hex."""
    return hashlib.sha256(key).hexdigest()
