"""The model card: what was removed, learned from what, measured how, and how to use it, from the run's own records."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from raylp.data.languages import language_name, pair_of, split_pair
from raylp.data.prompt import Prompt
from raylp.models.checkpoint import quantised_facts, read_card
from raylp.models.files import may_think
from raylp.models.load import max_positions, read_generation_config
from raylp.models.source import PACKAGE_PREFIX, find_fetched, licence
from raylp.names import kind_of, whole_of
from raylp.quantize.schemes import SCHEMES, Scheme
from raylp.report import numbers
from raylp.report.contents import Contents, Model, mapping, read_contents
from raylp.report.facts import measured_how
from raylp.report.search_words import (
    floor_sentences,
    healed_sentences,
    objective_digits,
    objective_label,
    strategy_sentence,
)
from raylp.rundir import RunDir

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REPAIRS = {
    "compensate": "Mended without training: later layers scaled to the smaller stream (Prune&Comp).",
    "merge": "Mended without training: the removed layers' differences added to a neighbour (LaCo).",
    "concatenate": "Mended without training: the removed layers' most important channels put into a neighbour (CoMe).",
}
ROOM = 4096
TRAINED = ("healed", "baseline-healed", "adapted")
# The models beside which the exported one is shown.
BESIDE = ("original", "baseline", "baseline-healed")


@dataclass(frozen=True)
class Ancestor:
    """A model that another was cut from. `removed`: layers it lacks itself, in the numbers of its own base."""

    name: str
    removed: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """Of one model of a run. `line`: what it was cut from, and that from, to the first model, which is no raylp's.

    `path`: of the checkpoint; `card`: its raylp.json; `pairs`: language pairs it was made for.
    """

    name: str
    path: Path
    line: tuple[Ancestor, ...]
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
    def removed(self) -> list[int]:
        """Layers that it lacks, in order, in the numbers of `cut_from`."""
        return [int(layer) for layer in self.card.get("removed") or []]

    @property
    def base(self) -> str:
        """The first model: a hub id, a package, or a directory."""
        return self.line[-1].name

    @property
    def revision(self) -> str | None:
        """Of the base, where the recipe names both."""
        model = mapping(self.contents.recipe.get("model"))
        return model.get("revision") if model.get("name") == self.base else None

    @property
    def cut_from(self) -> str:
        """The model that `removed` counts the layers of, fit for others to read."""
        return shareable(self.line[0].name if any(model.removed for model in self.line) else self.base)

    @property
    def adapted(self) -> bool:
        """Whether what was cut had been trained before."""
        return self.contents.adapted_first or any(_kind(Path(model.name).name) in TRAINED for model in self.line)

    @property
    def room(self) -> int:
        """Tokens of a prompt and its answer that the example with vLLM sets memory aside for."""
        known = max_positions(self.path) if (self.path / "config.json").exists() else None
        return min(ROOM, known or ROOM)

    @property
    def is_penalised(self) -> bool:
        """Whether the checkpoint asks for a repetition penalty, which it was not measured with."""
        there = (self.path / "generation_config.json").exists()
        return there and getattr(read_generation_config(self.path), "repetition_penalty", None) not in (None, 1.0)

    @property
    def may_think(self) -> bool:
        """Whether the model must be told not to think before it answers, as it was measured."""
        return may_think(self.path)

    @property
    def licence(self) -> str:
        """Of the first model, as far as the run or the model's directory or entry in the hub's cache states it."""
        if found := (self.contents.manifest.get("model") or {}).get("licence"):
            return str(found)
        here = find_fetched(self.base, self.revision)
        return (licence(here) if here else None) or ""


def facts_of(rundir: RunDir, name: str) -> ModelFacts:
    """What the run knows of its model `name`.

    Raises:
        UserError: the run or the model's card cannot be read.
    """
    contents = read_contents(rundir)
    path = rundir.local(f"models/{name}")
    card = read_card(path) or {}
    data = contents.recipe.get("data") or {}
    pairs = dict.fromkeys(pair_of(name, (corpus or {}).get("pair")) for name, corpus in data.items())
    return ModelFacts(name, path, line_of(str(card.get("base_model") or "")), card, contents, tuple(pairs))


def line_of(name: str) -> tuple[Ancestor, ...]:
    """The model called `name` and what it was made from in turn, as long as raylp's checkpoints are there to say so."""
    line: list[Ancestor] = []
    while name not in [model.name for model in line]:
        card = read_card(Path(name)) if Path(name).is_dir() else None
        line.append(Ancestor(name, tuple((card or {}).get("removed") or ())))
        name = str((card or {}).get("base_model") or name)
    return tuple(line)


