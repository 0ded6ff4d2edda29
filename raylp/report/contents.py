"""What a run directory holds, read once and typed. Every part may be missing: a run is reported at any point of it."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from raylp.errors import UserError
from raylp.names import kind_of
from raylp.rundir import RunDir

STAGE_NAMES = ("adapt", "search", "prune", "repair", "distill", "heal", "quantize", "evaluate", "bench")


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
    """`layers`: what this candidate takes out beyond what was gone before its round; `back`: what it puts back.

    `importance`: a loss or a criterion, the lowest goes first. `dropped_at`: the look of the race that dropped it, from
    0; `bound`: the most by which it may have beaten the leader there.
    """

    layers: tuple[int, ...]
    score: Stat | None
    sentences: int | None
    back: tuple[int, ...] = ()
    importance: float | None = None
    dropped_at: int | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Cost:
    """What was spent. Seconds are the workers' together, so more than wall time; None: not noted."""

    units: int | None = None
    sentences: int | None = None
    forced_sentences: int | None = None
    seconds: float | None = None
    gpu_seconds: float | None = None


@dataclass(frozen=True)
class Floor:
    """No candidate of a round was better than `noise`; `best`: what the best of them reached."""

    noise: float
    best: float | None
    decided_by: str


@dataclass(frozen=True)
class Joint:
    """Several layers tried at once: what they cost together, and the most they were allowed to."""

    layers: tuple[int, ...]
    loss: float
    allowed: float


@dataclass(frozen=True)
class Round:
    """`gone`: what was out before the round, in order. `removed`: what went in it. `before`: the score it began at.

    `start`: the number of layers at which the model was healed right before it, where it was.
    """

    number: int
    gone: tuple[int, ...]
    removed: tuple[int, ...]
    restored: tuple[int, ...]
    score: Stat | None
    before: Stat | None
    candidates: tuple[Candidate, ...]
    strategy: str = ""
    risk: float | None = None
    looks: int | None = None
    criterion: str = ""
    swap: bool = False
    start: int | None = None
    floor: Floor | None = None
    joint: tuple[Joint, ...] = ()
    cost: Cost = Cost()

    @property
    def by_importance(self) -> bool:
        """Whether another measure than the objective's score decided: a loss or a criterion, the lowest first."""
        if self.floor is not None and self.floor.decided_by == "likelihood":
            return True
        return bool(self.candidates) and all(candidate.score is None for candidate in self.candidates)

    def measured(self, candidate: Candidate) -> Stat | None:
        """By what the round was decided: the objective's score, or the measure that stood in for it."""
        if not self.by_importance:
            return candidate.score
        return None if candidate.importance is None else Stat(candidate.importance)

    @property
    def ranked(self) -> list[Candidate]:
        """Measured candidates, best first; those dropped on fewer sentences come after the others."""
        sign = 1.0 if self.by_importance else -1.0

        def place(candidate: Candidate) -> tuple[float, float, tuple[int, ...]]:
            stat = self.measured(candidate)
            seen = 0 if self.by_importance else -(candidate.sentences or 0)
            return seen, sign * stat.value if stat else 0.0, candidate.layers

        return sorted((c for c in self.candidates if self.measured(c) is not None), key=place)

    @property
    def taken(self) -> list[Candidate]:
        """What went: one candidate, or, where several layers went at once, the candidate of each."""
        exact = [c for c in self.candidates if set(c.layers) == set(self.removed) and set(c.back) == set(self.restored)]
        return exact or [c for c in self.candidates if c.layers and not c.back and set(c.layers) <= set(self.removed)]

    @property
    def winner(self) -> Candidate | None:
        """The candidate that was taken; None where several were."""
        return self.taken[0] if len(self.taken) == 1 else None

    @property
    def runner_up(self) -> Candidate | None:
        """The best of those that were not taken."""
        return next((c for c in self.ranked if c not in self.taken), None)

    @property
    def ahead(self) -> float | None:
        """How far the winner was ahead of the runner-up, where both were measured on the same number of sentences."""
        first, second = self.winner, self.runner_up
        if first is None or second is None or (not self.by_importance and first.sentences != second.sentences):
            return None
        ours, theirs = self.measured(first), self.measured(second)
        if ours is None or theirs is None:
            return None
        return theirs.value - ours.value if self.by_importance else ours.value - theirs.value

    @property
    def reached(self) -> Stat | None:
        """The objective's score after the round."""
        return self.score or (self.winner.score if self.winner else None)

    @property
    def change(self) -> Stat | None:
        """What the round did to the score, each as far as it was measured."""
        return Stat(self.reached.value - self.before.value) if self.reached and self.before else None

    @property
    def like_for_like(self) -> bool:
        """Whether the scores before and after are of the same number of sentences."""
        return self.reached is None or self.before is None or self.reached.n == self.before.n

    @property
    def generated(self) -> int | None:
        """Sentences translated in the round; where it was not noted, as many as its candidates were scored on."""
        if self.cost.sentences is not None:
            return self.cost.sentences
        counts = [c.sentences for c in self.candidates if c.score is not None and c.sentences is not None]
        return sum(counts) if counts else None

    def dropped_early(self, candidate: Candidate) -> bool:
        """Whether the race ended for it before it ended for the others."""
        if self.by_importance:
            return False
        most = max((c.sentences or 0 for c in self.candidates), default=0)
        return (candidate.sentences or most) < most


