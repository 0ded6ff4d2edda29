"""The demo recipe on the toy model, every stage through its real engine, submitted as a Ray job."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import toy
import yaml

from raylp.cluster import use_token
from raylp.serve.slo import LEAST

ROOT = Path(__file__).parent.parent
START_S = 120
LAYERS = toy.TRUTH.num_layers - toy.TRUTH.num_removable
PRUNED, HEALED = f"pruned-{LAYERS}", f"healed-{LAYERS}"
STAGES = ["search", "prune", "distill", "heal", "evaluate", "bench"]


def free_port() -> int:
    """Not one of those that the kernel gives to connections (32768 and up): one of them may take it before Ray does."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(20000, 32000)))
            except OSError:
                continue
            return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster_address(head: tuple[str, str]) -> str:
    """Where jobs are sent to."""
    return head[0]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A Ray head: its dashboard's address and its own.

    Its processes are a group of their own, so that no other Ray is stopped with it.
    """
    port, dashboard = free_port(), free_port()
    env = {**os.environ, "RAY_health_check_timeout_ms": "60000", "RAY_health_check_failure_threshold": "20"}
    command = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=8"]
    command += [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--object-store-memory=500000000",
        "--disable-usage-stats",
    ]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("w")
    binary = Path(sys.executable).parent / command[0]
    process = subprocess.Popen([str(binary), *command[1:]], stdout=log, stderr=log, env=env, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{address}/api/version", timeout=2)
            break
        except httpx.HTTPError:
            assert process.poll() is None, Path(log.name).read_text()
            time.sleep(1)
    yield address, f"127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def job(
    cluster_address: str, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """(run directory, log of the job)."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    values = {
        "model": toy_checkpoint,
        **{f"data.en-de.{split}": file for split, file in toy_data.items()},
        "data.en-de.limit.search": 48,
        "prompt.template": "{source} =",
        "prompt.examples": 0,
        "search.layers": LAYERS,
        "heal.workers": 2,
        "heal.zero_stage": 2,
        "bench.requests": 4,
        "bench.repeats": 2,
        "bench.concurrency": "[2]",
        "bench.output_tokens": 8,
        "bench.warmup": 1,
        "serve.port": 0,
        "serve.max_model_len": 128,
        "run_dir": run_dir,
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "raylp", "submit", "recipes/demo.yaml", "--address", cluster_address),
            *(*sets, "--python", sys.executable),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return run_dir, done.stdout


def read(run_dir: Path, name: str) -> dict:
    return json.loads((run_dir / name).read_text())


