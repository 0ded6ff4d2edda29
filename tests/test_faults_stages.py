"""The driver killed in the middle of every stage that takes long; the same command goes on, and nothing differs."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import toy
import yaml
from conftest import toy_recipe

pytestmark = pytest.mark.faults

LAYERS = toy.TRUTH.num_layers - toy.TRUTH.num_removable
# Killed when a line of progress says that so many units are done; each of these stages is killed once.
KILLS = {
    "search": r"^search +(\d+)/",
    "distill": r"^distill +([1-9]\d*)/",
    "heal": rf"^healed-{LAYERS} +([3-9]|\d\d+)/",
    "bench": r"^bench +([1-9]\d*)/",
}


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "raylp", "run", str(recipe)]


def write_recipe(path: Path, model: Path, data: dict[str, Path], run_dir: Path) -> Path:
    content = toy_recipe(
        model,
        data,
        run_dir,
        search={"layers": LAYERS},
        distill={"batch_size": 8},
        heal={"batch_size": 8, "checkpoint_every": 2},
        evaluate={},
        bench={"requests": 8, "concurrency": [2], "repeats": 2, "output_tokens": 8, "warmup": 1},
        serve={"port": 0, "max_model_len": 128},
    )
    path.write_text(yaml.safe_dump(content))
    return path


def run_until(recipe: Path, pattern: str) -> str:
    """Runs until a line of stderr matches, kills the driver, and returns that line."""
    process = subprocess.Popen(command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if re.match(pattern, line):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return line
    process.wait()
    pytest.fail(f"ended before {pattern!r}: {''.join(seen)[-3000:]}")


def read(run_dir: Path, name: str) -> dict:
    return json.loads((run_dir / name).read_text())


def steps(run_dir: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "heal" / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_survives_a_kill_in_every_stage(tmp_path: Path, toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    calm = write_recipe(tmp_path / "calm.yaml", toy_checkpoint, toy_data, tmp_path / "calm")
    rough = write_recipe(tmp_path / "rough.yaml", toy_checkpoint, toy_data, tmp_path / "rough")
    subprocess.run(command(calm), check=True, capture_output=True)
    for pattern in KILLS.values():
        run_until(rough, pattern)
    done = subprocess.run(command(rough), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path / "calm", "plan.json") == read(tmp_path / "rough", "plan.json")
    tables = [
        pyarrow.parquet.read_table(tmp_path / d / "distill/teacher.parquet").to_pylist() for d in ("calm", "rough")
    ]
    assert [row["id"] for row in tables[0]] == [row["id"] for row in tables[1]]
    assert len({row["id"] for row in tables[1]}) == len(tables[1]) == toy.SPLIT_SIZES["train"]
    assert [row["translation"] for row in tables[0]] == [row["translation"] for row in tables[1]]
    for name in (f"healed-{LAYERS}", "baseline-healed"):
        assert steps(tmp_path / "calm", name) == steps(tmp_path / "rough", name)
    calm_scores, rough_scores = (
        {m["name"]: m["scores"]["xx-yy"]["chrF2++"]["value"] for m in read(tmp_path / d, "results.json")["models"]}
        for d in ("calm", "rough")
    )
    assert calm_scores["baseline"] == rough_scores["baseline"]
    assert calm_scores[f"pruned-{LAYERS}"] == rough_scores[f"pruned-{LAYERS}"]
    assert set(read(tmp_path / "rough", "results.json")["models"][0]["speed"]) == {"c2"}