@dataclass(frozen=True)
class Plan:
    """`baseline`: the unpruned model's score on the search sentences, where the plan has it.

    `objective`: weights by metric. `depths`: (layers left, layers removed) of each model asked for, the largest first.
    `noise`: the score that translations of other sentences reach. `stopped`: why the search ended early.
    """

    model: str
    stack: str
    num_layers: int
    removed: tuple[int, ...]
    rounds: tuple[Round, ...]
    baseline: Stat | None
    backend: str
    dtype: str
    objective: dict[str, float] = field(default_factory=dict)
    strategy: str = ""
    risk: float | None = None
    depths: tuple[tuple[int, tuple[int, ...]], ...] = ()
    noise: float | None = None
    stopped: str = ""
    spent: Cost = Cost()

    @property
    def kept(self) -> list[int]:
        """Indices of the original model that stay, in their order."""
        return [index for index in range(self.num_layers) if index not in self.removed]

    @property
    def searched(self) -> bool:
        """Whether the layers were found by comparing candidates, and not given."""
        return bool(self.strategy) or any(round_.candidates for round_ in self.rounds)

    @property
    def sentences(self) -> int | None:
        """How many sentences the search has: what a candidate scored in full is scored on."""
        if self.baseline is not None and self.baseline.n:
            return self.baseline.n
        return max((c.sentences or 0 for round_ in self.rounds for c in round_.candidates), default=0) or None

    def everything(self, round_: Round) -> int | None:
        """Sentences that scoring every candidate of a round in full takes."""
        return None if self.sentences is None else len(round_.candidates) * self.sentences

    def score_without(self, removed: tuple[int, ...]) -> Stat | None:
        """The objective without exactly these layers, where a round ended there."""
        gone: set[int] = set()
        found = None
        for round_ in self.rounds:
            gone = (gone | set(round_.removed)) - set(round_.restored)
            found = round_.reached if gone == set(removed) else found
        return found


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
        return kind_of(self.name)

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
        """Loads that were measured, such as `c1`: clients, rates, batches; of each the lightest first."""
        found = dict.fromkeys(setting for model in self.models for setting in model.speed)
        return sorted(found, key=_weight)

    def timed(self, setting: str) -> bool:
        """Whether its requests were timed one by one, as those to the endpoint are."""
        return any("tpot_ms" in model.speed.get(setting, {}) for model in self.models)

    @property
    def objective(self) -> dict[str, float]:
        """What the search went by, as weights of metrics: the plan's word, else the recipe's, else chrF++."""
        search = mapping(self.recipe.get("search"))
        asked = read_objective(search.get("objective")) or read_objective(search.get("metric"))
        return (self.plan.objective if self.plan else {}) or asked or {"chrF2++": 1.0}

    @property
    def adapted_first(self) -> bool:
        """Whether the model was fine-tuned before pruning, so that `baseline` is the adapted one."""
        heal = self.recipe.get("heal")
        return isinstance(heal, dict) and heal.get("when") in ("before", "both")

    @property
    def in_turn(self) -> bool:
        """Whether the model was healed every few layers on the way down."""
        heal = self.recipe.get("heal")
        return isinstance(heal, dict) and heal.get("every") is not None


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
    recipe = mapping(yaml.safe_load(recipe_text)) if recipe_text else {}
    manifest, results, bench = (
        mapping(rundir.read_json(name)) if name in present else {}
        for name in ("manifest.json", "results.json", "bench.json")
    )
    plan = read_plan(rundir) if "plan.json" in present else None
    distill = mapping(rundir.read_json("distill/summary.json")) if rundir.exists("distill/summary.json") else {}
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
    content = mapping(rundir.read_json("plan.json"))
    if rundir.exists("search.json"):  # times stand apart: they are no part of what was decided
        took = mapping(rundir.read_json("search.json"))
        content["spent"] = {**mapping(content.get("spent") or {}), **mapping(took.get("spent") or {})}
        for entry, seconds in zip(content.get("rounds") or [], took.get("rounds") or [], strict=False):
            entry.update(seconds)
    baseline = read_stat(content.get("baseline"))
    rounds: list[Round] = []
    gone: tuple[int, ...] = ()
    score = baseline
    for entry in content.get("rounds") or []:
        if "start" in entry:
            score = read_stat(entry["start"]["score"])
        round_ = _read_round(entry, len(rounds) + 1, gone, score)
        if not round_.removed and not round_.restored and not round_.candidates:
            # A round in which nothing happens is how the unpruned model's own score is noted.
            baseline = score = baseline or round_.score
            continue
        rounds.append(round_)
        gone = tuple(index for index in (*gone, *round_.removed) if index not in round_.restored)
        score = round_.score
    return Plan(
        model=_name(content.get("model")),
        stack=str(content.get("stack", "")),
        num_layers=int(content["num_layers"]),
        removed=tuple(content.get("removed", gone)),
        rounds=tuple(rounds),
        baseline=baseline,
        backend=str(content.get("backend") or ""),
        dtype=str(content.get("dtype") or ""),
        objective=read_objective(content.get("objective")),
        strategy=str(content.get("strategy") or ""),
        risk=_finite(content.get("risk")),
        depths=tuple((int(d["layers"]), tuple(d["removed"])) for d in content.get("depths") or []),
        noise=_finite(content.get("noise")),
        stopped=str(content.get("stopped") or ""),
        spent=_read_cost(mapping(content.get("spent"))),
    )


