"""Recipes are checked whole, before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raylp.errors import UserError
from raylp.recipe import Recipe, binding, differences, dump_recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
GOOD = {"model": "a/b", "data": {"en-de": {"test": "t.tsv"}}, "search": {"remove": 3}, "run_dir": "runs/x"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"serch": {}}, "unknown key 'serch'; did you mean 'search'?"),
        ({"search": {"remove": 1, "protekt": []}}, "unknown key 'search.protekt'; did you mean 'protect'?"),
        (
            {"data": {"en-de": {"tets": "t.tsv", "test": "t.tsv"}}},
            "unknown key 'data.en-de.tets'; did you mean 'test'?",
        ),
        ({"search": {"remove": "many"}}, "search.remove: Input should be a valid integer"),
        ({"search": {"remove": 1, "layers": 2}}, "set one of layers"),
        ({"heal": {"method": "magic"}}, "heal.method: Input should be 'lora', 'qlora' or 'full'"),
        ({"data": {}}, "data"),
        ({"data": {"en-de": {}}}, "no files"),
        ({"data": {"en-de": {"path": "x.tsv"}}}, "path and cut belong together"),
    ],
)
def test_what_is_wrong_is_named(change: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe({**GOOD, **change}, "my.yaml")
    assert said in str(error.value) and str(error.value).startswith("my.yaml: ")
    assert "\n" not in str(error.value)


def test_where_text_lies_makes_no_other_recipe(tmp_path: Path) -> None:
    """As long as it is the same text, or the old is gone and cannot be compared (stages that are done compare it)."""
    for place in ("first", "copy"):
        (tmp_path / place).mkdir()
        for name in ("a.en", "b.de", "c.de"):
            (tmp_path / place / name).write_text(name)

    def lying(place: str, test: str = "b.de", model: str = "a/b") -> Recipe:
        corpus = {"test": ["a.en", test], "search": "s.tsv", "limit": {"test": 8}}
        return parse_recipe({**GOOD, "model": model, "data": {"en-de": corpus}}, base=tmp_path / place)

    def differing(old: Recipe, new: Recipe) -> list[str]:
        return [key for key, _, _ in differences(old, new)]

    assert differing(lying("first"), lying("copy")) == differing(lying("gone"), lying("copy")) == []
    assert differing(lying("first"), lying("first", "c.de")) == ["data.en-de.test"]
    assert differing(lying("first"), lying("first", model="/models/b")) == ["model.name"]
    (tmp_path / "copy" / "b.de").write_text("another")
    assert differing(lying("first"), lying("copy")) == ["data.en-de.test"]


def test_missing_keys() -> None:
    with pytest.raises(UserError, match="'model' is missing; 'run_dir' is missing"):
        parse_recipe({"data": GOOD["data"]})


def test_overrides_and_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: ./m\ndata: {en-de: {test: t.tsv}}\nrun_dir: runs/x\nheal:\n")
    recipe = load_recipe(
        path, ["search.remove=2", "heal.lora.rank=4", "model.dtype=float32", "prompt.template={source} ="]
    )
    assert recipe.prompt.template == "{source} ="
    assert recipe.search is not None and recipe.search.remove == 2
    assert recipe.heal is not None and recipe.heal.lora.rank == 4
    assert recipe.model.name == str(tmp_path / "m") and recipe.model.dtype == "float32"
    assert recipe.data["en-de"].test == str(tmp_path / "t.tsv")
    for wrong in ("search", "model.name.x.y=1"):
        with pytest.raises(UserError, match="--set"):
            load_recipe(path, [wrong])
    path.write_text("model: [")
    with pytest.raises(UserError, match="not YAML"):
        load_recipe(path)
    with pytest.raises(UserError, match="is not there"):
        load_recipe(tmp_path / "none.yaml")


def test_stages_that_are_off_and_on() -> None:
    assert parse_recipe({**GOOD, "heal": None}).heal is not None
    assert parse_recipe({**GOOD, "heal": False}).heal is None
    assert parse_recipe({**GOOD, "search": False}).search is None


def test_what_heals_needs_from_a_teacher_is_there() -> None:
    stored = {"loss": {"distillation": 1, "teacher": "stored"}}
    for sections, said in (
        ({"heal": stored, "distill": {}}, "probabilities that distill.top_k keeps"),
        ({"heal": {"teacher_share": 0.5}}, "add a section 'distill:'"),
        ({"heal": {**stored, "data": "authentic"}}, "is about teacher data"),
    ):
        with pytest.raises(UserError, match=said):
            parse_recipe({**GOOD, **sections})
    assert parse_recipe({**GOOD, "heal": stored, "distill": {"top_k": 8}}).heal is not None


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"heal": {"data": "teacher"}}, "add a section 'distill:'"),
        ({"heal": {}, "search": None}, "add a section 'search:'"),
        ({"repair": {}, "search": None}, "add a section 'search:'"),
        ({"heal": True}, "heal: a section of keys is wanted"),
        ({"heal": {"every": True}}, "heal.every: give a number, or false to turn it off"),
        ({"heal": {"zero_stage": True}}, "heal.zero_stage: give a number"),
        ({"heal": {"learning_rate": float("inf")}}, "heal.learning_rate: Input should be a finite number"),
        ({"heal": {"patience": 3}}, "patience needs several looks"),
        ({"heal": {"when": "before", "data": "teacher"}, "distill": {}}, "before pruning there is no teacher"),
        ({"distill": {"filters": {"max_words": 0}}}, "above 0, or false"),
        ({"distill": {"filters": {"min_comet": float("nan")}}}, "min_comet: Input should be a finite number"),
        ({"distill": {"teacher": "m", "endpoint": "localhost:8000"}}, "write a URL"),
        ({"distill": {"sources": "mono", "filters": {"min_chrf_to_reference": 5}}}, "no references"),
    ],
)
def test_what_cannot_work_is_refused_at_once(sections: dict[str, Any], said: str) -> None:
    content = {key: value for key, value in {**GOOD, **sections}.items() if value is not None}
    with pytest.raises(UserError, match=said) as told:
        parse_recipe(content)
    assert str(told.value).count("recipe:") == 1 and "\n" not in str(told.value)


def test_a_switch_is_no_number_and_zero_no_switch() -> None:
    """YAML reads `off` as false, and Python takes 0 for it."""
    off = parse_recipe(
        {**GOOD, "heal": {"packing": False, "patience": False, "every": False}, "distill": {"top_k": False}}
    )
    assert off.heal is not None and (off.heal.packing, off.heal.patience, off.heal.every) == (False, None, None)
    assert off.distill is not None and off.distill.top_k is None
    zero, none = (parse_recipe({**GOOD, "distill": {"filters": {"min_comet": value}}}) for value in (0, False))
    assert zero.distill is not None and zero.distill.filters.min_comet == 0.0
    assert zero.distill.filters.min_comet is not False
    assert binding(zero)["distill"] == {"filters": {"min_comet": 0.0}} and binding(none)["distill"] == {}
    assert differences(none, zero) == [("distill.filters.min_comet", False, 0.0)]


def test_only_free_sections_may_change() -> None:
    old = parse_recipe(GOOD)
    assert differences(old, parse_recipe({**GOOD, "bench": {"requests": 3}, "resources": {"workers": 2}})) == []
    assert differences(old, parse_recipe({**GOOD, "search": {"remove": 4}})) == [("search.remove", 3, 4)]
    assert ("heal.epochs", None, 1) in differences(old, parse_recipe({**GOOD, "heal": {}}))
    healed = parse_recipe({**GOOD, "heal": {"workers": 2}})
    assert differences(healed, parse_recipe({**GOOD, "heal": {"row_tokens": 64, "checkpoint_every": 5}})) == []
    assert binding(healed)["heal"] == {}, "keys at their defaults do not bind: a later version may know more of them"
