"""What a run directory holds, read once and typed. Every part may be missing: a run is reported at any point of it."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from raylp.errors import UserError
from raylp.rundir import RunDir

STAGE_NAMES = ("adapt", "search", "prune", "distill", "heal", "evaluate", "bench")


@dataclass(frozen=True)
class Stat:
    """`S` of the contract: a value with its 95% interval, which may not have been taken."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    signature: str = ""

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the whole interval lies on one side of zero; None without an interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Candidate:
    """`layers`: what this candidate takes out beyond what was gone before its round."""

    layers: tuple[int, ...]
    score: Stat | None
    sentences: int | None


@dataclass(frozen=True)
class Round:
    """`gone`: what was out before the round, in order. `removed`: what went in it. `before`: the score it began at."""

    number: int
    gone: tuple[int, ...]
    removed: tuple[int, ...]
    restored: tuple[int, ...]
    score: Stat | None
    before: Stat | None
    candidates: tuple[Candidate, ...]

    @property
    def ranked(self) -> list[Candidate]:
        """Scored candidates, best first; those dropped early, on fewer sentences, come after the others."""
        scored = [c for c in self.candidates if c.score is not None]
        return sorted(scored, key=lambda c: (self.dropped_early(c), -c.score.value if c.score else 0.0, c.layers))

    @property
    def winner(self) -> Candidate | None:
        """The candidate that was taken."""
        return next((c for c in self.candidates if set(c.layers) == set(self.removed)), None)

    @property
    def runner_up(self) -> Candidate | None:
        """The best of those that were not taken."""
        return next((c for c in self.ranked if set(c.layers) != set(self.removed)), None)

    def dropped_early(self, candidate: Candidate) -> bool:
        """Whether the race ended for it before all sentences were scored."""
        most = max((c.sentences or 0 for c in self.candidates), default=0)
        return (candidate.sentences or most) < most


@dataclass(frozen=True)
class Plan:
    """`baseline`: the unpruned model's score on the search sentences, where the plan has it."""

    model: str
    stack: str
    num_layers: int
    removed: tuple[int, ...]
    rounds: tuple[Round, ...]
    baseline: Stat | None
    backend: str
    dtype: str

    @property
    def kept(self) -> list[int]:
        """Indices of the original model that stay, in their order."""
        return [index for index in range(self.num_layers) if index not in self.removed]

    @property
    def searched(self) -> bool:
        """Whether the layers were found by scoring candidates, and not given."""
        return any(round_.candidates for round_ in self.rounds)


