"""A recipe: one YAML file that says what a run is. Read whole and checked whole before anything starts."""

import difflib
import filecmp
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from raylp.bench.config import Bench
from raylp.config import Section, changed, same
from raylp.data.prompt import DEFAULT_TEMPLATE, Bound
from raylp.distill.config import FREE as DISTILL_FREE
from raylp.distill.config import Distill
from raylp.errors import UserError
from raylp.evaluate.config import Evaluate
from raylp.heal.config import FREE as HEAL_FREE
from raylp.heal.config import Heal
from raylp.names import REPAIRED
from raylp.quantize.config import Quantize
from raylp.repair.config import Repair
from raylp.search.config import Search
from raylp.serve.config import Serve

# A run directory goes on when these change; every other change makes it another run.
FREE_SECTIONS = ("resources", "serve", "bench", "cache", "run_dir")
FREE_KEYS = (*(f"heal.{key}" for key in HEAL_FREE), *(f"distill.{key}" for key in DISTILL_FREE))

File = str | list[str]
CORPUS_FILES = ("search", "train", "dev", "test", "mono", "path")  # the keys of a corpus that name files


class Model(Section):
    """`name`: a directory, a hub id, or `package:NAME`; `dtype`: of weights in memory (auto: float32 on a CPU)."""

    name: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Cut(Section):
    """Sizes of the splits that are cut from one source; the rest is train."""

    search: int = Field(100, ge=0)
    dev: int = Field(100, ge=0)
    test: int = Field(300, ge=0)
    train: int | None = Field(None, ge=0)


class Limits(Section):
    """The first so many sentences of a split are used."""

    search: int | None = Field(None, ge=1)
    train: int | None = Field(None, ge=1)
    dev: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)
    mono: int | None = Field(None, ge=1)


class Corpus(Section):
    """One source of parallel text: a file for each split, or `path` with `cut`.

    `pair` is what follows the last `:` of the corpus's name, unless it is given. A file is .jsonl, .tsv, or a list of
    two text files, source and target; relative paths start at the recipe. `mono`: source text alone, .txt or .jsonl,
    for a teacher to translate.
    """

    pair: str | None = None
    search: File | None = None
    train: File | None = None
    dev: File | None = None
    test: File | None = None
    mono: str | None = None
    path: File | None = None
    cut: Cut | None = None
    limit: Limits = Limits()

    @model_validator(mode="after")
    def _files_or_cut(self) -> "Corpus":
        files = [self.search, self.train, self.dev, self.test]
        if (self.path is None) != (self.cut is None):
            raise ValueError("path and cut belong together: cut says how many pairs each split takes from path")
        if self.path is not None and any(files):
            raise ValueError("give either one file for each split or path with cut, not both")
        if self.path is None and not any([*files, self.mono]):
            raise ValueError("no files: name search, train, dev, test, or path with cut")
        return self


class PromptSection(Section):
    """`examples`: how many training pairs the prompt shows. The rest as in `raylp.data.prompt.Prompt`."""

    template: str = DEFAULT_TEMPLATE
    examples: int = Field(0, ge=0)
    chat: bool = False
    bound: Bound = Bound()


class Resources(Section):
    """`workers`: resident models at a time in search and evaluate (auto: as many as fit on the GPUs, else one a core up
    to 4).

    `gpus_per_worker`: of each of them: 0.5 for two on a GPU, 2 for a model that needs two GPUs (auto: by its size).
    `batch_size`: sentences that one of them translates at once, in a search of several candidates together (auto: 256
    on a GPU and 128 on a CPU, as far as memory allows).
    `address`: of a Ray cluster (default: $RAY_ADDRESS, else a Ray of its own on this machine).
    `cpus`: logical CPUs of such a Ray of its own; they may exceed the cores.
    """

    workers: int | Literal["auto"] = "auto"
    gpus_per_worker: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    address: str | None = None
    cpus: int | None = Field(None, ge=1)
    gpus: int | None = Field(None, ge=0)


