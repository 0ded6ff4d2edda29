"""The run directory: whole files, one driver, complete directories."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylp.errors import UserError
from raylp.generate.base import Request, StopRule, loops
from raylp.ledger import Ledger, block_hash, score_facts, score_key, write_segment
from raylp.rundir import RunDir

HOLD = """import sys, time; from raylp.rundir import RunDir
with RunDir(sys.argv[1]).lock(): print("held", flush=True); time.sleep(60)"""


def hold(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["local", "memory"])
def rundir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("RAYLP_CACHE", str(tmp_path / "cache"))
    return RunDir(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}")


def test_files_and_directories(rundir: RunDir) -> None:
    rundir.check_writable()
    rundir.write_json("a/b.json", {"é": 1})
    assert rundir.read_json("a/b.json") == {"é": 1}
    assert not rundir.complete("models/x")
    with rundir.building("models/x") as path:
        (path / "weights").write_bytes(b"1234")
        assert not rundir.exists("models/x")
    assert rundir.complete("models/x")
    assert (rundir.local("models/x") / "weights").read_bytes() == b"1234"
    rundir.remove("models/x/weights")
    assert not rundir.complete("models/x")


def test_a_directory_that_fails_leaves_nothing(rundir: RunDir) -> None:
    with pytest.raises(RuntimeError), rundir.building("models/x") as path:
        (path / "weights").write_bytes(b"1234")
        raise RuntimeError
    assert rundir.names("models") == []


def test_another_driver_is_refused_until_it_dies(tmp_path: Path) -> None:
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"), RunDir(str(tmp_path)).lock():
        pass
    process.kill()
    process.wait()
    with RunDir(str(tmp_path)).lock():
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_a_driver_that_was_held_up_leaves_a_run_that_went_to_another(tmp_path: Path) -> None:
    """Its lease had ended when another machine took it: it stops, and leaves that one's lease alone."""
    code = f"import raylp.rundir; raylp.rundir.RENEW_S = 0.1\n{HOLD}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    theirs = {"host": "elsewhere", "pid": 7, "started": 0, "token": "t", "expires": time.time() + 30}
    RunDir(str(tmp_path)).write_json("lock.json", theirs)
    _, said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and "taken over by process 7 on elsewhere" in said
    assert json.loads((tmp_path / "lock.json").read_text()) == theirs


def test_work_in_progress_is_left_alone_and_that_of_the_dead_is_cleared(tmp_path: Path) -> None:
    """Two runs may share a cache: what one of them is filling is not the other's to remove."""
    rundir = RunDir(str(tmp_path))
    code = (
        "import os, sys; from raylp.rundir import RunDir\n"
        "with RunDir(sys.argv[1]).building('models/x') as path: (path / 'weights').write_text('1'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(left := rundir.names("models")) == 1 and left[0].startswith(".building-x")
    with rundir.building("models/x") as first:
        assert rundir.names("models") == [first.name]
        with RunDir(str(tmp_path)).building("models/x") as second:
            (second / "weights").write_text("2")
        (first / "weights").write_text("3")
    assert rundir.names("models") == ["x"] and (rundir.local("models/x") / "weights").read_text() == "3"


def test_a_lease_from_another_machine_runs_out(tmp_path: Path) -> None:
    lease = {"host": "elsewhere", "pid": 1, "started": 0, "token": "t", "expires": time.time() + 30}
    (tmp_path / "lock.json").write_text(json.dumps(lease))
    with pytest.raises(UserError, match="on elsewhere"), RunDir(str(tmp_path)).lock():
        pass
    (tmp_path / "lock.json").write_text(json.dumps({**lease, "expires": time.time() - 1}))
    with RunDir(str(tmp_path)).lock():
        pass


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir(str(tmp_path / "file" / "run")).check_writable()
    with pytest.raises(UserError, match=r"GB are needed, .* GB are free"):
        RunDir(str(tmp_path)).check_writable(10**16)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    rundir = RunDir(str(tmp_path / "run"))
    rundir.write_text("plan.json", "old")
    target = Path(rundir.full("plan.json"))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from raylp.rundir import RunDir; RunDir(sys.argv[1]).write_text('plan.json', 'x' * 5000)"
    )
    done = subprocess.run([sys.executable, "-c", code, rundir.url], capture_output=True, text=True, check=False)
    assert "cannot write" in done.stderr and "free space" in done.stderr
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == ["plan.json"]


def test_ledger_and_shared_cache(tmp_path: Path) -> None:
    first, second, cache = (RunDir(str(tmp_path / name)) for name in ("one", "two", "cache"))
    facts = score_facts("m", [3, 1], "b", "chrF2++", "transformers", "float32", "greedy")
    assert score_key(facts) == score_key(score_facts("m", [1, 3], "b", "chrF2++", "transformers", "float32", "greedy"))
    line = {"key": score_key(facts), **facts, "statistics": [[1, 2]]}
    write_segment(first, [line])
    ledger = Ledger(first, cache)
    assert ledger.find(line["key"]) == line and ledger.find("other") is None
    assert len(cache.names("ledger")) == 1, "what a killed driver did not share is shared by the next one"
    ledger.remember(line)
    assert len(cache.names("ledger")) == 1
    assert Ledger(second).find(line["key"]) is None
    assert Ledger(second, cache).find(line["key"]) == line
    assert Ledger(second).find(line["key"]) == line


def test_a_block_is_what_is_asked() -> None:
    asked = [Request((1, 2), 5)]
    assert block_hash(asked, ["x"]) != block_hash([Request((1, 2), 6)], ["x"]) != block_hash(asked, ["y"])


def test_where_a_translation_ends() -> None:
    rule = StopRule(frozenset({0}))
    assert rule.cut([5, 6, 0, 7]) == ((5, 6, 0), "stop")
    assert rule.cut([5, 6, 7]) == ((5, 6, 7), "length")
    assert rule.cut([9, *[5, 6] * 20])[1] == "loop"
    assert loops([4] * 12) and not loops([4] * 11)
    assert loops([1, 2, 3] * 4) and not loops([1, 2, 3, 4] * 3)