def is_directory(name: str) -> bool:
    """Whether a model is named by its directory, and neither by a hub id nor by a package."""
    if name.startswith(PACKAGE_PREFIX):
        return False
    return not _HUB_ID.fullmatch(name) or name.startswith(".") or Path(name).exists()


def shareable(name: str) -> str:
    """A model's name fit for others to read: of a directory of this machine, its last part."""
    return Path(name).name if is_directory(name) else name


def choice_sentences(facts: ModelFacts) -> list[str]:
    """How the layers were chosen, as far as the plan says."""
    plan = facts.contents.plan
    if plan is None or not facts.removed:
        return []
    if not plan.searched:
        return ["They were given, not searched for."]
    objective = objective_label(facts.contents.objective)
    digits = objective_digits(facts.contents.objective, plan)
    sentences = f" on {plan.sentences} sentences" if plan.sentences else ""
    said = [f"Searched round by round by {objective}{sentences}." if plan.strategy != "oneshot" else ""]
    said += [strategy_sentence(plan), *floor_sentences(plan, digits), *healed_sentences(plan, objective, digits)]
    return [sentence for sentence in said if sentence]


def training_sentences(facts: ModelFacts) -> list[str]:
    """What was done to the weights that were left."""
    repaired = (facts.card.get("repair") or {}).get("method")
    said = [REPAIRS[repaired]] if repaired in REPAIRS else []
    heal = facts.contents.recipe.get("heal") or {}
    kind = _kind(facts.name)
    if not heal or kind not in TRAINED:
        return said
    distill = facts.contents.recipe.get("distill")
    data = heal.get("data", "both") if kind != "adapted" and distill is not None else "authentic"
    distill = distill or {}
    teacher = "the unpruned model" if distill.get("teacher", "base") == "base" else shareable(distill["teacher"])
    words = {"authentic": "parallel text", "teacher": f"translations of {teacher}"}
    on = words.get(data) or f"{words['authentic']} and {words['teacher']}"
    epochs = heal.get("epochs", 1)
    most = "at most " if heal.get("patience") else ""
    how = f"{heal.get('method', 'lora')}, {most}{epochs} {'epoch' if epochs == 1 else 'epochs'}"
    if heal.get("every") is not None and kind != "adapted":
        return [*said, f"Trained on {on} after every {heal['every']} layers ({how} each time)."]
    return [*said, f"Trained on {on} ({how})."]


def _kind(name: str) -> str:
    return kind_of(whole_of(name))


def scheme_of(facts: ModelFacts) -> Scheme | None:
    """How the weights are quantised, if they are."""
    return SCHEMES.get(quantised_facts(facts.card).get("scheme", ""))


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
    beside = [name for name in dict.fromkeys((*BESIDE, whole_of(facts.name))) if name != facts.name]
    shown = [*(contents.model(name) for name in beside), facts.model]
    pair, scheme = facts.pairs[0], scheme_of(facts)
    known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", facts.licence)
    return environment.get_template("card.md.jinja").render(
        facts=facts,
        numbers=numbers,
        num_layers=contents.plan.num_layers if contents.plan else None,
        chosen=choice_sentences(facts),
        trained=training_sentences(facts),
        scheme=scheme,
        quantised=quantised_facts(facts.card),
        engine=scheme.engine if scheme else None,
        online=quantised_facts(facts.card)["scheme"] if scheme and scheme.maker == "vllm" else None,
        hub_id=facts.base if _HUB_ID.fullmatch(facts.base) and not is_directory(facts.base) else None,
        ancestors=[(shareable(model.name), list(model.removed)) for model in facts.line],
        licence_id=facts.licence if known else "other",
        licence_name=None if known else facts.licence or None,
        languages=sorted({code.partition("_")[0] for pair in facts.pairs for code in split_pair(pair)}),
        names=[" to ".join(map(language_name, split_pair(pair))) for pair in facts.pairs],
        models=[model for model in shown if model is not None],
        places=[(t, m) for t in contents.test_sets for m in contents.metrics if facts.model.score(t, m)],
        settings=[setting for setting in contents.settings if setting in facts.model.speed],
        differences=[c for c in contents.comparisons if facts.name in (c.a, c.b) and {c.a, c.b} & set(beside)],
        data=contents.manifest.get("data") or {},
        versions=contents.manifest.get("versions") or {},
        machine=contents.bench.get("machine") or contents.manifest.get("machine") or {},
        measured=measured_how(contents),
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
