"""What a run shows, worked out from what it holds: which models to set against each other, what was kept and gained."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from raylp.bench.config import ENOUGH_REPEATS
from raylp.report import numbers
from raylp.report.contents import Contents, Model, Stat, batch_size, engine, mapping, read_stat

NOISY = "too noisy to tell"


@dataclass(frozen=True)
class Kept:
    """The share of `reference`'s score that `model` keeps. The interval is that of the paired difference."""

    model: str
    reference: str
    test_set: str
    metric: str
    share: Stat


@dataclass(frozen=True)
class Gain:
    """How many times as fast as `reference` a model is: above 1 is faster, for latencies as for throughput.

    `doubt`: why that need not be so, in words.
    """

    model: str
    reference: str
    setting: str
    measure: str
    ratio: Stat
    was: Stat
    now: Stat
    doubt: str = ""


@dataclass(frozen=True)
class Compared:
    """What the benchmark concludes of a model under a load, by `metric`. `doubt`: why it is nothing, in words."""

    model: str
    over: str
    setting: str
    metric: str
    ratio: Stat
    doubt: str

    @property
    def said(self) -> str:
        return self.doubt or ("faster" if self.ratio.value > 1 else "slower")


@dataclass(frozen=True)
class Missing:
    """A part of the run the report has nothing on; `wanted`: whether the recipe asks for it."""

    part: str
    wanted: bool
    verb: str


@dataclass(frozen=True)
class Facts:
    """`cut` and `cut_reference`: the pruned model the page speaks of, and the one it is fairly set against."""

    cut: Model | None
    cut_reference: Model | None
    fair: bool
    kept: list[Kept]
    gains: list[Gain]
    missing: list[Missing]
    headline: str


# What a benchmark may conclude by, with the unit that follows a figure.
METRICS = {
    "tpot_ms": ("time per output token", "ms per token"),
    "ttft_ms": ("time to first token", "ms to the first token"),
    "e2e_ms": ("time of a whole request", "ms a request"),
    "output_tokens_per_s": ("output tokens per second", "tokens/s"),
    "itl_ms": ("time between tokens", "ms between tokens"),
    "requests_per_s": ("requests per second", "requests/s"),
}


def find_facts(contents: Contents) -> Facts:
    cut = pruned_model(contents)
    healed = cut is not None and cut.kind.startswith("healed")
    reference = contents.model("baseline-healed") if healed else None
    fair = not healed or reference is not None or contents.adapted_first
    reference = reference or contents.model("baseline")
    kept = find_kept(contents, cut, reference) if cut and reference else []
    gains = find_gains(contents)
    return Facts(
        cut=cut,
        cut_reference=reference,
        fair=fair,
        kept=kept,
        gains=gains,
        missing=find_missing(contents),
        headline=write_headline(contents, cut, reference, kept, gains),
    )


def pruned_model(contents: Contents) -> Model | None:
    """The run's result: the healed model with the fewest layers, else the pruned one; scored models come first."""
    found = [model for model in contents.models if model.kind in ("healed", "pruned")]
    order = lambda model: (not model.scores, model.kind != "healed", model.layers or 0)  # noqa: E731
    return min(found, key=order, default=None)


def find_kept(contents: Contents, model: Model, reference: Model) -> list[Kept]:
    """One for each test set and metric that both have."""
    kept = []
    for test_set in contents.test_sets:
        for metric in contents.metrics:
            ours, theirs = model.score(test_set, metric), reference.score(test_set, metric)
            if ours is None or theirs is None or theirs.value <= 0:
                continue
            gap = paired_difference(contents, model.name, reference.name, test_set, metric)
            ends: tuple[float | None, float | None] = (None, None)
            if gap is not None and gap.low is not None and gap.high is not None:
                ends = (1 + gap.low / theirs.value, 1 + gap.high / theirs.value)
            share = Stat(ours.value / theirs.value, *ends, n=ours.n)
            kept.append(Kept(model.name, reference.name, test_set, metric, share))
    return kept


def paired_difference(contents: Contents, a: str, b: str, test_set: str, metric: str) -> Stat | None:
    """The score of `a` less that of `b`, whichever way round the results have it."""
    for found in contents.comparisons:
        if (found.test_set, found.metric) == (test_set, metric):
            if (found.a, found.b) == (a, b):
                return found.difference
            if (found.a, found.b) == (b, a):
                gap = found.difference
                low, high = (None if end is None else -end for end in (gap.high, gap.low))
                return Stat(-gap.value, low, high, gap.n, gap.signature)
    return None