@dataclass(frozen=True)
class Model:
    """`speed`: setting -> measure -> percentile (or `value`) -> Stat."""

    name: str
    layers: int | None = None
    params: int | None = None
    bytes: int | None = None
    scores: dict[str, dict[str, Stat]] = field(default_factory=dict)
    speed: dict[str, dict[str, dict[str, Stat]]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`pruned-15` is `pruned`, `baseline-healed` is itself."""
        stem, _, tail = self.name.rpartition("-")
        return stem if stem and tail.isdigit() else self.name

    def score(self, test_set: str, metric: str) -> Stat | None:
        return self.scores.get(test_set, {}).get(metric)

    def measure(self, setting: str, name: str, percentile: str = "p50") -> Stat | None:
        """A latency at a percentile; `output_tokens_per_s` has none."""
        found = self.speed.get(setting, {}).get(name, {})
        return found.get(percentile, found.get("value"))


@dataclass(frozen=True)
class Comparison:
    """`difference`: the score of `a` less that of `b`, on the same sentences."""

    a: str
    b: str
    test_set: str
    metric: str
    difference: Stat


@dataclass(frozen=True)
class HealLog:
    """`steps`: one mapping a logged step. `dev`: (step, epoch, loss)."""

    name: str
    steps: list[dict[str, float]]
    dev: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Translation:
    """One sentence of a test set and what each model made of it."""

    id: str
    source: str
    reference: str
    pair: str
    hypotheses: dict[str, str]


@dataclass(frozen=True)
class Contents:
    """All of a run directory that a report shows."""

    name: str
    url: str
    recipe: dict[str, Any]
    recipe_text: str
    manifest: dict[str, Any]
    plan: Plan | None
    models: list[Model]
    comparisons: list[Comparison]
    bench: dict[str, Any]
    distill: dict[str, Any]
    heal: list[HealLog]
    translations: dict[str, list[Translation]]

    def model(self, name: str) -> Model | None:
        return next((model for model in self.models if model.name == name), None)

    @property
    def test_sets(self) -> list[str]:
        """In the order of the results."""
        return list(dict.fromkeys(name for model in self.models for name in model.scores))

    @property
    def metrics(self) -> list[str]:
        """In the order of the results."""
        return list(dict.fromkeys(m for model in self.models for scores in model.scores.values() for m in scores))

    @property
    def settings(self) -> list[str]:
        """Loads that were measured, such as `c1`, the lightest first."""
        found = dict.fromkeys(setting for model in self.models for setting in model.speed)
        return sorted(found, key=lambda setting: (concurrency(setting) or 0, setting))

    @property
    def adapted_first(self) -> bool:
        """Whether the model was fine-tuned before pruning, so that `baseline` is the adapted one."""
        heal = self.recipe.get("heal")
        return isinstance(heal, dict) and heal.get("when") in ("before", "both")


def read_contents(rundir: RunDir) -> Contents:
    """Reads what is there.

    Raises:
        UserError: nothing of a run is there, or a file cannot be understood.
    """
    known = ("recipe.yaml", "manifest.json", "plan.json", "results.json", "bench.json")
    present = {name for name in known if rundir.exists(name)}
    if not present:
        raise UserError(
            f"{rundir.url} is not a run directory: none of {', '.join(known)} is there; give the run_dir of a recipe"
        )
    recipe_text = rundir.read_text("recipe.yaml") if "recipe.yaml" in present else ""
    recipe = _mapping(yaml.safe_load(recipe_text)) if recipe_text else {}
    manifest, results, bench = (
        _mapping(rundir.read_json(name)) if name in present else {}
        for name in ("manifest.json", "results.json", "bench.json")
    )
    plan = read_plan(rundir) if "plan.json" in present else None
    distill = _mapping(rundir.read_json("distill/summary.json")) if rundir.exists("distill/summary.json") else {}
    models = _models(rundir, results, bench, plan)
    return Contents(
        name=rundir.url.rsplit("/", 1)[-1],
        url=rundir.url,
        recipe=recipe,
        recipe_text=recipe_text,
        manifest=manifest,
        plan=plan,
        models=models,
        comparisons=_comparisons(results),
        bench=bench,
        distill=distill,
        heal=_heal_logs(rundir),
        translations=_translations(rundir, [model.name for model in models]),
    )


def read_plan(rundir: RunDir) -> Plan:
    """`plan.json`, with what was gone before each round worked out."""
    content = _mapping(rundir.read_json("plan.json"))
    baseline = read_stat(content.get("baseline"))
    rounds: list[Round] = []
    gone: tuple[int, ...] = ()
    score = baseline
    for entry in content.get("rounds") or []:
        removed, restored = _beyond(gone, entry.get("removed")), tuple(entry.get("restored") or ())
        candidates = tuple(
            Candidate(_beyond(gone, found.get("removed")), read_stat(found.get("score")), found.get("sentences"))
            for found in entry.get("candidates") or []
        )
        after = read_stat(entry.get("score"))
        if not removed and not restored and not candidates:
            # A round in which nothing happens is how the unpruned model's own score is noted.
            baseline = score = baseline or after
            continue
        rounds.append(Round(len(rounds) + 1, gone, removed, restored, after, score, candidates))
        gone = tuple(index for index in (*gone, *removed) if index not in restored)
        score = after
    return Plan(
        model=_name(content.get("model")),
        stack=str(content.get("stack", "")),
        num_layers=int(content["num_layers"]),
        removed=tuple(content.get("removed", gone)),
        rounds=tuple(rounds),
        baseline=baseline,
        backend=str(content.get("backend") or ""),
        dtype=str(content.get("dtype") or ""),
    )


def read_stat(value: Any) -> Stat | None:
    """An `S`, or a bare number; None where there is no finite value."""
    if isinstance(value, dict):
        number = _finite(value.get("value"))
        if number is None:
            return None
        low, high = _finite(value.get("low")), _finite(value.get("high"))
        count = value.get("n")
        return Stat(number, low, high, int(count) if count is not None else None, str(value.get("signature") or ""))
    number = _finite(value)
    return None if number is None else Stat(number)


def concurrency(setting: str) -> int | None:
    """`c8` is 8 requests at a time."""
    return int(setting[1:]) if setting[:1] == "c" and setting[1:].isdigit() else None


def _beyond(gone: tuple[int, ...], removed: Any) -> tuple[int, ...]:
    """What `removed` adds to `gone`, whether it was noted with or without what was gone before."""
    listed = tuple(removed or ())
    return tuple(index for index in listed if index not in gone) if set(gone) <= set(listed) else listed


def _models(rundir: RunDir, results: dict[str, Any], bench: dict[str, Any], plan: Plan | None) -> list[Model]:
    """Models of the results, then those that were only measured for speed, then checkpoints nobody looked at yet."""
    measured = _mapping(bench.get("models"))
    models = {
        entry["name"]: Model(
            name=entry["name"],
            layers=entry.get("layers"),
            params=entry.get("params"),
            bytes=entry.get("bytes"),
            scores=_scores(entry.get("scores")),
            speed=_speed(entry.get("speed") or measured.get(entry["name"])),
        )
        for entry in results.get("models") or []
    }
    cards = {
        name: _mapping(rundir.read_json(f"models/{name}/raylp.json"))
        for name in rundir.names("models")
        if rundir.exists(f"models/{name}/raylp.json")
    }
    for name in (*measured, *cards):
        if name not in models and name != "adapted":
            layers = plan.num_layers if plan else None
            if layers is not None and name in cards:
                layers -= len(cards[name].get("removed") or [])
            models[name] = Model(name, layers=layers, speed=_speed(measured.get(name)))
    return list(models.values())


def _scores(value: Any) -> dict[str, dict[str, Stat]]:
    found = {
        test_set: {metric: stat for metric, raw in _mapping(scores).items() if (stat := read_stat(raw)) is not None}
        for test_set, scores in _mapping(value).items()
    }
    return {test_set: scores for test_set, scores in found.items() if scores}


def _speed(value: Any) -> dict[str, dict[str, dict[str, Stat]]]:
    speed: dict[str, dict[str, dict[str, Stat]]] = {}
    for setting, measures in _mapping(value).items():
        for measure, raw in _mapping(measures).items():
            # A throughput is one S; a latency is a mapping of percentiles to S.
            raw = {"value": raw} if not isinstance(raw, dict) or "value" in raw else raw
            stats = {name: stat for name, item in raw.items() if (stat := read_stat(item)) is not None}
            if stats:
                speed.setdefault(setting, {})[measure] = stats
    return speed


def _comparisons(results: dict[str, Any]) -> list[Comparison]:
    return [
        Comparison(entry["a"], entry["b"], entry["test_set"], entry["metric"], difference)
        for entry in results.get("comparisons") or []
        if (difference := read_stat(entry.get("difference"))) is not None
    ]


def _heal_logs(rundir: RunDir) -> list[HealLog]:
    logs = []
    for file in rundir.names("heal"):
        if not file.endswith(".jsonl"):
            continue
        steps: list[dict[str, float]] = []
        dev: list[tuple[float, float, float]] = []
        for row in _rows(rundir, f"heal/{file}"):
            if "loss" in row:
                steps.append({"step": len(steps) + 1, **row})
            # The end of an epoch is noted on its last step's line or on a line of its own.
            if row.get("dev_loss") is not None:
                step = row.get("step", steps[-1]["step"] if steps else 0)
                dev.append((step, row.get("epoch", len(dev) + 1), row["dev_loss"]))
        if steps or dev:
            logs.append(HealLog(file.removesuffix(".jsonl"), steps, dev))
    return logs


def _translations(rundir: RunDir, order: list[str]) -> dict[str, list[Translation]]:
    """By test set; sentences in the order of the first model that has them, models in that of the results."""
    found: dict[str, dict[str, Translation]] = {}
    there = rundir.names("translations")
    for model in [*(name for name in order if name in there), *(name for name in there if name not in order)]:
        for file in rundir.names(f"translations/{model}"):
            if not file.endswith(".jsonl"):
                continue
            sentences = found.setdefault(file.removesuffix(".jsonl"), {})
            for row in _rows(rundir, f"translations/{model}/{file}"):
                key = str(row.get("id", ""))
                if key not in sentences:
                    source, reference, pair = (str(row.get(name, "")) for name in ("source", "target", "pair"))
                    sentences[key] = Translation(key, source, reference, pair, {})
                sentences[key].hypotheses[model] = str(row.get("hypothesis", ""))
    return {test_set: list(sentences.values()) for test_set, sentences in found.items() if sentences}


def _rows(rundir: RunDir, name: str) -> Iterator[dict[str, Any]]:
    lines = rundir.read_text(name).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return  # a log that is being written, or whose writer was killed, ends in half a line
            raise UserError(
                f"{rundir.uri(name)}, line {number}: not JSON; move the file away and run again", 1
            ) from error
        if isinstance(row, dict):
            yield row


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(value: Any) -> str:
    """A model as a name, or as a section with one."""
    return str(value.get("name") or "") if isinstance(value, dict) else str(value or "")


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
