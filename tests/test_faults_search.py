"""Killed in the middle, the same command goes on: the same plan, the same scores, nothing computed twice."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import toy
import yaml
from conftest import toy_recipe

from raylp.generate.pool import IN_FLIGHT

pytestmark = pytest.mark.faults
WORKERS, BLOCK, TOGETHER = 2, 4, 2  # TOGETHER: units of a piece
LOST = IN_FLIGHT * TOGETHER  # units that are with a worker at most


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "raylp", "search", str(recipe)]


def generations(run_dir: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in run_dir.glob("logs/generations-*"))


def write_recipe(path: Path, model: Path, data: dict[str, Path], run_dir: Path, strategy: str = "exhaustive") -> Path:
    search = {"remove": 3, "block": BLOCK, "strategy": strategy}
    resources = {"workers": WORKERS, "batch_size": BLOCK * TOGETHER}
    path.write_text(yaml.safe_dump(toy_recipe(model, data, run_dir, search=search, resources=resources)))
    return path


def workers_of(driver: int) -> list[int]:
    """The processes of the search's workers; those that are still starting have another name."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] == ["ray::SearchWorker.do_together"]:
                found.append(child.pid)
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("strategy", "kills"), [("exhaustive", 20), ("race", 6)])
def test_search_survives_kills(
    strategy: str, kills: int, tmp_path: Path, toy_checkpoint: Path, toy_data: dict[str, Path]
) -> None:
    """`kill -9` of the driver or of a worker, again and again, while the same command is given again."""
    calm, rough = (
        write_recipe(tmp_path / f"{name}.yaml", toy_checkpoint, toy_data, tmp_path / name, strategy=strategy)
        for name in ("calm", "rough")
    )
    subprocess.run(command(calm), check=True, capture_output=True)
    undisturbed = generations(tmp_path / "calm")
    random_ = random.Random(0)
    done, in_flight = 0, 0
    process = None
    while done < kills:
        if process is None:
            process = subprocess.Popen(command(rough), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = generations(tmp_path / "rough") + random_.randint(1, max(2, undisturbed // kills - 3))
        deadline = time.monotonic() + 120
        while generations(tmp_path / "rough") < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0
            break  # it was done before the last kills
        victims = workers_of(process.pid)
        if victims and random_.random() < 0.5:
            os.kill(random_.choice(victims), signal.SIGKILL)
            in_flight += LOST
        else:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process = None
            in_flight += WORKERS * LOST
        done += 1
    if process is not None:
        assert process.wait() == 0
    subprocess.run(command(rough), check=True, capture_output=True)
    assert done > kills * 2 / 3
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("calm", "rough")]
    assert plans[0] == plans[1]
    assert undisturbed <= generations(tmp_path / "rough") <= undisturbed + in_flight
    if strategy == "exhaustive":
        assert undisturbed == (1 + 6 + 5 + 4) * toy.SPLIT_SIZES["search"] // BLOCK


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
