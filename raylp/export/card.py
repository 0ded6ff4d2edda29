"""The model card: what was removed, learned from what, measured how, and how to use it, from the run's own records."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from raylp.data.languages import language_name, split_pair
from raylp.data.prompt import Prompt
from raylp.models.checkpoint import read_card
from raylp.report import numbers
from raylp.report.contents import Contents, Model, read_contents
from raylp.report.search_words import objective_label
from raylp.rundir import RunDir

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Of the models beside which the exported one is shown.
BESIDE = ("original", "baseline", "baseline-healed")


@dataclass(frozen=True)
class ModelFacts:
    """Of one model of a run. `base`: where the first model of its line came from, a hub id, a package or a directory.

    `card`: its raylp.json; `pairs`: language pairs it was made for.
    """

    name: str
    base: str
    card: dict[str, Any]
    contents: Contents
    pairs: tuple[str, ...]

    @property
    def prompt(self) -> Prompt:
        return Prompt.model_validate(self.card["prompt"])

    @property
    def model(self) -> Model:
        return self.contents.model(self.name) or Model(self.name)

    @property
    def base_name(self) -> str:
        return shareable(self.base)

    @property
    def adapted(self) -> bool:
        """Whether what was cut had been trained before."""
        return self.contents.adapted_first or self.base != self.card.get("base_model")

    @property
    def licence(self) -> str:
        found = self.contents.manifest.get("model") or {}
        return str(found.get("licence") or "")


def facts_of(rundir: RunDir, name: str) -> ModelFacts:
    """What the run knows of its model `name`.

    Raises:
        UserError: the run or the model's card cannot be read.
    """
    contents = read_contents(rundir)
    card = read_card(rundir.local(f"models/{name}")) or {}
    data = contents.recipe.get("data") or {}
    pairs = dict.fromkeys(
        str((corpus or {}).get("pair") or source.rpartition(":")[2]) for source, corpus in data.items()
    )
    return ModelFacts(name, first_base(str(card.get("base_model") or "")), card, contents, tuple(pairs))


def shareable(model: str) -> str:
    """A model's name fit for others to read: of a path of this machine, its last part."""
    return Path(model).name if model.startswith(("/", ".", "~")) or model.count("/") > 1 else model


def first_base(name: str) -> str:
    """The model at the beginning of a line of raylp's checkpoints: the base of the base, as long as it is there."""
    seen = set()
    while name not in seen and Path(name).is_dir() and (card := read_card(Path(name))):
        seen.add(name)
        name = str(card.get("base_model") or name)
    return name


def model_card(facts: ModelFacts) -> str:
    """README.md for the checkpoint, with the front matter of the model hub."""
    environment = Environment(
        loader=PackageLoader("raylp.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    contents = facts.contents
    plan = contents.plan
    shown = [*(contents.model(name) for name in BESIDE if name != facts.name), facts.model]
    models = [model for model in shown if model is not None]
    pair = facts.pairs[0]
    return environment.get_template("card.md.jinja").render(
        facts=facts,
        numbers=numbers,
        plan=plan,
        removed=[int(layer) for layer in facts.card.get("removed") or []],
        objective=objective_label(contents.objective),
        hub_id=facts.base_name if _HUB_ID.fullmatch(facts.base_name) else None,
        languages=sorted({code.partition("_")[0] for pair in facts.pairs for code in split_pair(pair)}),
        names=[" to ".join(map(language_name, split_pair(pair))) for pair in facts.pairs],
        models=models,
        places=[(t, m) for t in contents.test_sets for m in contents.metrics if facts.model.score(t, m)],
        settings=[setting for setting in contents.settings if setting in facts.model.speed],
        differences=[c for c in contents.comparisons if facts.name in (c.a, c.b) and {c.a, c.b} & set(BESIDE)],
        heal=contents.recipe.get("heal") or {},
        data=contents.manifest.get("data") or {},
        versions=contents.manifest.get("versions") or {},
        machine=contents.manifest.get("machine") or {},
        pair=pair,
        example=_literal(facts.prompt, pair),
        raylp=contents.manifest.get("raylp", ""),
    )


def _literal(prompt: Prompt, pair: str) -> str:
    """The prompt for a sentence as Python source; `{source}` stands for the sentence."""
    asked = f'{_quoted(prompt.ask("{source}", pair))}.replace("{{source}}", source)'
    shown = prompt.examples.get(pair, [])
    if not prompt.chat:
        lines = [_quoted(f"{prompt.ask(source, pair)} {target}\n") for source, target in shown]
        return _block("(", ["\n    + ".join([*lines, asked])], ")")
    turns = []
    for source, target in shown:
        turns.append(f'{{"role": "user", "content": {_quoted(prompt.ask(source, pair))}}}')
        turns.append(f'{{"role": "assistant", "content": {_quoted(target)}}}')
    return _block("[", [f"{turn}," for turn in (*turns, f'{{"role": "user", "content": {asked}}}')], "]")


def _block(opening: str, lines: list[str], closing: str) -> str:
    return "\n    ".join([opening, *lines]) + f"\n{closing}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