def _read_round(entry: dict[str, Any], number: int, gone: tuple[int, ...], before: Stat | None) -> Round:
    listed = [tuple(found.get("removed") or ()) for found in entry.get("candidates") or []]
    swap = entry.get("move") == "swap"
    # Candidates of a beam or a swap need not hold all that is gone: they are told as whole sets, like the others.
    whole = swap or any(set(gone) <= set(each) for each in listed)
    floor = mapping(entry.get("floor"))
    noise = _finite(floor.get("noise"))
    return Round(
        number=number,
        gone=gone,
        removed=_beyond(gone, entry.get("removed")),
        restored=tuple(entry.get("restored") or ()),
        score=read_stat(entry.get("score")),
        before=before,
        candidates=tuple(
            Candidate(
                layers=tuple(index for index in each if index not in gone) if whole else each,
                score=read_stat(found.get("score")),
                sentences=found.get("sentences"),
                back=tuple(index for index in gone if index not in each) if whole else (),
                importance=_finite(found.get("importance")),
                dropped_at=found.get("dropped_at"),
                bound=_finite(found.get("bound")),
            )
            for each, found in zip(listed, entry.get("candidates") or [], strict=True)
        ),
        strategy=str(entry.get("strategy") or ""),
        risk=_finite(entry.get("risk")),
        looks=entry.get("looks"),
        criterion=str(entry.get("criterion") or ""),
        swap=swap,
        start=mapping(entry.get("start")).get("layers"),
        floor=None
        if noise is None
        else Floor(noise, _finite(floor.get("best")), str(floor.get("decided_by") or "the objective all the same")),
        joint=tuple(
            Joint(_beyond(gone, found.get("removed")), float(found["loss"]), float(found["allowed"]))
            for found in entry.get("joint") or []
        ),
        cost=_read_cost(entry),
    )


