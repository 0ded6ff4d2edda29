"""The endpoint and the load on it: what can be known without an engine, and one start of Serve with two tiny models."""

import asyncio
import io
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import httpx
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
import toy
import uvicorn
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raylp.bench.batches import check_room
from raylp.bench.config import Bench
from raylp.bench.ideal import Text, ideal, work
from raylp.bench.load import Answering, Load, Measurement, Timing, arrivals, measure
from raylp.bench.meters import EnergyMeter, MemoryMeter
from raylp.bench.stage import (
    LATENCIES,
    RATES,
    Cell,
    bench,
    failures,
    measure_batches,
    measure_missing,
    plan_bench,
    prompt_lengths,
    ratios,
    resources,
    schedule,
    summary,
)
from raylp.bench.stats import _percentiles_of, mean_of_repeats, percentiles, ratio, verdict
from raylp.cluster import cores
from raylp.context import Context, Splits
from raylp.data.corpus import read_pairs
from raylp.data.prompt import Prompt
from raylp.distill.config import Distill
from raylp.distill.stage import distill
from raylp.errors import UserError
from raylp.generate.base import Request
from raylp.generate.engine_log import error_lines
from raylp.generate.translate import translate
from raylp.models.checkpoint import card_for, save_checkpoint
from raylp.models.load import load_model
from raylp.names import choose_models
from raylp.pipeline import outputs_there
from raylp.progress import Reporter
from raylp.recipe import parse_recipe
from raylp.rundir import RunDir
from raylp.serve.config import Serve
from raylp.serve.endpoint import (
    check_memory,
    deploy_file,
    endpoint,
    free_port,
    gpu_share,
    serve_dtype,
    usage,
)
from raylp.serve.gate import key_hash

REMOVED = toy.TRUTH.answers[0]
PRUNED = f"pruned-{toy.TRUTH.num_layers - len(REMOVED)}"

latencies = st.lists(st.lists(st.floats(0.1, 1e5), min_size=1, max_size=20), min_size=2, max_size=5)


# --- statistics ---


@given(latencies)
@settings(max_examples=20)
def test_percentiles_lie_in_their_intervals(repeats: list[list[float]]) -> None:
    requests = [[[value] for value in values] for values in repeats]
    found = percentiles(requests, "x")
    pooled = [value for values in repeats for value in values]
    values = [found[name]["value"] for name in ("p50", "p90", "p99")]
    assert values == sorted(values)
    assert values[0] == pytest.approx(np.median(pooled))
    for stat in found.values():
        assert set(stat) == {"value", "low", "high", "n", "signature"}
        assert min(pooled) <= stat["low"] <= stat["value"] <= stat["high"] <= max(pooled) * (1 + 1e-9)
        assert stat["n"] == len(pooled)
    assert percentiles(requests, "x") == found, "no chance in it"


def test_an_interval_knows_that_requests_of_a_repeat_are_alike() -> None:
    rng = np.random.default_rng(0)
    alike = np.stack([rng.normal(level, 1, 20) for level in (90, 100, 110)])
    mixed = rng.permutation(alike.ravel()).reshape(3, 20)
    wide, narrow = (percentiles(values[:, :, None].tolist(), "x")["p50"] for values in (alike, mixed))
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]


def test_an_interval_knows_that_waits_of_an_answer_are_alike() -> None:
    rng = np.random.default_rng(0)
    levels = rng.normal(100, 10, (2, 20))
    answers = levels[:, :, None] + rng.normal(0, 1, (2, 20, 30))
    together, apart = (percentiles(v.tolist(), "x")["p50"] for v in (answers, answers.reshape(2, 600, 1)))
    assert (together["value"], together["n"]) == (apart["value"], apart["n"])
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 3)), min_size=2))
def test_percentiles_of_values_drawn_several_times(drawn: list[tuple[float, int]]) -> None:
    values, times = (np.asarray(column) for column in zip(*sorted([*drawn, (0.0, 1)]), strict=True))
    found = _percentiles_of(values, times, [50, 90, 99])
    assert found == pytest.approx(np.percentile(np.repeat(values, times), [50, 90, 99]))