def find_gains(contents: Contents) -> list[Gain]:
    """Every measured model against the unpruned one, at every load; healing does not change its speed."""
    unpruned = (contents.model(name) for name in ("baseline", "baseline-healed", "original"))
    reference = next((model for model in unpruned if model is not None and model.speed), None)
    if reference is None:
        return []
    gains = []
    for setting in contents.settings:
        for measure in METRICS:
            was = reference.measure(setting, measure)
            for model in contents.models:
                now = model.measure(setting, measure)
                if model.name == reference.name or was is None or now is None or min(was.value, now.value) <= 0:
                    continue
                found = compare(contents, model.name, setting)
                if found and (found.over, found.metric) == (reference.name, measure):
                    ratio, doubt = found.ratio, found.doubt
                else:
                    ratio = _ratio(now, was) if measure.endswith("_per_s") else _ratio(was, now)
                    doubt = NOISY if _holds_one(ratio) else ""
                gains.append(Gain(model.name, reference.name, setting, measure, ratio, was, now, doubt))
    return gains


def compared(contents: Contents) -> list[Compared]:
    """What the benchmark concludes, by the one metric it was told to conclude by, in the order of its loads."""
    models = mapping(contents.bench.get("ratios"))
    found = (compare(contents, model, setting) for setting in contents.settings for model in models)
    return [each for each in found if each is not None]


def compare(contents: Contents, model: str, setting: str) -> Compared | None:
    """What the benchmark concludes of a model under a load, from repeats measured side by side."""
    entry = mapping(_dig(contents.bench, "ratios", model, setting))
    ratio = read_stat(entry)
    if ratio is None:
        return None
    metric = str(entry.get("metric") or contents.bench.get("metric"))
    few = "too few repeats to tell" if (ratio.n or 0) < ENOUGH_REPEATS else ""
    doubt = NOISY if _holds_one(ratio) else few
    return Compared(model, str(entry.get("over")), setting, metric, ratio, doubt)