class Recipe(Section):
    """The whole of it. A section that is missing (or `false`) is a stage that is not run."""

    model: Model
    data: dict[str, Corpus] = Field(min_length=1)
    prompt: PromptSection = PromptSection()
    search: Search | None = None
    repair: Repair | None = None
    distill: Distill | None = None
    heal: Heal | None = None
    quantize: Quantize | None = None
    evaluate: Evaluate | None = None
    serve: Serve = Serve()
    bench: Bench | None = None
    resources: Resources = Resources()
    cache: str | None = None
    run_dir: str

    def data_files(self) -> list[str]:
        """The files of all corpora."""
        named = [getattr(corpus, key) for corpus in self.data.values() for key in CORPUS_FILES]
        return [file for files in named if files for file in ([files] if isinstance(files, str) else files)]

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            value = {**value, "model": {"name": value["model"]}}
        if isinstance(value, dict):  # `heal:` with nothing below is a stage with defaults, `heal: false` is none
            filled: dict[str, Any] = {stage: {} for stage in _EMPTY_STAGES if stage in value and value[stage] is None}
            value = {key: entry for key, entry in {**value, **filled}.items() if entry is not False}
        return value

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> "Recipe":
        if self.repair is not None and self.search is None:
            raise ValueError("repair mends what a search has pruned: add a section 'search:'")
        if self.heal is not None and self.heal.when != "before" and self.search is None:
            raise ValueError(
                "heal trains what a search has pruned: add a section 'search:' (search.given takes a list of layers), "
                "or set heal.when: before"
            )
        if self.heal is not None and self.heal.data == "teacher" and self.distill is None:
            raise ValueError(
                "heal.data: teacher learns from a teacher's translations: add a section 'distill:', or set "
                "heal.data: authentic"
            )
        return self

    @model_validator(mode="after")
    def _heals_what_is_there(self) -> "Recipe":
        start = self.heal.start if self.heal is not None else "pruned"
        made = ["pruned", *(REPAIRED[method] for method in (self.repair.methods if self.repair else ()))]
        if start not in made:
            method = next(method for method, kind in REPAIRED.items() if kind == start)
            raise ValueError(f"heal.start: {start} needs repair.methods to name {method!r}")
        if self.heal is not None and self.heal.every is not None:
            search = self.search
            if search is None or search.given is not None or (search.layers is None and search.remove is None):
                raise ValueError(
                    "heal.every heals on the way of a search to a number of layers: set search.layers or "
                    "search.remove, without search.given"
                )
            if search.max_loss is not None or search.swaps or search.strategy == "oneshot":
                raise ValueError("heal.every: each leg is a search of its own: leave out max_loss, swaps and oneshot")
            if "agreement" in search.objective:
                raise ValueError("heal.every: a later leg has no unpruned model to agree with: take another objective")
            if self.repair is not None:
                raise ValueError("heal.every heals the models as pruned: leave out the section 'repair'")
        if self.heal is not None and self.heal.loss.stored and (self.distill is None or self.distill.top_k is None):
            raise ValueError("heal.loss.teacher: stored learns from probabilities that distill.top_k keeps: set it")
        if self.heal is not None and self.heal.teacher_share is not None and self.distill is None:
            raise ValueError("heal.teacher_share is of a teacher's translations: add a section 'distill:'")
        return self


_EMPTY_STAGES = ("search", "repair", "distill", "heal", "quantize", "evaluate", "bench", "serve", "resources", "prompt")


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads `path`, applies `a.b=c` overrides (values as in YAML), checks everything.

    Raises:
        UserError: with the key, what is wrong with it, and the nearest name where a name is not known.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"recipe {file} is not there")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {file}: a mapping of sections is wanted, such as 'model: ...'")
    return parse_recipe(override_recipe(content, overrides), str(file), file.parent)