def test_intervals_of_many_waits_need_little_memory() -> None:
    """Two repeats of 500 answers with 255 waits: 255,000 numbers, and 1,000 resamples of them."""
    answers = np.random.default_rng(0).normal(20, 1, (2, 500, 255)).tolist()
    tracemalloc.start()
    assert percentiles(answers, "x")["p50"]["value"] == pytest.approx(20, abs=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_mean_of_repeats() -> None:
    found = mean_of_repeats([10.0, 12.0, 11.0], "x")
    assert (found["value"], found["n"]) == (11.0, 3)
    assert found["high"] - 11 == pytest.approx(4.303 / math.sqrt(3))
    assert mean_of_repeats([5.0, 5.0], "x")["low"] == 5.0
    assert mean_of_repeats([1.0, 30.0], "x")["low"] == 0.0, "a throughput is not negative"


def test_a_ratio_is_that_of_pairs() -> None:
    drifting = [100.0, 50.0, 25.0, 80.0, 60.0]
    found = ratio([1.2 * value for value in drifting], drifting, "x")
    assert (found["value"], found["low"], found["high"]) == pytest.approx((1.2, 1.2, 1.2))
    assert verdict(found) == "more"
    noisy = ratio([1.3, 0.9, 1.2, 0.7, 1.0], [1.0] * 5, "x")
    assert noisy["low"] < 1 < noisy["high"] and verdict(noisy) == "unclear"
    assert verdict(ratio([0.80, 0.81, 0.79], [1.0] * 3, "x")) == "less"


def test_differences_are_found_where_they_are_and_not_where_they_are_not() -> None:
    """Noise of 3%, five repeats: of 400 pairs without a difference about one in twenty seems to have one."""
    rng = np.random.default_rng(0)

    def found(slowdown: float) -> int:
        pairs = (np.exp(rng.normal(0, 0.03, (2, 5))) for _ in range(400))
        return sum(verdict(ratio(a, slowdown * b, "x")) != "unclear" for a, b in pairs)

    assert 8 <= found(1.0) <= 34
    assert found(1.1) >= 360


def test_a_latency_that_is_less_is_faster() -> None:
    config = Bench(models=["a", "b"], concurrency=[1], rates=[2], repeats=5, metric="tpot_ms")
    slow, fast = ([Timing(1, ms, 1, 4)] for ms in (20.0, 10.0))
    found = {}
    for load in config.loads:
        for r in range(5):
            found[Cell("a", load, r)], found[Cell("b", load, r)] = (Measurement(t, [], 1) for t in (slow, fast))
    made = ratios(["a", "b"], config, found)["b"]
    assert {name: (row["value"], row["verdict"]) for name, row in made.items()} == {
        "c1": (pytest.approx(2.0), "faster"),
        "r2": (pytest.approx(2.0), "faster"),
    }
    few = config.model_copy(update={"repeats": 2})
    assert {row["verdict"] for row in ratios(["a", "b"], few, found)["b"].values()} == {"unclear"}


def test_what_comes_at_a_rate_is_compared_by_its_times() -> None:
    """Both give the tokens that were asked for a second; the quicker one's requests last half as long."""
    config = Bench(models=["a", "b"], concurrency=[1], rates=[2], batches=[4], repeats=5)
    slow, fast = (Measurement([Timing(1, 5, ms, 8)] * 4, [], 2) for ms in (20.0, 10.0))
    found = {}
    for load in config.loads:
        for r in range(5):
            found[Cell("a", load, r)], found[Cell("b", load, r)] = slow, fast
    by = {name: (row["metric"], row["verdict"]) for name, row in ratios(["a", "b"], config, found)["b"].items()}
    assert by["r2"] == ("e2e_ms", "faster")
    assert by["c1"][0] == by["vllm-b4"][0] == "output_tokens_per_s"


def test_answers_in_one_piece_have_no_time_between_tokens() -> None:
    config = Bench(models=["a", "b"], concurrency=[1], repeats=2, metric="itl_ms", output_tokens=None)
    at_once, failed = Measurement([Timing(1, None, 2, 1)], [], 1), Measurement([], ["status 500"], 1)
    found = {Cell(name, config.loads[0], r): (at_once, failed)[r] for name in "ab" for r in range(2)}
    table = summary(["a", "b"], config, found)["a"]["c1"]
    assert not {"itl_ms", "tpot_ms"} & set(table) and table["ttft_ms"]["p50"]["n"] == 1
    assert at_once.goodput({"tpot_ms": 1, "e2e_ms": 3}) == 1, "none that is too long"
    assert ratios(["a", "b"], config, found) == {}
    rows = {cell: {"joules": 3.0, "measurement": measurement.as_dict()} for cell, measurement in found.items()}
    assert "energy" not in resources(["a", "b"], config, rows)


def counter(zone: Path, joules: float, name: str = "package-0") -> None:
    zone.mkdir(exist_ok=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(str(int(joules * 1e6)))
    (zone / "max_energy_range_uj").write_text(str(int(1000 * 1e6)))


def test_energy_is_counted_where_it_is_and_absent_where_not(tmp_path: Path) -> None:
    absent = EnergyMeter(tmp_path, lambda: None)
    assert (absent.joules(), absent.source) == (None, None)
    for name, joules in (("intel-rapl:0", 10), ("intel-rapl:1", 990), ("intel-rapl:0:0", 5)):
        counter(tmp_path / name, joules)
    counter(tmp_path / "intel-rapl:2", 7, "psys")
    meter = EnergyMeter(tmp_path, lambda: None)
    counter(tmp_path / "intel-rapl:2", 9, "psys")  # the whole platform, packages and all
    counter(tmp_path / "intel-rapl:0", 12.5)
    counter(tmp_path / "intel-rapl:1", 3)  # began anew at 1000
    counter(tmp_path / "intel-rapl:0:0", 6)  # a part of package 0
    assert meter.joules() == pytest.approx(2.5 + 13)
    assert meter.source == "rapl"
    counts = iter([[100.0, 200.0], [130.0, 210.0]])
    assert EnergyMeter(tmp_path, lambda: next(counts)).joules() == 40, "GPUs first"
    assert EnergyMeter(tmp_path, lambda: [5.0]).joules() is None, "a counter that stands still measures nothing"


def test_memory_is_that_of_the_processes_with_the_mark() -> None:
    code = """
    held = bytearray(200_000_000); del held; print("before")
    input(); held = bytearray(90_000_000); del held; kept = bytearray(50_000_000); print("after")
    input()"""
    env = {**os.environ, "RAYLP_TEST_MARK": "here", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env, **pipes) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "before\n"
        meter = MemoryMeter.of_mark("RAYLP_TEST_MARK", "here")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "after\n"
        found = meter.peak()
        process.kill()
    assert found is not None and 90e6 < found < 140e6, "the peak since, and not the one before"
    assert MemoryMeter.of_mark("RAYLP_TEST_MARK", "there").peak() is None


def test_a_process_that_died_meanwhile_has_no_memory() -> None:
    """Until somebody asks how it ended it is still listed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        meter = MemoryMeter(lambda: [psutil.Process(process.pid), psutil.Process()])
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert (meter.peak() or 0) > 1e6


# --- the clients, against a server that takes a known time ---


CROWD: dict[str, list[int]] = {"one": [], "six": [], "open": []}


@pytest.fixture(scope="module")
def metronome() -> Iterator[str]:
    """A server that begins to answer after 100 ms and then gives a token each 20 ms, however many ask.

    It takes `model` as the name of a list in `CROWD`, where it notes how many there were at each request.
    """
    here = 0

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        nonlocal here
        here += 1
        try:
            await beat(receive, send)
        finally:
            here -= 1

    async def beat(receive: Any, send: Any) -> None:
        asked = json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 200 if asked["model"] in CROWD else 404, "headers": []})
        CROWD.get(asked["model"], []).append(here)
        usage = {"completion_tokens": asked["max_tokens"], "prompt_tokens": 3}
        if not asked.get("stream"):
            await asyncio.sleep(0.1)
            whole = json.dumps({"choices": [{"text": "x" * asked["max_tokens"]}], "usage": usage}).encode()
            await send({"type": "http.response.body", "body": whole})
            return
        for i in range(asked["max_tokens"]):
            await asyncio.sleep(0.02 if i else 0.1)
            await send(part({"choices": [{"text": "\u2028\x85"}]}))  # no end of a line, in JSON
        await send(part({"choices": [], "usage": usage}))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def part(chunk: dict[str, Any]) -> dict[str, Any]:
        body = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
        return {"type": "http.response.body", "body": body, "more_body": True}

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(answer, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_clients_measure_what_the_server_takes(metronome: str) -> None:
    prompts = [Request((1, 2, 3), 5)] * 6
    one = measure(metronome, "one", prompts, Load("closed", 1), Answering(5))
    assert len(one.timings) == 6 and not one.errors
    for timing in one.timings:
        assert timing.ttft_ms >= 100
        assert timing.tpot_ms >= 19
        assert len(timing.itl_ms) == 4 and timing.input_tokens == 3
        assert timing.e2e_ms == pytest.approx(timing.ttft_ms + 4 * timing.tpot_ms)
    assert one.seconds >= 6 * 0.18
    assert CROWD["one"] == [1] * 6
    whole = measure(metronome, "one", prompts, Load("closed", 1), Answering(5, stream=False))
    assert [(t.tokens, t.input_tokens, t.itl_ms) for t in whole.timings] == [(5, 3, ())] * 6
    assert all(t.ttft_ms == t.e2e_ms >= 100 for t in whole.timings)
    six = measure(metronome, "six", prompts, Load("closed", 6), Answering(5))
    assert max(CROWD["six"]) == 6
    assert six.requests_per_s == 6 / six.seconds
    with pytest.raises(UserError, match=r"answered none of 6 requests to model nobody: .*404"):
        measure(metronome, "nobody", prompts, Load("closed", 2), Answering(5))


def test_an_open_loop_does_not_wait(metronome: str) -> None:
    """At 50 a second and 180 ms each, some nine are on their way at a time."""
    prompts = [Request((1, 2, 3), 5)] * 20
    times = arrivals(50, 20, 7)
    assert times[0] == 0 and times == sorted(times) and arrivals(50, 20, 7) == times != arrivals(50, 20, 8)
    assert times[-1] == pytest.approx(20 / 50, rel=0.6)
    found = measure(metronome, "open", prompts, Load("open", 50), Answering(5), seed=7)
    assert found.seconds >= times[-1] + 0.18
    assert len(found.timings) == 20
    assert max(CROWD["open"]) >= 4


def test_models_take_turns() -> None:
    cells = schedule(["a", "b"], [Load("closed", 1), Load("open", 8)], 2)
    assert [(cell.model, cell.load.value) for cell in cells] == [
        *(("a", 1), ("b", 1), ("a", 8), ("b", 8)),
        *(("b", 1), ("a", 1), ("b", 8), ("a", 8)),
    ]
    assert len(set(cells)) == len(cells) == 8


def test_summary_has_the_shape_of_the_contract() -> None:
    config = Bench(models=["a"], concurrency=[2], requests=4, repeats=2)
    timings = [Timing(10.0, 2.0, 72.0, 32, (1.0, 3.0), 5), Timing(20.0, 3.0, 113.0, 32, (3.0,), 7)]
    measurement = Measurement(timings, [], 0.5)
    assert Measurement.from_dict(json.loads(json.dumps(measurement.as_dict()))) == measurement
    found = {Cell("a", Load("closed", 2), r): measurement for r in range(2)}
    speed = summary(["a"], config, found)["a"]["c2"]
    assert set(speed) == {*LATENCIES, *RATES}
    assert speed["ttft_ms"]["p50"]["value"] == 15.0
    assert speed["itl_ms"]["p50"]["value"] == 3.0
    assert [speed[key]["value"] for key in RATES] == [128.0, 24.0, 152.0, 4.0]
    json.dumps(speed)
    good = config.model_copy(update={"goodput": {"ttft_ms": 15, "e2e_ms": 100}})
    assert summary(["a"], good, found)["a"]["c2"]["goodput_per_s"]["value"] == 2.0, "one of the two"


# --- what pruning can gain at best ---


def test_ideal_speedup_of_a_known_model(toy_checkpoint: Path, tmp_path: Path) -> None:
    width, feed_forward, heads, kv_heads, size = 128, 256, 4, 2, 32
    layer = width * size * (2 * heads + 2 * kv_heads) + 3 * width * feed_forward + 2 * width
    vocabulary = len(toy.toy_tokenizer()) * width
    whole = work(toy_checkpoint)
    assert whole.layers == toy.TRUTH.num_layers * layer
    assert whole.vocabulary == vocabulary, "tied: stored once, read once a step"
    assert whole.kv_per_token == toy.TRUTH.num_layers * 2 * kv_heads * size

    pruned = tmp_path / "pruned"
    save_checkpoint(load_model(toy_checkpoint), toy_checkpoint, pruned, {}, REMOVED)
    left = toy.TRUTH.num_layers - len(REMOVED)
    found = ideal({"whole": toy_checkpoint, "pruned": pruned}, {"c1": 1, "c1000": 1000}, Text(0), 2)
    expected = (toy.TRUTH.num_layers * layer + vocabulary) / (left * layer + vocabulary)
    assert found["pruned"]["speedup"]["c1"]["by_bytes"] == pytest.approx(expected)
    assert found["pruned"]["speedup"]["c1"]["by_operations"] == pytest.approx(expected)
    assert found["pruned"]["bytes"]["layers"] == left * layer * 2
    assert set(found["whole"]["speedup"]["c1"].values()) == {1.0}
    # A prompt asks the vocabulary once, for its last token; the part that is known from others costs nothing.
    long, short = (
        ideal({"whole": toy_checkpoint, "pruned": pruned}, {"c1": 1}, text, 2)["pruned"]["speedup"]["c1"]
        for text in (Text(1000, 0, 8), Text(1000, 999, 8))
    )
    assert long["prompt_by_operations"] == pytest.approx(toy.TRUTH.num_layers / left, rel=1e-2)
    assert 1 < expected < short["prompt_by_operations"] < long["prompt_by_operations"]
    assert short["by_operations"] < long["request_by_operations"] < long["prompt_by_operations"]
    assert whole.prompt_multiply_adds(Text(1)) == pytest.approx(whole.multiply_adds(1, 0.5))
    told = Text(0, answer=5)
    assert whole.request_multiply_adds(told) == pytest.approx(whole.vocabulary + 4 * whole.multiply_adds(1, 2.5))

    # With many sequences and long contexts, keys and values are what is read, and these are the layers' alone.
    models, loads = {"whole": toy_checkpoint, "pruned": pruned}, {"c1": 1, "c1000000": 10**6}
    crowd = ideal(models, loads, Text(1000), 2)["pruned"]["speedup"]
    assert crowd["c1"]["by_bytes"] < crowd[f"c{10**6}"]["by_bytes"]
    assert crowd[f"c{10**6}"]["by_bytes"] == pytest.approx(toy.TRUTH.num_layers / left, rel=1e-3)


def test_ideal_knows_experts() -> None:
    mixture = work(toy.tiny_random("mixtral"))
    assert (mixture.num_experts, mixture.experts_used) == (4, 2)
    assert mixture.experts == 6 * 4 * 3 * 64 * 128
    one, many = mixture.numbers_read(1, 0), mixture.numbers_read(1000, 0)
    assert many - one == pytest.approx(mixture.experts / 2), "one token reads half of the experts, many read all"
    assert mixture.multiply_adds(2, 0) == 2 * mixture.multiply_adds(1, 0)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma3", "qwen2"])
def test_ideal_of_other_families(kind: str) -> None:
    found = work(toy.tiny_random(kind))
    assert found.layers > 0
    assert found.vocabulary >= len(toy.toy_tokenizer()) * 64


# --- before a start ---


def test_choose_models() -> None:
    there = {name: Path(name) for name in ("baseline", "pruned-9", "healed-15", "healed-9", "baseline-healed")}
    assert list(choose_models(None, there, "x")) == list(there)
    assert list(choose_models(["healed", "baseline", "baseline-healed"], there, "x")) == [
        "healed-9",
        "baseline",
        "baseline-healed",
    ]
    with pytest.raises(UserError, match=r"bench.models: the run has no model 'heald'; it has baseline, pruned-9"):
        choose_models(["heald"], there, "bench.models")


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"serve.port: 127.0.0.1:{port} cannot be used .*serve.port=8001"):
            free_port("127.0.0.1", port, 0.3)
        assert free_port("127.0.0.1", 0) not in (0, port)


def test_gpus_are_shared_evenly() -> None:
    assert gpu_share("auto", 2, 0) == 0
    assert gpu_share("auto", 2, 8) == 1
    assert gpu_share("auto", 2, 1) == 0.5
    assert gpu_share("auto", 3, 2) == 0.5, "three halves fit on two, three times two thirds do not"
    assert gpu_share(0.25, 2, 1) == 0.25


def test_what_a_cpu_computes_itself_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_dtype(Serve(), "auto", 1) == "bfloat16"
    for found, dtype in (("avx512_bf16", "bfloat16"), ("avx512_f", "float32")):
        capable = {"architecture": "x86_64", found: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: capable)
        assert serve_dtype(Serve(), "auto", 0) == serve_dtype(Serve(), "bfloat16", 0) == dtype
    assert serve_dtype(Serve(), "float32", 1) == "float32"
    assert serve_dtype(Serve(dtype="float16"), "float32", 1) == "float16"


def test_memory_is_checked_with_its_numbers() -> None:
    check_memory("serving a", 2e9, 1e9, 4e9, 20e9)
    with pytest.raises(
        UserError, match=r"serving a needs about 20.5 GB .*weights 6.5, .*caches 3.0.* 20.0 GB are free"
    ):
        check_memory("serving a", 6.5e9, 3e9, 11e9, 20e9)


def test_error_lines_find_the_cause() -> None:
    log = """INFO loading
    Traceback (most recent call last):
    ValueError: head size 8 is not supported
        raise RuntimeError(
    RuntimeError: Engine core initialization failed. See root cause above.
    vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.
    """
    assert error_lines(log)[-1] == "ValueError: head size 8 is not supported"
    assert error_lines("    raise RuntimeError(") == []
    assert error_lines("RuntimeError: Engine core initialization failed.")
    assert error_lines("INFO all is well") == []


def test_wrong_sections_are_refused() -> None:
    for section, message in (
        ({"bench": {"concurrency": [1, 1]}}, "none twice"),
        ({"bench": {"repeats": 1}}, "greater than or equal to 2"),
        ({"serve": {"replicas": 2, "max_replicas": 1}}, "less than replicas"),
        ({"serve": {"slo": "quick"}}, "p90=300ms"),
    ):
        with pytest.raises(UserError, match=message):
            parse_recipe({"model": "m", "data": {"en-de": {"test": "x"}}, "run_dir": "r", **section})


# --- one line in, one line out ---


@pytest.fixture(scope="module")
def pruned(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruned")
    card = card_for(
        "toy", "0", "model.layers", list(REMOVED), Prompt(template=toy.TOY_TEMPLATE).model_dump(mode="json")
    )
    save_checkpoint(load_model(toy_checkpoint), toy_checkpoint, path, card, REMOVED)
    return path


def test_translate_keeps_lines(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = toy.toy_splits()["test"][:10]
    endless = " ".join(row["source"] for row in toy.toy_splits()["train"])
    lines = [row["source"] for row in rows]
    lines[3:3] = ["", "   ", endless]
    out = io.StringIO()
    translate(pruned, "xx-yy", lines, out, batch_size=4)
    found = out.getvalue().split("\n")
    assert found.pop() == ""
    assert len(found) == len(lines)
    assert [found[i] for i in (0, 1, 2, *range(6, 13))] == [row["target"] for row in rows]
    assert found[3:5] == ["", ""]
    assert "line 6: " in capsys.readouterr().err


def test_translate_answers_as_lines_come(pruned: Path) -> None:
    out = io.StringIO()
    answered = []

    def typed() -> Iterator[str]:
        for row in toy.toy_splits()["test"][:3]:
            yield row["source"]
            answered.append(out.getvalue().count("\n"))

    translate(pruned, "xx-yy", typed(), out, batch_size=1)
    assert answered == [1, 2, 3]


def test_translate_refuses_early(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint is there"):
        translate(tmp_path, "xx-yy", [], io.StringIO())
    with pytest.raises(UserError, match="hyphen"):
        translate(pruned, "xxyy", [], io.StringIO())


# --- through the engines ---


@pytest.fixture(scope="module")
def context(
    ray_session: None,
    toy_checkpoint: Path,
    toy_data: dict[str, Path],
    pruned: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Context:
    run_dir = tmp_path_factory.mktemp("serve") / "run"
    recipe = parse_recipe(
        {
            "model": str(toy_checkpoint),
            "data": {"xx-yy": {"test": str(toy_data["test"])}},
            "run_dir": str(run_dir),
            "serve": {
                "port": 0,
                "dtype": "float32",
                "max_model_len": 128,
                "ready_timeout_s": 400,
                "slo": "p90=60s",
                "max_sentences": 20,
            },
            "bench": {
                "models": ["baseline", "pruned"],
                "concurrency": [1, 3],
                "rates": [20],
                "requests": 4,
                "output_tokens": 8,
                "warmup": 1,
                "repeats": 2,
            },
        }
    )
    rundir = RunDir(recipe.run_dir)
    with rundir.building(f"models/{PRUNED}") as scratch:
        for file in pruned.iterdir():
            (scratch / file.name).write_bytes(file.read_bytes())
    splits = Splits(test={"xx-yy": read_pairs(toy_data["test"], "xx-yy")})
    prompt = Prompt(template=toy.TOY_TEMPLATE)
    return Context(recipe, rundir, splits, prompt, toy_checkpoint, "float32", Reporter(io.StringIO()))


@pytest.mark.slow
def test_endpoint_and_bench(context: Context, toy_data: dict[str, Path], tmp_path: Path) -> None:
    notes: list[str] = []
    models = context.models()
    assert list(models) == ["baseline", PRUNED]
    plan = plan_bench(context)
    with endpoint(context, models, notes.append) as served:
        url = served.url
        assert set(served.ready_s) == set(models)
        titles = [" ".join(process.cmdline()) for process in psutil.process_iter() if process.status() != "zombie"]
        assert sum("VLLM::EngineCore" in title for title in titles) == 2
        assert not any("VLLM::Worker" in title for title in titles), "the engine's process computes too"
        port = int(url.rpartition(":")[2])
        speaks_openai(url)
        translates(url, context)
        refuses(url)
        if browser.missing() is None:
            shows(url, Path(context.recipe.run_dir) / PICTURE)
        example = shlex.split(usage(context, url, list(models)).partition("try: ")[2])
        answer = httpx.post(example[1], json=json.loads(example[-1]), timeout=60)
        assert example[0] == "curl" and answer.json()["model"] == PRUNED
        teaches(context, f"{url}/v1", toy_data, tmp_path)
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be used"):
            free_port("127.0.0.1", port, 0)

        measure_missing(context, plan, served)
        before = {cell: context.rundir.read_text(plan.file(cell)) for cell in plan.cells}
        assert len(before) == 2 * 3 * 2
        lost, beside = (Cell(name, Load("closed", 3), 1) for name in ("baseline", PRUNED))
        context.rundir.remove(plan.file(lost))  # as after a kill
        measure_missing(context, plan, served)
        after = {cell: context.rundir.read_text(plan.file(cell)) for cell in plan.cells}
        assert {cell for cell in after if after[cell] != before[cell]} == {lost, beside}, "pairs are of one start"
        pool = ThreadPoolExecutor()
        last = [pool.submit(httpx.post, f"{url}/v1/completions", json=LONG, timeout=60) for _ in range(4)]
        while "raylp_requests_at_work 4.0" not in httpx.get(f"{url}/metrics", timeout=30).text:
            assert not all(future.done() for future in last), "the answers are too quick to be waited for"
    assert [future.result().status_code for future in last] == [200] * 4, "what is at work is finished"
    assert notes and all("starting" in note for note in notes)
    assert free_port("127.0.0.1", port) == port, "a second start can take the same port"
    assert "Initializing a V1 LLM engine" in (context.rundir.logs() / "serve-baseline.log").read_text()

    bench(context)  # all is measured: nothing starts
    result = context.rundir.read_json("bench.json")
    assert result["sizes"][PRUNED]["layers"] < result["sizes"]["baseline"]["layers"]
    assert result["starts"] == 2
    assert result["errors"] == 0
    for name in models:
        for setting, n in (("c1", 8), ("c3", 12), ("r20", 8)):
            speed = result["models"][name][setting]
            assert speed["ttft_ms"]["p50"]["n"] == n
            assert 0 < speed["tpot_ms"]["p50"]["value"] < speed["e2e_ms"]["p50"]["value"]
            assert speed["ttft_ms"]["p50"]["value"] < speed["e2e_ms"]["p50"]["value"]
            assert speed["output_tokens_per_s"]["value"] > 0
    assert result["ideal"][PRUNED]["speedup"]["c1"]["by_bytes"] > 1
    assert result["machine"]["cores"] >= 1
    assert set(result["memory_bytes"]) == set(result["ready_s"]) == {"baseline", PRUNED}
    assert 1e8 < result["memory_bytes"]["baseline"]["endpoint"] < 1e10
    assert result["ready_s"]["baseline"]["endpoint"] > 1
    assert set(result["ratios"][PRUNED]) == {"c1", "c3", "r20"}
    assert result["ratios"][PRUNED]["c1"]["over"] == "baseline"


@pytest.mark.slow
def test_batches_are_measured_without_an_endpoint(context: Context, tmp_path: Path) -> None:
    section = {"models": ["baseline", "pruned"], "concurrency": [], "batches": [1, 8], "backends": ["transformers"]}
    section |= {"requests": 12, "repeats": 2, "metric": "tpot_ms", "output_tokens": None}
    config = Bench.model_validate(section)
    quick = replace(context, recipe=context.recipe.model_copy(update={"bench": config}))
    bench(quick)
    result = context.rundir.read_json("bench.json")
    for name in ("baseline", PRUNED):
        for setting, sentences in (("transformers-b1", 12), ("transformers-b8", 16)):
            speed = result["models"][name][setting]
            assert set(speed) == set(RATES)
            per_s = speed["output_tokens_per_s"]["value"] / speed["requests_per_s"]["value"]
            assert 4 < per_s < 12, "a toy sentence has so many tokens"
            plan = plan_bench(quick)
            cell = next(cell for cell in plan.cells if (cell.model, cell.load.name) == (name, setting))
            assert context.rundir.read_json(plan.file(cell))["measurement"]["counts"]["requests"] == sentences
            assert result["sent"][setting] == sentences
    made = result["ratios"][PRUNED]["transformers-b8"]
    assert (
        made["signature"].startswith("raylp|transformers-batch:8|out:natural")
        and "output_tokens_per_s" in made["signature"]
    )
    before = {cell: context.rundir.read_text(plan_bench(quick).file(cell)) for cell in plan_bench(quick).cells}
    measure_batches(quick, plan_bench(quick))
    assert before == {cell: context.rundir.read_text(plan_bench(quick).file(cell)) for cell in before}, "once is enough"
    assert result["ideal"][PRUNED]["speedup"]["transformers-b8"]["by_bytes"] > 1
    assert 1e8 < result["memory_bytes"][PRUNED]["transformers"] < 1e10 and "ready_s" in result
    assert result["failed"] == {} and result["errors"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_answers_in_batches_are_as_long_as_is_asked(context: Context, backend: str) -> None:
    """Past the end of the translation, and past a loop; again without what was remembered of the prompts."""
    config = Bench.model_validate(
        {"models": ["baseline"], "concurrency": [], "batches": [4], "backends": [backend], "requests": 4}
        | {"repeats": 2, "output_tokens": 40}
    )
    recipe = context.recipe.model_copy(update={"bench": config})
    bench(replace(context, recipe=recipe))
    (speed,) = context.rundir.read_json("bench.json")["models"]["baseline"].values()
    assert speed["output_tokens_per_s"]["value"] == pytest.approx(40 * speed["requests_per_s"]["value"])


def test_other_sentences_are_other_measurements(context: Context) -> None:
    """Where they are sent: what comes after the last of a load changes nothing."""
    plan = plan_bench(context)
    sent = max(plan.config.num_requests(cell.load) for cell in plan.cells)
    for place, same in ((1, False), (sent, True)):
        prompts = [Request((9,), 8) if i == place else prompt for i, prompt in enumerate(plan.prompts)]
        other = replace(plan, prompts=[*prompts, Request((9,), 8)])
        assert [other.file(cell) == plan.file(cell) for cell in plan.cells] == [same] * len(plan.cells)


def test_what_failed_is_measured_again(context: Context, tmp_path: Path) -> None:
    plan = plan_bench(context)
    fresh = replace(context, rundir=RunDir(str(tmp_path)))
    first, second, *_ = plan.cells
    good = Measurement([Timing(1, 1, 1, 4)], [], 1.0).as_dict()
    for start, errors, left in (("a", ["HTTP 429"], 0), ("b", [], 0), ("a", [], 2)):
        fresh.rundir.write_json(plan.file(first), {"start": "a", "measurement": good})
        fresh.rundir.write_json(plan.file(second), {"start": start, "measurement": {**good, "errors": errors}})
        assert plan.missing(fresh.rundir) == plan.cells[left:], "none failed, and the two are of one start"
    found = {first: Measurement.from_dict(good), second: Measurement([], ["HTTP 429"] * 3, 1.0)}
    assert failures(found) == {second.model: {second.load.name: 3}}
    for errors, done in ((3, False), (0, True)):
        fresh.rundir.write_json("bench.json", {"errors": errors})
        assert outputs_there(fresh, "bench") is done, "the stage is not done while there are failures"


def test_what_prompts_have_in_common() -> None:
    prompts = [Request((1, 2, 3, tail), 8) for tail in (4, 5)] + [Request((1, 2, 7, 4, 5, 6), 8)]
    assert prompt_lengths(prompts, 1) == (14 / 3, 2)
    assert prompt_lengths(prompts[:1] * 2, 1) == (4, 3), "the last token is always read"
    assert prompt_lengths(prompts[:2], 2) == (4, 2), "whole blocks"


def test_models_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"baseline, pruned-5 in memory together, about 5.0 GB, and 4.0 GB are free"):
        check_room({"baseline": 3e9, "pruned-5": 2e9}, 4e9)
    check_room({"baseline": 3e9}, 4e9)


def teaches(context: Context, url: str, toy_data: dict[str, Path], run_dir: Path) -> None:
    """`distill` asks a model behind an endpoint; what it refuses is the row's reason, not the end."""
    section = {"teacher": "baseline", "endpoint": url, "batch_size": 8, "filters": {"language": False}}
    recipe = context.recipe.model_copy(update={"distill": Distill.model_validate(section)})
    train = read_pairs(toy_data["train"], "xx-yy")[:20]
    train[2] = replace(train[2], source=" ".join(["nefi"] * 300))
    splits = Splits(train=train, test=context.splits.test)
    summary = distill(replace(context, recipe=recipe, splits=splits, rundir=RunDir(str(run_dir))))
    assert summary["rejected"]["failed"] == 1 and summary["rows"] == 20
    rows = pyarrow.parquet.read_table(run_dir / "distill" / "teacher.parquet").to_pylist()
    assert [row["id"] for row in rows] == [pair.id for pair in train]
    assert "HTTP 400" in rows[2]["translation"]
    nobody = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher": "nobody"})})
    elsewhere = RunDir(f"{run_dir}/nobody")
    with pytest.raises(UserError, match="gives no translations: HTTP 404"):
        distill(replace(context, recipe=nobody, splits=splits, rundir=elsewhere))
    assert not elsewhere.complete("distill"), "what the server's state is to blame for is no row's verdict"
    assert sum(row["translation"] == row["reference"] for row in rows) >= 18


def translates(url: str, context: Context) -> None:
    """Sentences by the run's prompt: what `translate` gives, in order; `auto` is the one with the most layers."""
    rows = toy.toy_splits()["test"][:12]
    endless = " ".join(row["source"] for row in toy.toy_splits()["train"])
    sentences = [row["source"] for row in rows]
    sentences[2:2] = ["", endless, "   "]
    out = io.StringIO()
    translate(context.models()[PRUNED], "xx-yy", sentences, out)
    alone = out.getvalue().split("\n")[:-1]
    for name in context.models():
        asked = {"sentences": sentences, "pair": "xx-yy", "model": name}
        found = httpx.post(f"{url}/translate", json=asked, timeout=60)
        assert found.status_code == 200, found.text
        answer = found.json()
        made = answer["translations"]
        assert [*made[:2], *made[5:]] == [row["target"] for row in rows]
        assert [*made[:3], *made[4:]] == [*alone[:3], *alone[4:]], "line for line as `raylp translate`"
        assert answer["cut"] == [3] and made[3] and answer["model"] == name
    auto = httpx.post(f"{url}/translate", json={"sentences": sentences[:1], "model": "auto"}, timeout=60)
    assert auto.json()["model"] == auto.headers["x-raylp-model"] == "baseline", "quick enough, by far"
    body = {"model": "auto", "prompt": f"{rows[0]['source']} =", "max_tokens": 4, "temperature": 0}
    whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert whole.json()["model"] == whole.headers["x-raylp-model"] == "baseline"
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as stream:
        assert stream.headers["x-raylp-model"] == "baseline"
        assert list(stream.iter_lines())[-2:] == ["data: [DONE]", ""]
    page = httpx.get(url + "/")
    assert page.status_code == 200 and f'"shown": ["baseline", "{PRUNED}"]' in page.text
    health = httpx.get(f"{url}/health", timeout=30)
    assert health.status_code == 200 and health.json()["status"] == "ok"
    said = httpx.get(f"{url}/metrics").text
    assert 'raylp_requests_total{path="/translate",status="200"} 3.0' in said
    assert "access-control-allow-origin" not in page.headers, "no other page may ask"


def shows(url: str, picture: Path) -> None:
    """The page in a real browser: two models side by side with their times, another choice, and what is refused."""
    row = toy.toy_splits()["test"][0]
    with browser.browser() as page:
        page.open(f"{url}/")
        page.type("#sentence", row["source"])
        page.click("#go")
        assert [time.split(": ")[0] for time in page.wait(".time", all)] == ["baseline", PRUNED]
        assert page.texts(".text") == [row["target"]] * 2
        assert page.complaints() == []
        page.type(".side:nth-of-type(2) select", "auto")
        page.type("#sentence", "\ue007")  # Enter
        page.wait(".time", lambda times: times[1].startswith("baseline: ") and times[1].endswith(" ms"))
        page.picture(picture)
        page.type("#sentence", f" {row['source']}" * 30)
        page.click("#go")
        page.wait(".time", lambda times: all(time.endswith(", the sentence was cut") for time in times))


@pytest.mark.slow
def test_a_browser_saw_the_page(context: Context) -> None:
    """In the test of the endpoint, which writes the picture, where there is a browser."""
    if program := browser.missing():
        pytest.skip(f"no {program}: on Debian and Ubuntu, apt install chromium chromium-driver")
    picture = Path(context.recipe.run_dir) / PICTURE
    if not picture.exists():
        pytest.skip("the test of the endpoint has not run to there")
    assert picture.stat().st_size > 5000


PICTURE = "page.png"
LONG = {"model": "baseline", "prompt": "a", "max_tokens": 100, "min_tokens": 100, "ignore_eos": True}


def refuses(url: str) -> None:
    """What a client does wrong is said to it, and the endpoint goes on."""
    for body, status, said in (
        (b"{", 400, "JSON"),
        (b'{"sentences": "one"}', 400, "sentences: "),
        (b'{"sentences": [], "pears": "xx-yy"}', 400, "pears"),
        (b'{"sentences": ["a"], "pair": "de-en", "model": "auto"}', 400, "one of xx-yy"),
        (b'{"sentences": ["a"], "model": "nobody"}', 404, f"one of baseline, {PRUNED}, auto"),
        (b'{"sentences": ["a"], "model": "baseline:x"}', 404, "no such model"),
        (b'{"sentences": ["a"]}', 400, "which model?"),
        (b'{"sentences": ["a", "\\ud800"], "model": "auto"}', 400, "half a character"),
        (b'{"sentences": ["a"], "pair": "\\udc00"}', 400, "half a character"),
        (json.dumps({"sentences": ["a"] * 21, "model": "auto"}).encode(), 413, "20 at a time"),
        (b"x" * (2**20 + 1), 413, "1048576 bytes"),
    ):
        answer = httpx.post(f"{url}/translate", content=body, headers={"content-type": "application/json"}, timeout=60)
        assert answer.status_code == status, (body[:80], answer.text)
        assert said in answer.json()["error"]["message"], answer.text
    talk = {"model": PRUNED, "max_tokens": 2}
    for path, wrong, said in (
        ("chat/completions", {**talk, "messages": [{"role": "user", "content": [1]}]}, "messages.0.content"),
        ("chat/completions", {**talk, "messages": []}, ""),
        ("completions", talk, "prompt"),
        ("completions", {**talk, "prompt": "a", "n": -9}, "-9 answers cannot be given"),
    ):
        answer = httpx.post(f"{url}/v1/{path}", json=wrong, timeout=60)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
        assert "original exception" not in answer.text
    counted = httpx.get(f"{url}/metrics", timeout=30).text
    assert 'path="/v1/completions",status="400"} 3.0' in counted, "one was too long"
    assert 'status="500"' not in counted
    many = {"model": "baseline", "prompt": ["a"] * 7, "n": 3, "max_tokens": 2}
    assert httpx.post(f"{url}/v1/completions", json=many, timeout=60).status_code == 413, "21 answers"
    nowhere = httpx.get(f"{url}/nowhere", timeout=60)
    assert nowhere.status_code == 404 and nowhere.json()["error"]["code"] == 404
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as stream:
        next(stream.iter_lines())  # and leave
    deadline = time.monotonic() + 30
    while "raylp_requests_at_work 0.0" not in httpx.get(f"{url}/metrics", timeout=30).text:
        assert time.monotonic() < deadline, "what nobody waits for any more goes on"
        time.sleep(0.2)
    empty = httpx.post(f"{url}/translate", json={"sentences": [], "model": "auto"}, timeout=60)
    assert empty.json()["translations"] == []


def speaks_openai(url: str) -> None:
    """Models, completions whole and streamed, chat, and errors a client can read."""
    names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
    assert sorted(names) == ["auto", "baseline", PRUNED]
    names.remove("auto")
    row = toy.toy_splits()["test"][0]
    body = {"prompt": f"{row['source']} =", "max_tokens": 16, "temperature": 0, "stop": "\n"}
    for name in names:
        answer = httpx.post(f"{url}/v1/completions", json={**body, "model": name}, timeout=60).json()
        assert answer["choices"][0]["text"].strip() == row["target"], name
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "model": PRUNED, "stream": True}) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
    parts = [json.loads(line)["choices"][0]["text"] for line in lines]
    assert "".join(parts).strip() == row["target"]
    assert len([part for part in parts if part]) > 1, "token by token"
    wrong = httpx.post(f"{url}/v1/completions", json={**body, "model": "nobody"}, timeout=60)
    assert wrong.status_code == 404
    too_long = httpx.post(f"{url}/v1/completions", json={**body, "model": PRUNED, "max_tokens": 10**6}, timeout=60)
    assert too_long.status_code == 400


def test_the_file_for_a_cluster_builds_the_same_endpoint(context: Context, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from raylp.serve.app import build

    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    served = context.recipe.serve.model_copy(update={"api_keys": str(keys), "port": 8000})
    recipe = context.recipe.model_copy(update={"serve": served})
    text = deploy_file(replace(context, recipe=recipe))
    assert "secret" not in text
    (application,) = ServeDeploySchema(**yaml.safe_load(text)).applications
    assert application.import_path == "raylp.serve.app:build"
    assert [config["model_loading_config"]["model_id"] for config in application.args["llm_configs"]] == [
        "baseline",
        PRUNED,
    ]
    for config in application.args["llm_configs"]:
        assert config["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(cores())
    assert build(application.args) is not None
    with pytest.raises(UserError, match=r"serve.port: 0 means any free port"):
        deploy_file(context)
    spread = served.model_copy(update={"tensor_parallel": 2})
    with pytest.raises(UserError, match=r"tensor_parallel: 2 GPUs for each of 2 engines, there are 0"):
        deploy_file(replace(context, recipe=recipe.model_copy(update={"serve": spread})))
    keys.write_text("# none\n")
    with pytest.raises(UserError, match=r"keys has no key: write one a line"):
        deploy_file(replace(context, recipe=recipe))
    keys.write_bytes("\ufeffsecret\n".encode())
    assert key_hash(b"secret") in deploy_file(replace(context, recipe=recipe))
    keys.write_text("s\u00e9cret\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"keys: no client can send such a key"):
        deploy_file(replace(context, recipe=recipe))
    gone = served.model_copy(update={"api_keys": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"serve.api_keys: .*gone cannot be read"):
        deploy_file(replace(context, recipe=recipe.model_copy(update={"serve": gone})))


@pytest.mark.slow
@pytest.mark.parametrize(("change", "said"), [({"cpus": 1000}, "2000.5 CPUs"), ({"gpus": 70.0}, "140 GPUs")])
def test_too_few_are_refused_before_the_start(context: Context, change: dict[str, float], said: str) -> None:
    serve = context.recipe.serve.model_copy(update=change)
    crowded = replace(context, recipe=context.recipe.model_copy(update={"serve": serve}))
    with (
        pytest.raises(UserError, match=rf"serving baseline, pruned-\d \(2 engines\) needs {said}, the Ray cluster has"),
        endpoint(crowded, context.models()),
    ):
        pytest.fail("nothing may start")
