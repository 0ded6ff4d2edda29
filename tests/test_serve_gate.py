"""Before the endpoint: keys, limits, counts, and the choice of a model by latency. No engine runs here."""

import asyncio
import hashlib
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest

from raylp.errors import UserError
from raylp.serve.gate import Gate, Held, TooManyError, Traffic, key_hash, read_keys, told_error
from raylp.serve.slo import Chooser, Objective, one_for_each_depth, read_objective

KEY = hashlib.sha256(b"secret").hexdigest()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body, slowly where that is asked for."""
    message = await receive()
    if scope["path"] == "/v1/completions":
        await asyncio.sleep(0.2)
    body = str(len(message.get("body", b""))).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def gate_to(app: Any, most: int = 10, keys: list[str] | None = None) -> Gate:
    return Gate(app, 100, most, keys or (), Traffic())


def ask(gate: Gate, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    """The answers to requests sent at once."""

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await asyncio.gather(*(client.request(method, path, **more) for method, path, more in requests))

    return asyncio.run(all_of_them())


def test_a_key_is_asked_for_where_there_are_any() -> None:
    gate = gate_to(echo, keys=[KEY])
    right, wrong, none, page = ask(
        gate,
        ("POST", "/translate", {"headers": {"Authorization": "Bearer secret"}, "content": b"four"}),
        ("POST", "/translate", {"headers": {"Authorization": "Bearer guess"}}),
        ("GET", "/v1/models", {}),
        ("GET", "/", {}),
    )
    assert (right.status_code, right.text) == (200, "4")
    assert (wrong.status_code, none.status_code, page.status_code) == (401, 401, 200)
    assert "Authorization: Bearer KEY" in wrong.json()["error"]["message"]
    assert wrong.headers["www-authenticate"] == "Bearer"
    assert "guess" not in wrong.text
    (held,) = ask(gate, ("POST", "/health", {}))
    assert held.status_code == 401, "what may take a place at work needs a key"
    (open_to_all,) = ask(gate_to(echo), ("POST", "/translate", {}))
    assert open_to_all.status_code == 200


def test_what_is_too_long_is_refused_with_and_without_a_length() -> None:
    async def parts() -> Any:
        for _ in range(11):
            yield b"x" * 10

    gate = gate_to(echo)
    fits, told, untold = ask(
        gate,
        ("POST", "/translate", {"content": b"x" * 100}),
        ("POST", "/translate", {"content": b"x" * 101}),
        ("POST", "/translate", {"content": parts()}),
    )
    assert (fits.text, told.status_code, untold.status_code) == ("100", 413, 413)
    assert "100 bytes" in told.json()["error"]["message"]
    assert gate.traffic.at_work == 0


def test_too_many_at_once_are_told_when_to_come_again() -> None:
    gate = gate_to(echo, most=3)
    answers = ask(gate, *[("POST", "/v1/completions", {"content": b"x"})] * 5)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429, 429]
    late = next(answer for answer in answers if answer.status_code == 429)
    assert late.headers["retry-after"] == "1"
    assert "3 requests are at work" in late.json()["error"]["message"]
    assert gate.traffic.at_work == 0
    assert ask(gate, ("POST", "/v1/completions", {}))[0].status_code == 200


def test_while_it_drains_what_is_at_work_is_finished_and_the_rest_refused() -> None:
    gate = gate_to(echo)

    async def scene() -> list[int]:
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            first = asyncio.create_task(client.post("/v1/completions"))
            await asyncio.sleep(0.05)
            gate.traffic.draining = True
            late, health = await client.post("/v1/completions"), await client.get("/health")
            return [(await first).status_code, late.status_code, health.status_code]

    assert asyncio.run(scene()) == [200, 503, 200]


def test_requests_are_counted_by_path_and_status() -> None:
    gate = gate_to(echo, keys=[KEY])
    ask(gate, ("GET", "/health", {}), ("POST", "/translate", {}), ("GET", "/made/up/1", {}), ("GET", "/made/up/2", {}))
    said = generate_latest(gate.traffic.registry).decode()
    assert 'raylp_requests_total{path="/health",status="200"} 1.0' in said
    assert 'raylp_requests_total{path="/translate",status="401"} 1.0' in said
    assert 'raylp_requests_total{path="other",status="401"} 2.0' in said
    assert "raylp_requests_at_work 0.0" in said
    assert "made" not in said


def test_an_app_that_fails_counts_as_a_failure_of_the_endpoint() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError

    gate = gate_to(fails)
    with pytest.raises(RuntimeError):
        ask(gate, ("POST", "/translate", {}))
    assert 'path="/translate",status="500"} 1.0' in generate_latest(gate.traffic.registry).decode()
    assert gate.traffic.at_work == 0


def test_a_request_that_holds_several_weighs_as_much() -> None:
    traffic = Traffic()
    traffic.at_work = 1
    with traffic.more(99, 10):  # alone, whatever it holds
        assert traffic.at_work == 100
        traffic.at_work += 1
        with (
            pytest.raises(TooManyError, match="101 requests are at work, and this one holds 3: 10 are the most"),
            traffic.more(2, 10),
        ):
            pytest.fail("no room")
        traffic.at_work -= 1
    assert traffic.at_work == 1


def test_a_stream_lets_go_however_it_ends() -> None:
    async def parts(fails: bool = False) -> Any:
        yield 1
        if fails:
            raise RuntimeError
        yield 2

    def held(fails: bool = False) -> tuple[Held, Traffic, Chooser]:
        traffic, chooser = Traffic(), Chooser(["a"], Objective(90, 300), lambda: 0.0, least=1)
        stack = ExitStack()
        stack.enter_context(traffic.more(2, 10))
        stack.enter_context(chooser.timing("a", 1))
        assert traffic.at_work == 2
        return Held(parts(fails), stack, lambda part: RuntimeError() if part == tells else None), traffic, chooser

    tells = 0

    async def read(stream: Held, most: int = 9) -> list[int]:
        found: list[int] = []
        async for part in stream:
            found.append(part)
            if len(found) == most:
                break
        return found

    whole, traffic, chooser = held()
    assert asyncio.run(read(whole)) == [1, 2]
    assert traffic.at_work == 0 and chooser.keeps("a", 1) is True
    broken, traffic, chooser = held(fails=True)
    with pytest.raises(RuntimeError):
        asyncio.run(read(broken))
    assert traffic.at_work == 0 and chooser.keeps("a", 1) is False
    tells = 1
    telling, traffic, chooser = held()
    assert asyncio.run(read(telling)) == [1, 2], "what a stream tells of is passed on"
    assert traffic.at_work == 0 and chooser.keeps("a", 1) is False
    tells = 0
    left, traffic, _ = held()
    assert asyncio.run(read(left, 1)) == [1] and traffic.at_work == 2
    del left
    assert traffic.at_work == 0
    never, traffic, chooser = held()
    del never
    assert traffic.at_work == 0 and chooser.keeps("a", 1) is None


def test_an_error_in_a_stream_is_told_from_text_about_one() -> None:
    failed = 'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
    assert told_error(failed) == told_error(failed.encode()) == {"message": "EngineCore died", "code": 500}
    said = 'data: {"choices": [{"text": "x"}]}\n\n'
    assert told_error(said + failed + "data: [DONE]\n\n") == {"message": "EngineCore died", "code": 500}
    for fine in (said, "data: [DONE]\n\n", 'data: {"choices": [{"text": "{\\"error\\": {}}"}]}\n\n', ""):
        assert told_error(fine) is None


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly() -> Any:
        yield b"x"
        await asyncio.sleep(5)
        yield b"x"

    monkeypatch.setattr("raylp.serve.gate.BODY_S", 0.05)
    gate = gate_to(echo)
    (late,) = ask(gate, ("POST", "/translate", {"content": slowly()}))
    assert late.status_code == 408 and gate.traffic.at_work == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "\\ud83d"}', 400),
        (b'{"prompt": ["\\uDE00"]}', 400),
        (b'{"\\udc00": 1}', 400),
        (b'{"prompt": "\xed\xa0\x80"}', 400),
        (b'{"prompt": "\\ud83d\\ude00"}', 200),
        ('{"prompt": "\ud55c"}'.encode(), 200),
        (b'{"prompt": "\\\\ud800"}', 200),
        (b'{"prompt": "\\ud800', 200),
    ],
)
def test_half_a_character_is_refused(body: bytes, status: int) -> None:
    (answer,) = ask(gate_to(echo), ("POST", "/translate", {"content": body}))
    assert answer.status_code == status


def test_keys_are_read_by_line() -> None:
    assert read_keys("# mine\nsecret\n\n  secret \n") == ["secret", "secret"]
    assert key_hash(b"secret") == KEY and "secret" not in KEY


# --- by latency ---


@pytest.mark.parametrize(
    ("text", "percentile", "ms"), [("p90=300ms", 90, 300), ("p99=1.5s", 99, 1500), (" p99.9=20ms", 99.9, 20)]
)
def test_objectives(text: str, percentile: float, ms: float) -> None:
    assert read_objective(text) == Objective(percentile, ms)


@pytest.mark.parametrize("text", ["300ms", "p90", "p90=300", "p0=3ms", "p90=0ms", "p100=3ms", "q90=300ms", ""])
def test_wrong_objectives_are_told_what_is_meant(text: str) -> None:
    with pytest.raises(UserError, match=r"p90=300ms or p99=1\.5s"):
        read_objective(text)


class World:
    """A clock, and models of which each takes so many ms for each request at work."""

    def __init__(self, **cost: float) -> None:
        self.now = 0.0
        self.cost = cost
        self.chooser = Chooser(list(cost), Objective(90, 300), lambda: self.now)

    def requests(self, load: int, count: int = 20) -> list[str]:
        chosen = []
        for _ in range(count):
            model = self.chooser.choose(load)
            self.now += 0.05
            self.chooser.done(model, load, self.cost[model] * load)
            chosen.append(model)
        return chosen


def test_the_one_with_the_most_layers_answers_while_it_is_quick_enough() -> None:
    world = World(whole=100, cut=60, stump=20)
    assert set(world.requests(2)) == {"whole"}
    assert world.requests(4)[-10:] == ["cut"] * 10, "400 ms against 240"
    assert world.requests(8)[-10:] == ["stump"] * 10
    assert world.requests(100)[-10:] == ["stump"] * 10, "no model keeps it: the quickest does what it can"


def test_when_the_load_falls_the_better_one_is_back_at_once() -> None:
    world = World(whole=100, cut=20)
    world.requests(2)
    world.requests(9)
    assert world.requests(2)[0] == "whole"


def test_what_was_too_slow_is_tried_again_after_a_while() -> None:
    world = World(whole=400, cut=20)
    assert world.requests(1)[-10:] == ["cut"] * 10
    world.cost["whole"] = 100  # another program had the machine
    assert set(world.requests(1, 100)) == {"cut"}
    world.now += 31
    assert world.requests(1)[-1] == "whole"


def test_seldom_requests_teach_as_well() -> None:
    world = World(whole=2000, cut=20)
    chosen = []
    for _ in range(100):
        world.now += 8
        chosen += world.requests(1, 1)
    assert chosen[:5] == ["whole"] * 5
    assert chosen[5:].count("whole") <= 5, "half of what p90 lets be late"
    world.cost["whole"] = 100
    for _ in range(30):
        world.now += 8
        chosen += world.requests(1, 1)
    assert chosen[-1] == "whole"


def test_a_model_that_has_stopped_is_left_while_its_requests_wait() -> None:
    now = 0.0
    chooser = Chooser(["stalled", "well"], Objective(90, 300), lambda: now)
    for _ in range(20):
        chooser.done("stalled", 1, 100)
    with ExitStack() as stack:
        for _ in range(3):
            assert chooser.choose(1) == "stalled"
            stack.enter_context(chooser.timing("stalled", 1))
        now = 1.0
        assert [chooser.choose(load) for load in (1, 1, 4)] == ["well"] * 3
        now = 100.0
        assert chooser.choose(1) == "well"
    now = 200.0
    assert chooser.choose(1) == "stalled", "tried again when it may be well"


def test_a_load_is_judged_by_lighter_and_heavier_ones() -> None:
    world = World(whole=100)
    world.requests(4)
    assert world.chooser.keeps("whole", 16) is False, "400 ms at 4 will not be less at 16"
    world = World(whole=100)
    world.requests(3)
    assert world.chooser.keeps("whole", 1) is True
    assert world.chooser.keeps("whole", 16) is None


def test_a_light_load_in_between_is_no_reason_to_try_again() -> None:
    world = World(deep=100, shallow=30)
    world.requests(8)
    late = sum(world.requests(1, 1) == ["deep"] and world.requests(8, 1) == ["deep"] for _ in range(500))
    assert late <= 500 // 20, "half of what p90 lets be late"


def test_a_model_that_fails_is_left() -> None:
    world = World(dead=100, well=200)
    world.chooser.is_failure = lambda error: not isinstance(error, LookupError)
    world.requests(1)

    def failures(error: Exception) -> int:
        count = 0
        for _ in range(100):
            world.now += 0.05
            model = world.chooser.choose(1)
            with suppress(type(error)), world.chooser.timing(model, 1):
                if model == "dead":
                    count += 1
                    raise error
        return count

    assert failures(LookupError()) == 100, "what the client did wrong says nothing"
    assert failures(RuntimeError()) <= 10


def test_a_request_that_is_given_up_counts_where_it_was_late() -> None:
    now = 0.0
    chooser = Chooser(["slow", "quick"], Objective(90, 300), lambda: now)

    def given_up_after(seconds: float) -> None:
        nonlocal now
        with suppress(asyncio.CancelledError), chooser.timing(chooser.choose(1), 1):
            now += seconds
            raise asyncio.CancelledError

    for _ in range(10):
        given_up_after(0.1)
    assert chooser.keeps("slow", 1) is None, "it might have been in time"
    for _ in range(5):
        given_up_after(1.0)
    assert chooser.choose(1) == "quick"


def test_what_is_unknown_is_tried_by_a_few_at_a_time() -> None:
    chooser = Chooser(["slow", "quick"], Objective(90, 300), lambda: 0.0)
    with ExitStack() as stack:
        chosen = []
        for _ in range(20):
            chosen.append(chooser.choose(1))
            stack.enter_context(chooser.timing(chosen[-1], 1))
    assert chosen == ["slow"] * 5 + ["quick"] * 15


def test_one_model_of_each_depth_is_chosen_from() -> None:
    layers = {"baseline": 18, "original": 18, "pruned-16": 16, "healed-16": 16, "baseline-healed": 18, "merged-14": 14}
    layers |= {"pruned-14": 14, "pruned-12": 12}
    assert one_for_each_depth(layers) == ["baseline-healed", "healed-16", "merged-14", "pruned-12"]


def test_the_percentile_is_the_one_asked_for() -> None:
    for slow, kept in ((1, True), (2, True), (3, False)):
        chooser = Chooser(["a", "b"], Objective(90, 300), lambda: 0.0)
        for i in range(20):
            chooser.done("a", 1, 900 if i < slow else 100)
        assert chooser.keeps("a", 1) is kept, slow
