"""What a user types, and what they see: one line for every mistake, and never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import toy_recipe

from raylp import __version__
from raylp.cli import main
from raylp.cluster import MIN_LOGICAL_CPUS, cores
from raylp.recipe import load_recipe
from raylp.submit import ORIGIN, _from_here, lasting

ROOT = Path(__file__).parent.parent
VERBS = [
    *("run", "search", "prune", "distill", "heal", "evaluate", "bench"),
    *("serve", "translate", "report", "compare", "plan", "replay", "submit", "doctor"),
]


def raylp(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(leave.value.code or 0), captured.out, captured.err


@pytest.fixture
def recipe(tmp_path: Path, toy_checkpoint: Path, toy_data: dict[str, Path]) -> Path:
    """A recipe file that is right; tests make it wrong with --set."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_recipe(toy_checkpoint, toy_data, tmp_path / "run", search={"remove": 3})))
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = raylp(capsys, verb, "--help")
    assert code == 0 and "Example:" in out and f"raylp {verb}" in out


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["--help"], 0), ([], 2)])
def test_the_version_and_the_help_are_no_mistakes(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    left, out, err = raylp(capsys, *arguments)
    assert left == code and out.strip() and not err
    assert arguments != ["--version"] or out == f"raylp {__version__}\n"


@pytest.mark.parametrize(
    ("sets", "code", "said"),
    [
        (["serch.remove=3"], 2, "unknown key 'serch'; did you mean 'search'?"),
        (["search.remove=7"], 2, "7 layers are to go, but the model has 8 and 2 are protected, so at most 6 can"),
        (["search.remove=three"], 2, "search.remove: Input should be a valid integer"),
        (["model=/no/such/model"], 2, "model '/no/such/model' is not there"),
        (["model=package:no-such-package"], 2, "pip install no-such-package"),
        (["data.xx-yy.search=/no/such.jsonl"], 2, "data file /no/such.jsonl is not there"),
        (["data.xx-yy.pair=german"], 2, "write source and target with a hyphen between"),
        (["prompt.template={sauce}"], 2, "prompt.template"),
        (["prompt.examples=2", "data.xx-yy.train=null"], 2, "no corpus has one: name data.<name>.train"),
        (["run_dir=/proc/raylp"], 2, "run_dir /proc/raylp cannot be written"),
        (["resources.workers=4000"], 2, "needs 4000 CPUs, the Ray cluster has"),
    ],
)
def test_mistakes_in_a_recipe(
    capsys: pytest.CaptureFixture[str], recipe: Path, ray_session: None, sets: list[str], code: int, said: str
) -> None:
    arguments = [part for override in sets for part in ("--set", override)]
    left, out, err = raylp(capsys, "search", str(recipe), *arguments)
    assert left == code and said in err and out == ""
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not (recipe.parent / "run" / "plan.json").exists()


def test_overlapping_splits(capsys: pytest.CaptureFixture[str], recipe: Path, toy_data: dict[str, Path]) -> None:
    code, _, err = raylp(capsys, "run", str(recipe), "--set", f"data.xx-yy.test={toy_data['search']}")
    assert code == 2 and "the splits overlap" in err


@pytest.mark.parametrize("verb", ["distill", "heal", "evaluate", "bench"])
def test_a_stage_the_recipe_does_not_have(capsys: pytest.CaptureFixture[str], recipe: Path, verb: str) -> None:
    code, _, err = raylp(capsys, verb, str(recipe))
    assert code == 2 and f"the recipe has no stage '{verb}'" in err


def test_a_stage_before_its_time(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    code, _, err = raylp(capsys, "prune", str(recipe))
    assert code == 2 and "prune needs search first: raylp search RECIPE" in err


def test_a_run_directory_of_another_recipe(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    raylp(capsys, "prune", str(recipe))
    code, _, err = raylp(capsys, "search", str(recipe), "--set", "search.remove=2")
    assert code == 2 and "is of another recipe: search.remove was 3, is now 2" in err


@pytest.mark.parametrize("verb", ["plan", "report", "serve"])
def test_not_a_run_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    code, _, err = raylp(capsys, verb, str(tmp_path / "none"))
    assert code == 2 and "is not a run directory" in err and not (tmp_path / "none").exists()


def test_a_jobs_run_directory_is_the_submitters(recipe: Path, tmp_path: Path) -> None:
    """Ray runs a job in a copy of the project, which it throws away."""

    def told(*overrides: str) -> list[str]:
        return _from_here(load_recipe(recipe, list(overrides)), tmp_path)

    near = ["run_dir=runs/a", "cache=runs/cache"]
    assert told(*near) == [f"run_dir={tmp_path}/runs/a", f"cache={tmp_path}/runs/cache"]
    assert told("run_dir=~/runs/a") == [f"run_dir={Path.home()}/runs/a"]
    assert told("run_dir=/shared/a") == told("run_dir=s3://bucket/a") == []


def test_a_job_reads_its_text_where_that_lasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_data: dict[str, Path]
) -> None:
    """In the directory that was submitted, if it is seen from the job and holds the same text."""
    content = {"model": "a/b", "data": {"xx-yy": {"test": "test.jsonl"}}, "evaluate": {}, "run_dir": "runs/x"}
    for place in ("sent", "copy"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "r.yaml").write_text(yaml.safe_dump(content))
        (tmp_path / place / "test.jsonl").write_bytes(toy_data["test"].read_bytes())
    monkeypatch.chdir(tmp_path / "copy")
    assert lasting("r.yaml", []) == "r.yaml"  # not a job of raylp submit
    monkeypatch.setenv(ORIGIN, str(tmp_path / "elsewhere"))
    assert lasting("r.yaml", []) == "r.yaml"
    monkeypatch.setenv(ORIGIN, str(tmp_path / "sent"))
    assert lasting("r.yaml", []) == str(tmp_path / "sent" / "r.yaml")
    assert lasting("r.yaml", ["model=./m"]) == "r.yaml"  # which came along
    with (tmp_path / "sent" / "test.jsonl").open("a") as file:
        file.write('{"id": "more", "source": "a", "target": "b"}\n')
    assert lasting("r.yaml", []) == "r.yaml"
    assert lasting("r.yaml", ["data.xx-yy.test=none.jsonl"]) == "r.yaml"


def test_too_few_cpus_are_told_before_the_first_stage(recipe: Path, tmp_path: Path) -> None:
    """For what comes last, and before a Ray is started."""
    sets = ["bench.models=[baseline, pruned]", "serve.cpus=8000"]
    done = subprocess.run(
        [sys.executable, "-m", "raylp", "run", str(recipe), *(part for one in sets for part in ("--set", one))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    there = max(MIN_LOGICAL_CPUS, cores())
    said = f"serving baseline, pruned for bench needs 16000.5 CPUs, the Ray cluster has {there}: "
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") <= 3, done.stderr
    assert "raise resources.cpus" in done.stderr
    assert not (tmp_path / "run" / "plan.json").exists() and not (tmp_path / "run" / "lock.json").exists()


def test_wrong_usage(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    for arguments in (["prune"], ["nothing"], ["search", str(recipe), "--sett", "x=1"]):
        code, _, err = raylp(capsys, *arguments)
        assert code == 2 and "--help" in err
    code, _, err = raylp(capsys, "prune", str(recipe), "--layers", "a,b")
    assert code == 2 and "write layer numbers with commas between" in err
    code, _, err = raylp(capsys, "submit", str(recipe), "--address", "http://127.0.0.1:9")
    assert code == 2 and "run submit from its root" in err


def test_translate_streams_one_line_for_one(toy_checkpoint: Path, tmp_path: Path) -> None:
    from raylp.data.prompt import Prompt
    from raylp.models.checkpoint import card_for, save_checkpoint
    from raylp.models.load import load_model

    card = card_for("toy", "0", "model.layers", [3], Prompt(template="{source} =").model_dump(mode="json"))
    save_checkpoint(load_model(toy_checkpoint), toy_checkpoint, tmp_path / "cut", card, [3])
    done = subprocess.run(
        [sys.executable, "-m", "raylp", "translate", str(tmp_path / "cut"), "--pair", "xx-yy"],
        input="gofa tize\n\ntize\n",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert len(lines) == 4 and lines[0] and lines[1] == "" and lines[2] and lines[3] == ""


def test_dry_run_counts(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    code, out, _ = raylp(capsys, "run", str(recipe), "--dry-run")
    assert code == 0 and "16" in out and "768" in out and "search" in out
    assert not (recipe.parent / "run").exists()
