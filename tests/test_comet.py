"""COMET in its own environment: its command line's scores, and plain words when something is missing or dies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import toy_recipe

from raylp import cli
from raylp.beside import COMET
from raylp.context import Context, Splits
from raylp.data.corpus import Pair, write_jsonl
from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.evaluate.scores import score_translations
from raylp.metrics import registry
from raylp.metrics.comet import CometMetric, CometScorer
from raylp.metrics.intervals import paired_difference, score_with_interval
from raylp.pipeline import run
from raylp.progress import Reporter
from raylp.recipe import load_recipe, parse_recipe
from raylp.rundir import RunDir

Row = dict[str, str]


def make_rows(number: int) -> list[Row]:
    """Sentences of many lengths; some are there twice, some have space around them."""
    generator = random.Random(number)

    def text() -> str:
        return "".join(generator.choices("abcdefghij ", k=generator.randint(3, 90))).strip() or "a"

    rows = [{"src": text(), "mt": text(), "ref": text()} for _ in range(number - 2)]
    return [*rows, rows[0], {**rows[1], "mt": f"  {rows[1]['mt']} \t"}]


@pytest.fixture
def broken_comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The interpreter of an environment that has COMET's metadata; what it runs is the test's to write."""
    (tmp_path / "env/lib/python3.11/site-packages/unbabel_comet-2.2.7.dist-info").mkdir(parents=True)
    python = tmp_path / "env/bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("RAYLP_COMET_PYTHON", str(python))
    return python


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full", "short"),
    [
        ("chrf++", "chrF2++", "chrF2++"),
        ("bleu", "BLEU", "BLEU"),
        ("wmt22-comet-da", "Unbabel/wmt22-comet-da", "wmt22-comet-da"),
        ("xcomet-xl", "Unbabel/XCOMET-XL", "XCOMET-XL"),
        ("someone/new-comet", "someone/new-comet", "new-comet"),
        ("/models/mine/checkpoints/model.ckpt", "/models/mine/checkpoints/model.ckpt", "mine"),
        ("./epoch=3.ckpt", "./epoch=3.ckpt", "epoch=3"),
        ("/models/mine", "/models/mine", "mine"),
    ],
)
def test_names(name: str, full: str, short: str) -> None:
    assert (registry.full_name(name), registry.short_name(name)) == (full, short)
    assert registry.is_comet(name) == (short not in ("chrF2++", "BLEU"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wmt22-comet-ad", "did you mean 'wmt22-comet-da'?"),
        ("chrf+", "did you mean 'chrF2++'?"),
        ("spBLEU", "did you mean 'BLEU'?"),
        ("nonsense", "known: chrF2++, BLEU, or a COMET checkpoint"),
        ("a/b/c", "owner/name on the hub"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(name: str, said: str, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, {"test": tmp_path / "t.tsv"}, tmp_path / "run", evaluate={"metrics": [name]})
    with pytest.raises(UserError) as error:
        parse_recipe(recipe)
    assert f"evaluate.metrics: no metric {name!r}" in str(error.value) and said in str(error.value)


def test_metrics_of_a_recipe(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, {"test": tmp_path / "t.tsv"}, tmp_path / "run", evaluate={})
    names = ["chrf++", "wmt22-comet-da", "./comet/mine"]
    recipe["evaluate"] = {"metrics": names}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    read = load_recipe(path).evaluate
    assert read is not None
    assert read.metrics == ["chrF2++", "Unbabel/wmt22-comet-da", str(tmp_path / "comet/mine")]
    recipe["evaluate"] = {"metrics": [*names, "other/mine"]}
    with pytest.raises(UserError, match="mine is there 2 times"):
        parse_recipe(recipe)


# --- without the environment -----------------------------------------------------------------------------------------


def test_without_its_environment_a_recipe_with_comet_is_refused_at_once(
    toy_data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYLP_COMET_PYTHON", str(tmp_path / "none/bin/python"))
    path = tmp_path / "recipe.yaml"
    # The model is not there either: nothing was read before COMET was looked for.
    content = toy_recipe(tmp_path / "model", toy_data, tmp_path / "run", evaluate={"metrics": ["wmt22-comet-da"]})
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as left:
        cli.main(["run", str(path), "--dry-run"])
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2 and said.endswith("run make comet") and "\n" not in said, said
    with pytest.raises(UserError, match=r"run make comet$"):
        run(load_recipe(path), Reporter(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_local_checkpoint_must_be_whole(broken_comet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.ckpt is not there: name a \.ckpt file"):
        registry.check(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/model.ckpt").touch()
    with pytest.raises(UserError, match=r"has no hparams\.yaml"):
        registry.check(str(tmp_path))
    (tmp_path / "hparams.yaml").touch()
    registry.check(str(tmp_path))


def test_a_process_that_does_not_start_in_time_is_ended(broken_comet: Path) -> None:
    broken_comet.write_text('#!/bin/sh\necho "reading something slow" >&2\nexec sleep 60\n')
    scorer = CometScorer("Unbabel/wmt22-comet-da", deadlines_s={"start": 0.5})
    with pytest.raises(UserError, match=r"did not start in 0\.5 s: reading something slow"):
        scorer.score(make_rows(4))
    assert scorer.pid is None and children_running(str(broken_comet)) == []


def test_a_dead_process_tells_its_last_words(broken_comet: Path, tmp_path: Path) -> None:
    broken_comet.write_text('#!/bin/sh\necho "libsomething is missing" >&2\nexit 3\n')
    log = tmp_path / "logs/comet.log"
    with pytest.raises(UserError, match="exit code 3: libsomething is missing") as error:
        CometScorer("Unbabel/wmt22-comet-da", log=log).score(make_rows(4))
    assert str(log) in str(error.value) and error.value.exit_code == 1
    broken_comet.chmod(0o644)
    with pytest.raises(UserError, match=r"does not run .* run make comet"):
        CometScorer("Unbabel/wmt22-comet-da").score(make_rows(4))


def test_intervals_of_means(broken_comet: Path) -> None:
    metric = CometMetric("Unbabel/wmt22-comet-da")
    assert metric.name == "wmt22-comet-da" and "version:2.2.7" in metric.signature
    scores = np.random.default_rng(0).normal(0.85, 0.05, 400)
    rows = np.column_stack([scores, np.ones(400)])
    found = score_with_interval(metric, rows)
    assert found.value == pytest.approx(scores.mean(), abs=1e-12) and found.n == 400
    # A mean's interval is known: 1.96 standard errors to either side.
    half = 1.96 * scores.std() / 20
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.1 * half)
    lower = np.column_stack([scores - 0.01, np.ones(400)])
    gap = paired_difference(metric, lower, rows)
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.01, -0.01, -0.01), abs=1e-9)
    with pytest.raises(ValueError, match="source for each hypothesis"):
        metric.statistics(["a"], ["b"])


def make_context(run_dir: Path, metrics: list[str], hypotheses: dict[str, list[str]], rows: list[Row]) -> Context:
    """A run that has translated one test set with each of some models."""
    pairs = [Pair(source=row["src"], target=row["ref"], pair="en-de", id=str(i)) for i, row in enumerate(rows)]
    content = {"model": "x", "data": {"en-de": {"test": "t.tsv"}}, "evaluate": {"metrics": metrics}}
    recipe = parse_recipe({**content, "run_dir": str(run_dir)})
    rundir = RunDir(str(run_dir))
    for model, texts in hypotheses.items():
        lines = [{**pair.as_dict(), "hypothesis": text} for pair, text in zip(pairs, texts, strict=True)]
        rundir.write_text(f"translations/{model}/en-de.jsonl", write_jsonl(lines))
    splits = Splits(test={"en-de": pairs})
    return Context(recipe, rundir, splits, Prompt(), run_dir, "float32", Reporter(quiet=True))


def test_scores_are_filed_and_follow_the_translations(tmp_path: Path) -> None:
    rows = make_rows(8)
    texts = [row["mt"] for row in rows]
    context = make_context(tmp_path, ["chrF2++"], {"baseline": texts, "pruned-2": texts}, rows)
    first, metrics = score_translations(context, ["baseline", "pruned-2"], ["chrF2++"])
    files = sorted((tmp_path / "scores").rglob("*.json"))
    assert [str(file.relative_to(tmp_path / "scores")) for file in files] == [
        f"{model}/en-de/chrF2++.json" for model in ("baseline", "pruned-2")
    ]
    before = [file.stat().st_mtime_ns for file in files]
    again, _ = score_translations(context, ["baseline", "pruned-2"], ["chrF2++"])
    assert [file.stat().st_mtime_ns for file in files] == before
    assert all((first[key] == again[key]).all() and again[key].dtype == np.int64 for key in first)
    context = make_context(tmp_path, ["chrF2++"], {"baseline": [row["ref"] for row in rows]}, rows)
    better, _ = score_translations(context, ["baseline", "pruned-2"], ["chrF2++"])
    key = ("baseline", "en-de", "chrF2++")
    assert metrics["en-de", "chrF2++"].score(better[key].sum(0)) == pytest.approx(100)
    assert (better["pruned-2", "en-de", "chrF2++"] == first["pruned-2", "en-de", "chrF2++"]).all()


# --- with it ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny-comet and tiny-qe, as tests/tiny_comet.py makes them."""
    folder = tmp_path_factory.mktemp("comet")
    script = Path(__file__).with_name("tiny_comet.py")
    made = subprocess.run([COMET.python(), "-I", script, folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def scorer(checkpoints: Path) -> Iterator[CometScorer]:
    """One process for several tests."""
    with CometScorer(str(checkpoints / "tiny-comet"), device="cpu") as opened:
        yield opened


def command_line_scores(checkpoint: Path, rows: list[Row], folder: Path) -> list[float]:
    """What `comet-score` writes into its JSON file."""
    folder.mkdir(exist_ok=True)
    arguments: list[str] = ["--model", str(checkpoint / "checkpoints/model.ckpt"), "--gpus", "0", "--quiet"]
    for option, key in (("-s", "src"), ("-t", "mt"), ("-r", "ref")):
        if key in rows[0]:
            (folder / key).write_text("".join(row[key] + "\n" for row in rows))
            arguments += [option, str(folder / key)]
    out = folder / "scores.json"
    command = [COMET.python().with_name("comet-score"), *arguments, "--to_json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [row["COMET"] for row in next(iter(json.loads(out.read_text()).values()))]


def children_running(program: str) -> list[int]:
    """Processes below this one whose command line names `program`."""
    return [child.pid for child in psutil.Process().children(recursive=True) if program in child.cmdline()]


def wait_until_gone(pid: int, seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.comet
def test_scores_are_those_of_the_command_line(scorer: CometScorer, checkpoints: Path, tmp_path: Path) -> None:
    rows = make_rows(70)
    told: list[int] = []
    scores = scorer.score(rows, told.append)
    assert sum(told) == 70
    assert scores == pytest.approx(command_line_scores(checkpoints / "tiny-comet", rows, tmp_path), abs=1e-5)
    assert max(scores) - min(scores) > 0.01  # not one score for all
    assert scorer.score([]) == []


@pytest.mark.comet
def test_translations_that_differ_in_one_letter_are_not_taken_for_each_other(scorer: CometScorer) -> None:
    """Embeddings of whole batches are remembered: one is used again only where every token is the same."""
    text = "a c e g i b d f h j " * 12
    rows = [{"src": text, "mt": text, "ref": text}] * 16
    other = f"{text[:110]}j{text[111:]}"
    changed = [{**row, "mt": other} if place == 8 else row for place, row in enumerate(rows)]
    first, second = scorer.score(rows), scorer.score(changed)
    assert [place for place in range(16) if first[place] != second[place]] == [8]


@pytest.mark.comet
def test_a_checkpoint_without_references(checkpoints: Path, tmp_path: Path) -> None:
    rows = make_rows(30)
    bare = [{key: row[key] for key in ("src", "mt")} for row in rows]
    with CometMetric(str(checkpoints / "tiny-qe"), device="cpu") as metric:
        sources, hypotheses = [row["src"] for row in rows], [row["mt"] for row in rows]
        found = metric.statistics(hypotheses, [], sources)
        assert (found == metric.statistics(hypotheses, [row["ref"] for row in rows], sources)).all()
        expected = command_line_scores(checkpoints / "tiny-qe", bare, tmp_path)
        assert found[:, 0] == pytest.approx(expected, abs=1e-5)
        assert metric.score(found.sum(0)) == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.comet
def test_one_process_that_says_how_it_ended(scorer: CometScorer) -> None:
    rows = make_rows(5)
    first = scorer.score(rows)
    pid = scorer.pid
    assert pid is not None and scorer.score(rows) == first and scorer.pid == pid
    with pytest.raises(UserError, match="could not score: ValueError: this checkpoint needs references"):
        scorer.score([{"src": "a", "mt": "b"}])
    assert scorer.score(rows) == first and scorer.pid == pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match="killed by SIGKILL; perhaps memory is short"):
        scorer.score(rows)
    assert scorer.pid is None and scorer.score(rows) == first
    pid = scorer.pid
    scorer.close()
    assert pid is not None and not psutil.pid_exists(pid)


@pytest.mark.comet
def test_the_process_ends_with_its_parent(checkpoints: Path) -> None:
    code = (
        "import os, signal, sys; from raylp.metrics.comet import CometScorer; scorer = CometScorer(sys.argv[1]);"
        "scorer.score([{'src': 'a', 'mt': 'b', 'ref': 'c'}]); print(scorer.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(checkpoints / "tiny-comet")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    assert wait_until_gone(int(answer.stdout))


@pytest.mark.comet
def test_a_checkpoint_that_cannot_be_had_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'nobody/no-comet' could not be fetched .* name a local \.ckpt file") as error:
        CometScorer("nobody/no-comet").score(make_rows(4))
    assert "\n" not in str(error.value) and error.value.exit_code == 1


@pytest.mark.comet
def test_evaluate_scores_once(
    checkpoints: Path, tmp_path: Path, broken_comet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time with an environment that cannot run: nothing is left to compute."""
    rows = make_rows(20)
    path = str(checkpoints / "tiny-comet")
    texts = {"baseline": [row["ref"] for row in rows], "pruned-2": [row["mt"] for row in rows]}
    context = make_context(tmp_path, [path, "BLEU"], texts, rows)
    monkeypatch.delenv("RAYLP_COMET_PYTHON")
    first, metrics = score_translations(context, list(texts), [path, "BLEU"])
    assert set(first) == {(model, "en-de", name) for model in texts for name in ("tiny-comet", "BLEU")}
    assert children_running(str(COMET.python())) == []
    assert (tmp_path / "logs/comet-tiny-comet.log").exists()
    found = score_with_interval(metrics["en-de", "tiny-comet"], first["baseline", "en-de", "tiny-comet"])
    assert found.low < found.value < found.high and found.signature.startswith("tiny-comet|checkpoint:sha256:")
    monkeypatch.setenv("RAYLP_COMET_PYTHON", str(broken_comet))
    again, _ = score_translations(context, list(texts), [path, "BLEU"])
    assert all((first[key] == again[key]).all() for key in first)


@pytest.mark.comet
def test_a_search_by_a_mix_with_comet(
    checkpoints: Path, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path, ray_session: None
) -> None:
    """Workers translate, the one process of COMET scores what they made; both are filed."""
    name = str(checkpoints / "tiny-comet")
    search = {"remove": 1, "objective": {"chrF++": 1.0, name: 0.01}, "block": 16, "strategy": "exhaustive"}
    recipe = parse_recipe(toy_recipe(toy_checkpoint, toy_data, tmp_path / "run", search=search))
    run(recipe, Reporter(quiet=True), only="search")
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["objective"] == {"chrF2++": 1.0, name: 0.01} and plan["noise"] is None
    assert set(plan["removed"]) < {2, 3, 4, 6}
    lines = [json.loads(x) for f in (tmp_path / "run/ledger").glob("*.jsonl") for x in f.read_text().splitlines()]
    filed = [line for line in lines if line["metric"].startswith("tiny-comet|checkpoint:sha256:")]
    assert len(filed) == len(lines) / 2 and all(len(line["statistics"]) == 16 for line in filed)
