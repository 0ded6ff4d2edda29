"""Models of different runs, compared on the same sentences."""

import json
import shutil
from pathlib import Path

import pytest
import toy
from conftest import toy_recipe
from sacrebleu.metrics import CHRF

from raylp.cli import main
from raylp.errors import UserError
from raylp.evaluate.compare import compare, find_entrant
from raylp.pipeline import run
from raylp.progress import Reporter
from raylp.recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("ray_session")
GOOD, BAD = list(toy.TRUTH.dead), [0, toy.TRUTH.num_layers - 1]
LEFT = f"pruned-{toy.TRUTH.num_layers - len(GOOD)}"


@pytest.fixture(scope="module")
def runs(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run without layers that do nothing, one without two that do."""
    assert len(GOOD) == len(BAD)
    found = {}
    for name, given in {"good": GOOD, "bad": BAD}.items():
        found[name] = tmp_path_factory.mktemp("compare") / name
        search = {"given": given, "protect": []}
        recipe = toy_recipe(toy_checkpoint, toy_data, found[name], search=search, evaluate={"metrics": ["chrF2++"]})
        run(parse_recipe(recipe), Reporter(quiet=True))
    return found


def hypotheses(run_dir: Path, model: str) -> tuple[list[str], list[str]]:
    (file,) = (run_dir / "translations" / model).glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["hypothesis"] for row in rows], [row["target"] for row in rows]


def test_differences_are_those_of_the_corpus_scores(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = (find_entrant(str(runs[name])) for name in ("bad", "good"))
    assert (bad.model, bad.removed, good.removed) == (LEFT, tuple(BAD), tuple(GOOD))
    whole = find_entrant(f"{runs['good']}:baseline")
    ((_, metric), standings), *others = compare([bad, good, whole]).items()
    assert metric == "chrF2++" and not others
    scores = []
    for entrant in (bad, good, whole):
        said, references = hypotheses(Path(entrant.run), entrant.model)
        scores.append(CHRF(word_order=2).corpus_score(said, [references]).score)
    assert [s.score.value for s in standings] == pytest.approx(scores)
    assert standings[0].difference is None
    for standing, score in zip(standings[1:], scores[1:], strict=True):
        assert standing.difference is not None
        assert standing.difference.value == pytest.approx(score - scores[0])
        assert standing.difference.low > 0
    with pytest.raises(SystemExit) as left:
        main(["compare", str(runs["bad"]), f"{runs['good']}:baseline"])
    told = capsys.readouterr().out
    assert left.value.code == 0 and f"{scores[0]:.1f}" in told and "yes" in told


def test_what_one_run_translated_another_takes_over(
    toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place, given in ((first, GOOD), (second, BAD)):
        search = {"given": given, "protect": []}
        recipe = toy_recipe(
            toy_checkpoint, toy_data, place, search=search, evaluate={"metrics": ["chrF2++"]}, cache=str(first)
        )
        run(parse_recipe(recipe), Reporter(quiet=True))
    notes = [json.loads(line) for file in second.glob("logs/generations-*") for line in file.read_text().splitlines()]
    assert {Path(note["path"]).name for note in notes} == {LEFT}, "the baseline was translated before"
    assert hypotheses(second, "baseline") == hypotheses(first, "baseline")
    assert hypotheses(second, LEFT) != hypotheses(first, LEFT), "other layers, so another model of the same name"
    # What was translated is not translated again when the file is lost, nor counted twice.
    shutil.rmtree(second / "translations")
    shutil.rmtree(second / "scores")
    (second / "evaluate.json").unlink()
    run(parse_recipe(recipe), Reporter(quiet=True))
    again = [json.loads(line) for file in second.glob("logs/generations-*") for line in file.read_text().splitlines()]
    assert again == notes
    lines = [json.loads(line) for file in first.glob("ledger/*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines})


def test_some_models_only(toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path: Path) -> None:
    evaluate = {"metrics": ["chrF2++"], "models": ["pruned"]}
    recipe = toy_recipe(
        toy_checkpoint, toy_data, tmp_path / "run", search={"given": GOOD, "protect": []}, evaluate=evaluate
    )
    done = run(parse_recipe(recipe), Reporter(quiet=True))
    assert [model["name"] for model in done.read_json("results.json")["models"]] == [LEFT]
    recipe["evaluate"] = {**evaluate, "models": ["heald"]}
    with pytest.raises(
        UserError, match=r"evaluate\.models: this recipe makes no model 'heald'; it makes baseline, pruned"
    ):
        run(parse_recipe({**recipe, "run_dir": str(tmp_path / "other")}), Reporter(quiet=True))


def test_what_cannot_be_compared_is_told(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="not a run directory, nor RUN:MODEL"):
        find_entrant(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=f"no scores of 'healed-9'; it has baseline, {LEFT}"):
        find_entrant(f"{runs['good']}:healed-9")
    other = tmp_path / "other"
    shutil.copytree(runs["good"], other)
    (file,) = (other / "translations" / LEFT).glob("*.jsonl")
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[1:]))
    with pytest.raises(UserError, match="holds other sentences there than in"):
        compare([find_entrant(str(runs["good"])), find_entrant(str(other))])
    (other / "evaluate.json").unlink()
    with pytest.raises(SystemExit) as left:
        main(["compare", str(runs["good"]), str(other)])
    assert left.value.code == 2 and "has no scores yet: raylp evaluate RECIPE" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["compare", str(runs["good"])])
    assert left.value.code == 2 and "at least two" in capsys.readouterr().err
