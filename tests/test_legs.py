"""Pruning and healing in turn: legs' plans become one, and every model says which of the original's layers it has."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import toy
from conftest import toy_recipe
from rich.console import Console

from raylp.data.corpus import read_pairs
from raylp.errors import UserError
from raylp.models.checkpoint import read_card, stack_size
from raylp.models.load import load_model
from raylp.pipeline import needed_disk, open_context, run
from raylp.progress import Reporter
from raylp.recipe import Recipe, parse_recipe
from raylp.report.contents import read_plan
from raylp.report.plan_view import render_plan
from raylp.rundir import RunDir
from raylp.search.config import Search
from raylp.search.legs import joined, remaining, section_of, stops
from raylp.search.replay import read_recording

LAYERS = toy.TRUTH.num_layers - toy.TRUTH.num_removable
HEAL = {"every": 2, "batch_size": 16, "data": "both"}


@pytest.mark.parametrize(
    ("section", "every", "expected"),
    [
        ({"layers": 14}, 2, [16, 14]),
        ({"layers": 14}, 3, [15, 14]),
        ({"layers": [15, 14]}, 2, [16, 15, 14]),
        ({"remove": 3}, 1, [17, 16, 15]),
        ({"layers": [16, 14]}, 9, [16, 14]),
    ],
)
def test_heals_after_so_many_layers_and_at_each_depth(section: dict[str, Any], every: int, expected: list[int]) -> None:
    assert stops(Search.model_validate(section), every, 18) == expected


def test_a_leg_protects_the_same_layers() -> None:
    section = Search.model_validate({"layers": [7, 5], "protect": [0, 4, -1]})
    leg = section_of(section, 5, 9, gone=[2, 6])
    assert remaining(9, [2, 6]) == [0, 1, 3, 4, 5, 7, 8]
    assert leg.depths == [5] and leg.protect == [0, 3, 6]


def test_plans_of_legs_are_one_plan_in_the_originals_numbers() -> None:
    score = {"value": 40.0, "low": 39.0, "high": 41.0, "n": 8}

    def entry(gone: list[int], removed: int, others: list[int]) -> dict[str, Any]:
        tried = [{"removed": [*gone, layer], "score": score} for layer in (removed, *others)]
        return {"removed": [removed], "restored": [], "candidates": tried, "healed": tried[:1], "units": 4}

    first = {
        "num_layers": 6,
        "removed": [2],
        "baseline": score,
        "rounds": [entry([], 2, [1])],
        "depths": [{"layers": 5, "removed": [2]}],
        "spent": {"units": 5},
    }
    # The second leg's model has the original's layers 0, 1, 3, 4, 5; the third's 0, 1, 4, 5.
    second = {
        "num_layers": 5,
        "removed": [2],
        "baseline": {**score, "value": 50.0},
        "noise": 12.0,
        "rounds": [entry([], 2, [3])],
        "depths": [{"layers": 4, "removed": [2]}],
        "spent": {"units": 4},
    }
    third = {**second, "num_layers": 4, "removed": [1], "rounds": [entry([], 1, [2])]}
    third["depths"] = [{"layers": 3, "removed": [1]}]
    whole = joined([first, second, third], [{"layers": 5}, {"layers": 4}])
    assert whole["removed"] == [2, 3, 1] and whole["num_layers"] == 6 and whole["legs"] == [5, 4, 3]
    assert [r["removed"] for r in whole["rounds"]] == [[2], [3], [1]]
    assert [[c["removed"] for c in r["candidates"]] for r in whole["rounds"]] == [
        [[2], [1]],
        [[2, 3], [2, 4]],
        [[2, 3, 1], [2, 3, 4]],
    ]
    assert [r["healed"][0]["removed"] for r in whole["rounds"]] == [[2], [2, 3], [2, 3, 1]]
    assert whole["depths"] == [
        {"layers": 5, "removed": [2]},
        {"layers": 4, "removed": [2, 3]},
        {"layers": 3, "removed": [2, 3, 1]},
    ]
    start = whole["rounds"][1]["start"]
    assert start["layers"] == 5 and start["score"] == {**score, "value": 50.0} and start["noise"] == 12.0
    assert "start" not in whole["rounds"][0] and whole["spent"] == {"units": 13}
    assert first["removed"] == [2] and "start" not in second["rounds"][0]  # what went in is as it was


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"search": {"given": [3]}}, "set search.layers or search.remove"),
        ({"search": {"given": [3], "layers": 7}}, "without search.given"),
        ({"search": {"layers": LAYERS, "strategy": "oneshot"}}, "oneshot"),
        ({"search": {"layers": LAYERS}, "repair": {}}, "repair"),
        ({"search": {"layers": LAYERS}, "heal": {**HEAL, "when": "before"}}, "when: after or both"),
    ],
)
def test_what_does_not_go_with_it_is_refused(sections: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        parse_recipe(toy_recipe(tmp_path, {"search": tmp_path}, tmp_path, **{"heal": HEAL, **sections}))


@pytest.fixture(scope="module")
def in_turn(
    ray_session: None, toy_checkpoint: Path, toy_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """Adapted, then 8 to 6 layers, healed; to 5, healed again; each time the adapted model teaches too."""
    run_dir = tmp_path_factory.mktemp("in-turn") / "run"
    heal = {**HEAL, "when": "both", "loss": {"distillation": 0.5}}
    sections = {"search": {"layers": LAYERS}, "heal": heal, "evaluate": {}}
    content = toy_recipe(toy_checkpoint, toy_data, run_dir, **sections)
    content["data"]["xx-yy"]["limit"] = {"train": 48, "test": 16}
    recipe = parse_recipe(content)
    # As a teacher might have left them: 16 translations beside the 48 of the training text.
    rows = [
        {"id": f"t{i}", "pair": "xx-yy", "source": pair.source, "translation": f"{pair.target} {i}", "kept": True}
        for i, pair in enumerate(read_pairs(toy_data["train"], "xx-yy")[:16])
    ]
    with RunDir(str(run_dir)).building("distill") as target:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target / "teacher.parquet")
    run(recipe, Reporter(quiet=True))
    return recipe, run_dir


def test_the_right_layers_go_one_leg_after_the_other(in_turn: tuple[Recipe, Path]) -> None:
    _, run_dir = in_turn
    plan = json.loads((run_dir / "plan.json").read_text())
    answers = [{*toy.TRUTH.dead, *one} for one in itertools.product(*toy.TRUTH.twins)]
    assert set(plan["removed"]) in answers and plan["legs"] == [6, 5]
    assert [depth["layers"] for depth in plan["depths"]] == [6, 5]
    assert plan["rounds"][2]["start"]["layers"] == 6
    first, second = (json.loads((run_dir / f"legs/{stop}/plan.json").read_text()) for stop in (6, 5))
    assert first["num_layers"] == 8 and second["num_layers"] == 6


def test_every_model_is_of_the_one_before(in_turn: tuple[Recipe, Path], toy_checkpoint: Path) -> None:
    _, run_dir = in_turn
    plan = json.loads((run_dir / "plan.json").read_text())
    gone = {depth["layers"]: depth["removed"] for depth in plan["depths"]}
    for name in ("pruned-6", "healed-6", "pruned-5", "healed-5"):
        path, layers = run_dir / "models" / name, int(name[-1])
        assert stack_size(path) == layers
        assert (read_card(path) or {})["removed"] == gone[layers]
    # The second cut took one layer out of the healed model, and nothing else.
    kept = remaining(8, gone[6])
    place = kept.index(gone[5][-1])
    healed, cut = (load_model(run_dir / "models" / name) for name in ("healed-6", "pruned-5"))
    left = [layer for number, layer in enumerate(healed.model.layers) if number != place]
    for ours, theirs in zip(cut.model.layers, left, strict=True):
        assert (ours.mlp.up_proj.weight == theirs.mlp.up_proj.weight).all()
    learned = load_model(toy_checkpoint).model.layers[kept[0]].mlp.up_proj.weight
    assert (healed.model.layers[0].mlp.up_proj.weight != learned).any()


def test_the_baseline_is_healed_as_often(in_turn: tuple[Recipe, Path]) -> None:
    recipe, run_dir = in_turn
    steps = {
        name: json.loads((run_dir / f"heal/{name}.json").read_text())["steps"]
        for name in ("healed-6", "healed-5", "baseline-healed")
    }
    of_leg = json.loads((run_dir / "legs/6/heal/baseline-healed.json").read_text())["steps"]
    assert set(steps.values()) == {of_leg} == {4}
    first = load_model(run_dir / "legs/6/models/baseline-healed").model.layers[0].mlp.up_proj.weight
    second = load_model(run_dir / "models/baseline-healed").model.layers[0].mlp.up_proj.weight
    assert (first != second).any(), "healed twice, each time from what the last healing left"
    context = open_context(recipe, Reporter(quiet=True))
    whole = needed_disk(context)
    (run_dir / "legs/6/models/baseline-healed/manifest.json").rename(run_dir / "aside")
    assert needed_disk(context) > whole
    (run_dir / "aside").rename(run_dir / "legs/6/models/baseline-healed/manifest.json")


def test_the_report_says_where_it_was_healed(in_turn: tuple[Recipe, Path]) -> None:
    rundir = RunDir(str(in_turn[1]))
    plan = read_plan(rundir)
    third = plan.rounds[2]
    assert third.start == 6 and len(third.gone) == 2
    assert third.before is not None and third.before.value != plan.rounds[1].score
    console = Console(record=True, width=200)
    render_plan(rundir, console)
    assert "Before round 3 the model was healed at 6 layers" in console.export_text()
    with pytest.raises(UserError, match="healed in between"):
        read_recording(rundir)


def test_again_does_nothing_and_a_lost_leg_comes_back(in_turn: tuple[Recipe, Path]) -> None:
    recipe, run_dir = in_turn
    plan = (run_dir / "plan.json").read_text()
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("models/*/manifest.json")}
    run(recipe, Reporter(quiet=True))
    manifest = json.loads((run_dir / "manifest.json").read_text())
    del manifest["stages"]["heal"]  # as if it had been killed after the second leg's search
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    (run_dir / "legs/5/plan.json").unlink()
    run(recipe, Reporter(quiet=True), only="heal")
    assert (run_dir / "plan.json").read_text() == plan
    (run_dir / "plan.json").unlink()
    run(recipe, Reporter(quiet=True))
    assert (run_dir / "plan.json").read_text() == plan
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("models/*/manifest.json")} == before
    lines = [
        json.loads(line)
        for file in run_dir.glob("legs/*/ledger/*.jsonl")
        for line in file.read_text().split("\n")
        if line
    ]
    assert len({line["key"] for line in lines}) == len(lines)


def test_translations_are_there_for_all(in_turn: tuple[Recipe, Path]) -> None:
    _, run_dir = in_turn
    results = json.loads((run_dir / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == [
        "baseline",
        "original",
        "pruned-5",
        "pruned-6",
        "healed-5",
        "healed-6",
        "baseline-healed",
    ]
    pairs = {(entry["a"], entry["b"]) for entry in results["comparisons"]}
    assert ("healed-5", "baseline-healed") in pairs
    assert ("healed-6", "baseline-healed") not in pairs, "that one was healed more often"