def _holds_one(ratio: Stat) -> bool:
    return ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, quality) points no other one is as good as in both and better in one; cheapest first."""

    def beaten(cost: float, quality: float) -> bool:
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: points[i])


def _ratio(above: Stat, below: Stat) -> Stat:
    """The ratio of two separate measurements; distances to their ends are added as squares, as logarithms (a median of
    few requests may lie a thousand times below its upper end). No interval where an end is not above 0.
    """
    value = above.value / below.value
    if above.low is None or above.high is None or below.low is None or below.high is None:
        return Stat(value)
    if min(above.low, below.low) <= 0:
        return Stat(value)
    up = math.hypot(math.log(above.high / above.value), math.log(below.value / below.low))
    down = math.hypot(math.log(above.value / above.low), math.log(below.high / below.value))
    return Stat(value, value * math.exp(-down), value * math.exp(up), above.n)


def ideal(contents: Contents, gain: Gain) -> float | None:
    """The most that fewer bytes (decoding reads every weight) or operations (reading the prompt) can give; of a whole
    request, which is both, the larger.
    """
    bounds = {"tpot_ms": ["by_bytes"], "itl_ms": ["by_bytes"], "ttft_ms": ["prompt_by_operations"]}
    ours, theirs = (
        mapping(_dig(contents.bench, "ideal", name, "speedup", gain.setting)) for name in (gain.model, gain.reference)
    )
    # bench.json holds them over the first model it measured, which need not be the reference.
    return max(
        (
            ours[bound] / theirs[bound]
            for bound in bounds.get(gain.measure, ["by_bytes", "request_by_operations"])
            if ours.get(bound) and theirs.get(bound)
        ),
        default=None,
    )


def _range(values: Sequence[Any]) -> str:
    """`8`, or `8 to 16`, of sorted numbers."""
    return " to ".join(dict.fromkeys(map(numbers.anything, (values[0], values[-1]))))


def measured_how(contents: Contents) -> str:
    """How the speed figures came about, in a sentence or two."""
    bench = contents.bench
    tokens, repeats = (bench.get(key) for key in ("output_tokens", "repeats"))
    where, at_endpoint = [], [name for name in contents.settings if batch_size(name) is None]
    if at_endpoint:
        sent = sorted({sent[name] for name in at_endpoint if name in (sent := mapping(bench.get("sent")))})
        where.append(f"at the endpoint{f' with {_range(sent)} requests' if sent else ''}")
    if any(batch_size(name) is not None for name in contents.settings):
        where.append("in batches given to an engine itself")
    said = "Measured " + " and ".join(where)
    if repeats:
        said += f", {numbers.anything(repeats)} times over"
    said += ", the models in turn"
    if not bench:
        return said + "."
    if prompts := sorted(set(mapping(bench.get("distinct_prompts")).values())):
        said += f", with {_range(prompts)} different prompts"
    if tokens:
        return said + f"; every answer has {numbers.anything(tokens)} tokens, the same for every model."
    return said + "; an answer has as many tokens as the model gives it, so models that say less are done sooner."


@dataclass(frozen=True)
class Taken:
    """What a model took in an engine: bytes of memory and of a GPU, seconds to start, joules for 1,000 tokens."""

    model: str
    engine: str
    memory: float | None
    gpu: float | None
    ready: float | None
    energy: str


def taken(contents: Contents) -> list[Taken]:
    """As far as the benchmark could note it."""
    found = []
    for model in contents.models:
        noted = [mapping(_dig(contents.bench, key, model.name)) for key in ("memory_bytes", "gpu_bytes", "ready_s")]
        energy = mapping(_dig(contents.bench, "energy", model.name))
        for asked in dict.fromkeys(name for own in noted for name in own):
            own = {
                setting: stat.value
                for setting, value in energy.items()
                if engine(setting) == asked and (stat := read_stat(value)) is not None
            }
            joules = "; ".join(f"{numbers.setting(s)}: {numbers.significant(value)}" for s, value in own.items())
            memory, gpu, ready = (value if isinstance(value := of.get(asked), (int, float)) else None for of in noted)
            found.append(Taken(model.name, asked, memory, gpu, ready, joules or numbers.NONE))
    return found


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def find_missing(contents: Contents) -> list[Missing]:
    there = {
        "the search for layers": (contents.plan is not None, "search"),
        "translations by a teacher": (bool(contents.distill), "distill"),
        "healing": (bool(contents.heal) or any("healed" in model.name for model in contents.models), "heal"),
        "translation quality": (bool(contents.test_sets), "evaluate"),
        "speed": (bool(contents.settings), "bench"),
    }
    return [
        Missing(part, not contents.recipe or contents.recipe.get(verb) is not None, verb)
        for part, (present, verb) in there.items()
        if not present
    ]


def write_headline(
    contents: Contents, cut: Model | None, reference: Model | None, kept: list[Kept], gains: list[Gain]
) -> str:
    """The run in one sentence, or two where something was not measured."""
    plan = contents.plan
    if plan is None:
        return "No layers have been removed yet."
    if not plan.removed:
        return f"All {plan.num_layers} layers were kept."
    which = f" ({numbers.layers(plan.removed)})" if len(plan.removed) <= 6 else ""
    opening = f"{len(plan.removed)} of {plan.num_layers} layers removed{which}"
    if cut is None or reference is None:
        return f"{opening}. Neither quality nor speed has been measured yet."
    quality = _quality_words(contents, cut, reference, kept)
    gain = main_gain(contents, gains, cut.name)
    speed = _speed_words(gain, bool(kept)) if gain else ""
    if quality and speed:
        return f"{opening}; {quality} and {speed}."
    if quality:
        return f"{opening}; {quality}."
    if speed:
        return f"{opening}; {_subject(contents, cut)} {speed}. Its translations have not been scored yet."
    return f"{opening}. Neither quality nor speed has been measured yet."


def main_metric(contents: Contents) -> str | None:
    """What the search went by, if the models were scored by it too; of a mix, the first that they were scored by."""
    known = [metric for metric in contents.objective if metric in contents.metrics]
    return next(iter([*known, *contents.metrics]), None)


def main_kept(contents: Contents, kept: Iterable[Kept]) -> list[Kept]:
    """One for each test set, by the main metric."""
    metric = main_metric(contents)
    return [found for found in kept if found.metric == metric]


def main_gain(contents: Contents, gains: Iterable[Gain], model: str) -> Gain | None:
    """At the lightest load, by what the benchmark was told to conclude by; where nothing is said, by decoding."""
    own = [gain for gain in gains if gain.model == model]

    def is_concluded_by(gain: Gain) -> bool:
        found = compare(contents, model, gain.setting)
        return gain.measure == (found.metric if found else contents.bench.get("metric") or "tpot_ms")

    return next(filter(is_concluded_by, own), None) or next(iter(own), None)


def friendly_metric(metric: str) -> str:
    """sacrebleu writes chrF++ with its beta: chrF2++."""
    return metric.replace("chrF2", "chrF")


def reference_words(contents: Contents, name: str) -> str:
    if name == "baseline-healed":
        return "the equally fine-tuned baseline"
    if name == "baseline" and contents.adapted_first:
        return "the adapted, unpruned baseline"
    return "the unpruned baseline" if name == "baseline" else name


def _subject(contents: Contents, cut: Model) -> str:
    """By name where there are several of its kind."""
    several = sum(model.kind == cut.kind for model in contents.models) > 1
    return cut.name if several else f"the {cut.kind} model"


def _quality_words(contents: Contents, cut: Model, reference: Model, kept: list[Kept]) -> str:
    shown = main_kept(contents, kept)
    if not shown:
        return ""
    low, high = (numbers.percent(pick(found.share.value for found in shown)) for pick in (min, max))
    share = low if low == high else f"{low.rstrip('%')} to {high}"
    places = f" over {len(shown)} test sets" if len(shown) > 1 else ""
    metric = friendly_metric(shown[0].metric)
    verb = "keeps" if all(found.share.value < 1 for found in shown) else "reaches"
    return f"{_subject(contents, cut)} {verb} {share} of {reference_words(contents, reference.name)}’s {metric}{places}"


def _speed_words(gain: Gain, joined: bool) -> str:
    verb, by = ("decodes", "") if gain.measure == "tpot_ms" else ("is", f" by {METRICS[gain.measure][0]}")
    said = f"{verb} {numbers.times(gain.ratio.value)} as fast" + ("" if joined else " as the baseline") + by
    return said + (f" ({gain.doubt})" if gain.doubt else "")