def _read_cost(entry: dict[str, Any]) -> Cost:
    counts = [_finite(entry.get(name)) for name in ("units", "sentences", "forced_sentences")]
    units, sentences, forced = (None if count is None else int(count) for count in counts)
    return Cost(
        units=units,
        sentences=sentences,
        forced_sentences=forced,
        seconds=_finite(entry.get("seconds")),
        gpu_seconds=_finite(entry.get("gpu_seconds")),
    )


def read_objective(value: Any) -> dict[str, float]:
    """Weights by metric, from a name, a list of names or a mapping; `chrF++` is filed as sacrebleu's `chrF2++`."""
    if isinstance(value, str):
        value = {value: 1.0}
    if isinstance(value, list):
        value = dict.fromkeys(map(str, value), 1.0)
    return {
        "chrF2++" if str(name).lower() in ("chrf++", "chrf2++") else str(name): weight
        for name, raw in mapping(value).items()
        if (weight := _finite(raw)) is not None
    }


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


def _weight(setting: str) -> tuple[int, float, str]:
    """Orders loads by kind, then size."""
    for kind, size_of in enumerate((concurrency, arrival_rate, batch_size)):
        if (size := size_of(setting)) is not None:
            return kind, size, setting
    return 3, 0, setting


def arrival_rate(setting: str) -> float | None:
    """`r2.5` is 2.5 requests a second."""
    number = setting[1:]
    return float(number) if setting[:1] == "r" and number.replace(".", "", 1).isdigit() else None


def batch_size(setting: str) -> int | None:
    """`vllm-b16` is 16 sentences at once."""
    backend, _, size = setting.rpartition("-b")
    return int(size) if backend and size.isdigit() else None


def engine(setting: str) -> str:
    """Which engine was asked: `vllm` of `vllm-b16`, `endpoint` of `c8`."""
    return setting.rpartition("-b")[0] if batch_size(setting) is not None else "endpoint"


def _beyond(gone: tuple[int, ...], removed: Any) -> tuple[int, ...]:
    """What `removed` adds to `gone`, whether it was noted with or without what was gone before."""
    listed = tuple(removed or ())
    return tuple(index for index in listed if index not in gone) if set(gone) <= set(listed) else listed


def _models(rundir: RunDir, results: dict[str, Any], bench: dict[str, Any], plan: Plan | None) -> list[Model]:
    """Models of the results, then those that were only measured for speed, then checkpoints nobody looked at yet."""
    measured = mapping(bench.get("models"))
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
        name: mapping(rundir.read_json(f"models/{name}/raylp.json"))
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
        test_set: {metric: stat for metric, raw in mapping(scores).items() if (stat := read_stat(raw)) is not None}
        for test_set, scores in mapping(value).items()
    }
    return {test_set: scores for test_set, scores in found.items() if scores}


def _speed(value: Any) -> dict[str, dict[str, dict[str, Stat]]]:
    speed: dict[str, dict[str, dict[str, Stat]]] = {}
    for setting, measures in mapping(value).items():
        for measure, raw in mapping(measures).items():
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


def mapping(value: Any) -> dict[str, Any]:
    """`value` where it is one, else nothing: what a file of another version holds is not known."""
    return value if isinstance(value, dict) else {}


def _name(value: Any) -> str:
    """A model as a name, or as a section with one."""
    return str(value.get("name") or "") if isinstance(value, dict) else str(value or "")


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