def override_recipe(content: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`content` with `a.b=c` overrides put in.

    Raises:
        UserError: an override is not of that form.
    """
    for override in overrides:
        _override(content, override)
    return content


def parse_recipe(content: dict[str, Any], name: str = "recipe", base: Path | None = None) -> Recipe:
    """Checks a recipe given as a mapping; relative data files start at `base`."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        told = dict.fromkeys(_explain(content, item) for item in _telling(error.errors()))
        raise UserError(f"{name}: {'; '.join(told)}") from error
    if base is None:
        return recipe
    data = {key: _anchor(corpus, base) for key, corpus in recipe.data.items()}
    model = recipe.model.model_copy(update={"name": _near(recipe.model.name, base)})
    evaluate = recipe.evaluate
    if evaluate is not None:
        evaluate = evaluate.model_copy(update={"metrics": [_near(name, base) for name in evaluate.metrics]})
    distill = recipe.distill
    if distill is not None:
        filters = distill.filters.model_copy(update={"comet": _near(distill.filters.comet, base)})
        update = {"teacher": _near(distill.teacher, base), "by": _near(distill.by, base), "filters": filters}
        distill = distill.model_copy(update=update)
    search = recipe.search
    if search is not None:
        objective = {_near(name, base): weight for name, weight in search.objective.items()}
        search = search.model_copy(update={"objective": objective})
    return recipe.model_copy(
        update={"data": data, "model": model, "search": search, "distill": distill, "evaluate": evaluate}
    )


def _near(name: str, base: Path) -> str:
    """A path that starts with a dot starts at the recipe; other names stay."""
    return str((base / name).resolve()) if name.startswith(".") else name


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults included, in the order of its sections."""
    sections = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Keys outside the free sections whose values differ: (key, old, new). Data files that only lie elsewhere now are
    no difference: a job's copy of the project, with the text beside the recipe, is in another place for each Ray.
    """
    before, after = (flatten(recipe.model_dump(mode="json")) for recipe in (old, new))
    keys = [key for key in {**before, **after} if key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS]
    pairs = [(key, before.get(key), after.get(key)) for key in keys]
    return [(key, was, now) for key, was, now in pairs if not same(was, now) and not _only_moved(key, was, now)]


def _only_moved(key: str, was: Any, now: Any) -> bool:
    """Whether `key` names the same data files: by name, and by what is in them where the old ones are still there."""
    if not key.startswith("data.") or key.rpartition(".")[2] not in CORPUS_FILES:
        return False
    old, new = ([files] if isinstance(files, str) else files for files in (was, now))
    if not isinstance(old, list) or not isinstance(new, list) or len(old) != len(new):
        return False
    return all(
        Path(a).name == Path(b).name and (not os.path.isfile(a) or (os.path.isfile(b) and filecmp.cmp(a, b, False)))
        for a, b in zip(old, new, strict=True)
    )


def binding(recipe: Recipe) -> dict[str, Any]:
    """The recipe's sections as mappings, without the keys that change no result or have their default's value: a run
    stays the same when a later version knows more keys. (Where a default changes, `differences` tells.)
    """
    content = changed(recipe)
    for section, key in (place.split(".") for place in FREE_KEYS):
        content.get(section, {}).pop(key, None)
    return content


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one of dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _anchor(corpus: Corpus, base: Path) -> Corpus:
    def absolute(file: File | None) -> File | None:
        if file is None:
            return None
        if isinstance(file, list):
            return [str((base / part).resolve()) for part in file]
        return str((base / file).resolve())

    return corpus.model_copy(update={key: absolute(getattr(corpus, key)) for key in CORPUS_FILES})


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write key=value, such as search.remove=3")
    *path, last = key.split(".")
    place = content
    for part in path:
        inner = place.get(part)
        if isinstance(inner, str) and part == "model":
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {part} is a value, not a section")
        place[part] = inner
        place = inner
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:  # a text that YAML reads otherwise, such as the template '{source} ='
        place[last] = text


def _telling(errors: Sequence[Any]) -> list[Any]:
    """Without what a number's alternative, `false`, has to say: it is no news that a number is not `false`."""
    rest = [error for error in errors if error["type"] != "literal_error" or error["ctx"]["expected"] != "False"]
    return rest or list(errors)


def _explain(content: dict[str, Any], item: Any) -> str:
    alternative = re.compile(r"constrained-|literal\[|(float|int|bool|str)$")  # of a key that may be of several types
    place = ".".join(str(part) for part in item["loc"] if not alternative.match(str(part)))
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {place!r}; {hint}"
    if item["type"] == "missing":
        return f"{place!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    shown = f" (it is {given!r})" if not isinstance(given, (dict, list)) else ""
    if item["type"] == "model_type":
        return f"{place}: a section of keys is wanted, or nothing for the defaults{shown}"
    return f"{place}: {message}{shown}" if place else message


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `path`, found by walking the types of the models."""
    model: Any = Recipe
    for part in path:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        annotation = field.annotation if field else model
        choices = [annotation, *get_args(annotation)]
        model = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
