"""Killed in the middle, the same command goes on: the same plan, the same scores, nothing computed twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
import yaml
from conftest import toy_recipe

pytestmark = pytest.mark.faults


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "raylp", "search", str(recipe)]


def generations(run_dir: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in run_dir.glob("logs/generations-*"))


def write_recipe(path: Path, model: Path, data: dict[str, Path], run_dir: Path) -> Path:
    content = toy_recipe(
        model, data, run_dir, search={"remove": 3, "block": 4, "strategy": "exhaustive"}, resources={"workers": 2}
    )
    path.write_text(yaml.safe_dump(content))
    return path


def test_search_survives_kills(tmp_path: Path, toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    calm = write_recipe(tmp_path / "calm.yaml", toy_checkpoint, toy_data, tmp_path / "calm")
    subprocess.run(command(calm), check=True, capture_output=True)
    undisturbed = generations(tmp_path / "calm")

    recipe = write_recipe(tmp_path / "rough.yaml", toy_checkpoint, toy_data, tmp_path / "rough")
    rng = random.Random(0)
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = generations(tmp_path / "rough")
        deadline = time.monotonic() + 120
        wanted = before + rng.randint(3, 15)
        while generations(tmp_path / "rough") < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command(recipe), check=True, capture_output=True)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("calm", "rough")]
    assert plans[0] == plans[1]
    assert undisturbed <= generations(tmp_path / "rough") <= undisturbed + kills * 2 * 2
    assert undisturbed == (1 + 6 + 5 + 4) * toy.SPLIT_SIZES["search"] // 4


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, toy_checkpoint: Path, toy_data: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", toy_checkpoint, toy_data, tmp_path / "run")
    process = subprocess.Popen(command(recipe), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while generations(tmp_path / "run") < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped; the same command goes on" in err and "Traceback" not in err
    subprocess.run(command(recipe), check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["removed"]