def test_a_job_goes_on_with_what_was_begun_here(
    cluster_address: str, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    """With text beside the recipe, of which a job has a copy; sent by raylp submit, and by Ray's own command."""
    project, run_dir = tmp_path / "project", tmp_path / "run"
    (project / "jobs").mkdir(parents=True)
    for file in (ROOT / "jobs" / "run.py", toy_data["test"]):
        (project / ("jobs" if file.suffix == ".py" else "") / file.name).write_bytes(file.read_bytes())
    content = {
        "model": str(toy_checkpoint),
        "data": {"xx-yy": {"test": toy_data["test"].name, "limit": {"test": 8}}},
        "prompt": {"template": toy.TOY_TEMPLATE},
        "evaluate": {},
        "run_dir": str(run_dir),
    }
    (project / "toy.yaml").write_text(yaml.safe_dump(content))

    def said(*command: str, code: int = 0) -> str:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == code, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    raylp = (sys.executable, "-m", "raylp")
    assert "done before" not in said(*raylp, "run", "toy.yaml")
    recipe = (run_dir / "recipe.yaml").read_text()
    there = ("--address", cluster_address)
    assert "evaluate: done before" in said(*raylp, "submit", "toy.yaml", *there, "--python", sys.executable)
    assert (run_dir / "recipe.yaml").read_text() == recipe
    use_token()
    job = ("job", "submit", *there, "--working-dir", ".", "--", sys.executable, "jobs/run.py", "toy.yaml")
    assert "evaluate: done before" in said(str(Path(sys.executable).parent / "ray"), *job)
    assert (run_dir / "recipe.yaml").read_text() == recipe
    # What is done asks nothing of the cluster any more, and is not done on other text.
    more = ("--set", "resources.workers=4000")
    assert "evaluate: done before" in said(*raylp, "run", "toy.yaml", *more)
    lines = (project / toy_data["test"].name).read_text().splitlines()
    (project / toy_data["test"].name).write_text("\n".join(reversed(lines)))
    assert "evaluate was done on other inputs" in said(*raylp, "run", "toy.yaml", code=2)


def test_every_stage_was_run(job: tuple[Path, str]) -> None:
    run_dir, log = job
    manifest = read(run_dir, "manifest.json")
    assert list(manifest["stages"]) == STAGES
    assert all(stage["seconds"] > 0 and len(stage["fingerprint"]) == 16 for stage in manifest["stages"].values())
    assert "succeeded" in log and "Traceback" not in log
    assert not (run_dir / "lock.json").exists()


def test_the_layers_are_the_right_ones(job: tuple[Path, str]) -> None:
    assert tuple(sorted(read(job[0], "plan.json")["removed"])) in toy.TRUTH.answers


def test_models_are_whole_and_stock(job: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM

    for name, layers in {PRUNED: LAYERS, HEALED: LAYERS, "baseline-healed": toy.TRUTH.num_layers}.items():
        path = job[0] / "models" / name
        assert len(AutoModelForCausalLM.from_pretrained(path).model.layers) == layers
        for file, entry in read(path, "manifest.json")["files"].items():
            assert (path / file).stat().st_size == entry["bytes"]
        assert not list(path.glob("*.bin")) and not list(path.glob("adapter*"))


def test_results_have_the_form_others_rely_on(job: tuple[Path, str]) -> None:
    results = read(job[0], "results.json")
    assert [model["name"] for model in results["models"]] == ["baseline", PRUNED, HEALED, "baseline-healed"]
    for model in results["models"]:
        assert {"name", "layers", "params", "bytes", "scores", "speed"} <= set(model)
        for score in model["scores"]["en-de"].values():
            assert set(score) == {"value", "low", "high", "n", "signature"}
            assert score["low"] <= score["value"] <= score["high"] and score["n"] == toy.SPLIT_SIZES["test"]
    speed = {model["name"]: model["speed"] for model in results["models"]}
    for name in ("baseline", HEALED):
        measured = speed[name]["c2"]
        assert {"ttft_ms", "tpot_ms", "e2e_ms", "output_tokens_per_s"} <= set(measured)
        assert measured["e2e_ms"]["p50"]["value"] > measured["ttft_ms"]["p50"]["value"] > 0
    chrf = {model["name"]: model["scores"]["en-de"]["chrF2++"]["value"] for model in results["models"]}
    assert chrf["baseline"] > 90 and chrf[HEALED] > 0.8 * chrf["baseline-healed"]
    assert {(c["a"], c["b"]) for c in results["comparisons"]} >= {(HEALED, "baseline-healed"), (PRUNED, "baseline")}


def test_translations_are_scored_as_they_stand(job: tuple[Path, str]) -> None:
    import sacrebleu

    rows = [json.loads(line) for line in (job[0] / f"translations/{HEALED}/en-de.jsonl").read_text().splitlines()]
    score = sacrebleu.corpus_chrf([r["hypothesis"] for r in rows], [[r["target"] for r in rows]], word_order=2).score
    results = read(job[0], "results.json")
    told = next(model for model in results["models"] if model["name"] == HEALED)["scores"]["en-de"]["chrF2++"]["value"]
    assert told == pytest.approx(score, abs=1e-9)


def test_teacher_rows_are_complete(job: tuple[Path, str], toy_data: dict[str, Path]) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(job[0] / "distill" / "teacher.parquet").to_pylist()
    ids = [json.loads(line)["id"] for line in toy_data["train"].read_text().splitlines()]
    assert [row["id"] for row in table] == ids
    assert all(row["kept"] or row["reason"] for row in table) and any(row["kept"] for row in table)


def test_the_page_is_there_and_needs_nothing_else(job: tuple[Path, str]) -> None:
    page = (job[0] / "report" / "index.html").read_text()
    assert HEALED in page and "http-equiv" not in page and 'src="http' not in page and 'href="http' not in page


def test_the_dry_run_of_serve_can_be_deployed(job: tuple[Path, str], cluster_address: str, tmp_path: Path) -> None:
    """`raylp serve --dry-run` into a file, the file to `serve deploy`, and sentences to what then runs.

    Where no model can be quick enough, that is learned from requests of several sentences, each of which counts once.
    """
    run_dir, port = job[0], free_port()
    use_token()
    options = [f"--set=serve.port={port}", "--set=serve.models=[baseline, pruned]", "--slo=p90=1ms"]
    told = subprocess.run(
        [sys.executable, "-m", "raylp", "serve", str(run_dir), "--dry-run", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    file = tmp_path / "serve.yaml"
    file.write_text(told.stdout)
    serve = str(Path(sys.executable).parent / "serve")
    deploy = [serve, "deploy", str(file), "--address", cluster_address]
    done = subprocess.run(deploy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        deadline = time.monotonic() + 4 * START_S
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert time.monotonic() < deadline, subprocess.run(
                [serve, "status", "--address", cluster_address], capture_output=True, text=True
            ).stdout
            time.sleep(1)
        rows = toy.toy_splits()["test"][:3]
        body = {"sentences": [row["source"] for row in rows], "model": "auto"}
        answered = []
        for _ in range(LEAST + 1):
            answer = httpx.post(f"http://127.0.0.1:{port}/translate", json=body, timeout=120).json()
            answered.append(answer["model"])
        assert answer["translations"] == [row["target"] for row in rows]
        assert answered == ["baseline"] * LEAST + [PRUNED]
    finally:
        subprocess.run([serve, "shutdown", "--address", cluster_address, "--yes"], check=True, capture_output=True)


@pytest.mark.faults
def test_a_killed_serve_of_a_lasting_cluster_starts_again(
    head: tuple[str, str], toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    """What the killed one left goes on and holds the port; the same command clears it away and serves."""
    port, run_dir = free_port(), tmp_path / "run"
    data = [f"--set=data.en-de.{split}={file}" for split, file in toy_data.items()]
    sets = [f"--set=model={toy_checkpoint}", *data, "--set=prompt.examples=0", f"--set=run_dir={run_dir}"]
    raylp = [sys.executable, "-m", "raylp"]
    made = [*raylp, "prune", "recipes/demo.yaml", "--layers", "1", *sets]
    assert subprocess.run(made, cwd=ROOT, capture_output=True, check=False).returncode == 0
    serve = [*raylp, "serve", str(run_dir), "--set=serve.models=[pruned]", f"--set=serve.port={port}"]
    env = {**os.environ, "RAY_ADDRESS": head[1]}

    def start(log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as stream:
            process = subprocess.Popen([*serve, "--set=serve.max_model_len=128"], stdout=stream, stderr=stream, env=env)
        deadline = time.monotonic() + 4 * START_S
        while "/v1  models: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        return process

    first = start(tmp_path / "first.log")
    first.kill()
    first.wait()
    assert is_up(f"http://127.0.0.1:{port}/health"), "a lasting cluster's Serve outlives its driver"
    second = start(tmp_path / "second.log")
    assert is_up(f"http://127.0.0.1:{port}/health")
    second.send_signal(signal.SIGINT)
    assert second.wait(START_S) == 0, (tmp_path / "second.log").read_text()
    assert not is_up(f"http://127.0.0.1:{port}/health")


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_again_does_nothing(job: tuple[Path, str]) -> None:
    run_dir, _ = job
    before = read(run_dir, "manifest.json")["stages"]
    done = subprocess.run(
        [sys.executable, "-m", "raylp", "run", str(run_dir / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"{stage}: done before" in done.stderr for stage in STAGES)
    assert read(run_dir, "manifest.json")["stages"] == before
