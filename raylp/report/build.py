"""The page of a run: one file that loads nothing from elsewhere."""

from dataclasses import replace
from importlib.resources import files
from typing import Any, TextIO

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from raylp.names import whole_of
from raylp.quantize.schemes import SCHEMES
from raylp.report import facts as derive
from raylp.report import numbers, plots
from raylp.report.contents import (
    STAGE_NAMES,
    Contents,
    Model,
    Plan,
    Stat,
    Translation,
    arrival_rate,
    batch_size,
    concurrency,
    engine,
    mapping,
    read_contents,
    read_stat,
)
from raylp.report.facts import Facts, Gain
from raylp.report.search_words import measure_value, objective_digits, objective_label, search_facts
from raylp.report.tables import print_tables
from raylp.rundir import RunDir

PAGE = "report/index.html"
# Shown at once, and shown when asked for; a test set may have thousands, which would make the page slow to open.
SENTENCES_SHOWN = 12
SENTENCES_AT_MOST = 300
PLOTS_SHOWN = 6


def report(rundir: RunDir, out: TextIO | None) -> str:
    """Writes the page and returns its path; to `out`, where given, go the tables and then the path.

    Raises:
        UserError: the directory is not a run's, or one of its files cannot be read.
    """
    contents = read_contents(rundir)
    rundir.write_text(PAGE, render_page(contents))
    path = rundir.uri(PAGE)
    if out is not None:
        print_tables(rundir, Console(file=out))
        print(f"\n{path}", file=out)
    return path


def render_page(contents: Contents) -> str:
    """The page as HTML; the same contents give the same text."""
    facts = derive.find_facts(contents)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        name: getattr(numbers, name)
        for name in (
            "anything", "count", "duration", "layers", "milliseconds", "params", "percent", "rate", "setting", "size",
            "times", "words",
        )
    }  # fmt: skip
    environment.globals |= {"score": numbers.score, "interval": numbers.interval, "difference": numbers.difference}
    environment.globals |= {"verdict": numbers.verdict, "span": span}
    environment.globals |= {"plus_minus": numbers.plus_minus, "measure_value": measure_value, "fixed": numbers.fixed}
    environment.globals |= {"candidate_label": plots.candidate_label}
    metric, digits = objective(contents)
    rounds = contents.plan.rounds if contents.plan else ()
    template = environment.from_string(_resource("page.html.jinja"))
    return template.render(
        css=Markup(_resource("page.css")),
        run=contents,
        facts=facts,
        plan=contents.plan,
        tiles=tiles(contents, facts),
        drawings=drawings(contents, facts),
        places=places(contents),
        kept=derive.main_kept(contents, facts.kept),
        licence=str(mapping(contents.manifest.get("model")).get("licence") or ""),
        settings=contents.settings,
        translations=sentences(contents),
        stages=stages(contents),
        splits=splits(contents),
        details=details(contents),
        model_name=model_name(contents),
        descriptions=descriptions(contents),
        search_metric=metric,
        short_metric=metric if len(metric) < 24 else "objective",
        digits=digits,
        early=any(r.dropped_early(c) for r in rounds for c in r.candidates),
        rough=any(r.change is not None and not r.like_for_like for r in rounds),
        floored=any(r.floor is not None for r in rounds),
        search_facts=search_facts(contents.plan, metric, digits) if contents.plan else [],
        resamples=mapping(contents.recipe.get("evaluate")).get("resamples"),
        speed_reference=facts.gains[0].reference if facts.gains else "",
        failed_requests=contents.bench.get("errors") or 0,
        failed_where=failed_where(contents),
        measured_how=derive.measured_how(contents),
        taken=derive.taken(contents),
        compared=derive.compared(contents),
        metrics={name: words for name, (words, _) in derive.METRICS.items()},
        told=contents.bench.get("metric"),
        plots_shown=PLOTS_SHOWN,
    )


def failed_where(contents: Contents) -> str:
    """`baseline at 8 requests at a time: 3`."""
    failed = mapping(contents.bench.get("failed"))
    found = [
        f"{model} at {numbers.setting(name)}: {numbers.anything(count)}"
        for model, own in failed.items()
        for name, count in mapping(own).items()
    ]
    return "; ".join(found)


def tiles(contents: Contents, facts: Facts) -> list[dict[str, str]]:
    """The key figures: label, value, and what is needed to read it."""
    plan, cut, whole = contents.plan, facts.cut, contents.model("baseline")
    found = []
    if plan:
        found.append(_tile("Layers", f"{plan.num_layers} → {len(plan.kept)}", f"{len(plan.removed)} removed"))
    if cut and whole and cut.params and whole.params:
        smaller = numbers.percent(1 - cut.params / whole.params)
        sizes = ""
        if cut.bytes and whole.bytes:
            sizes = f"; {numbers.from_to(numbers.size(whole.bytes), numbers.size(cut.bytes))}"
        value = numbers.from_to(numbers.params(whole.params), numbers.params(cut.params))
        found.append(_tile("Parameters", value, f"{smaller} fewer{sizes}"))
    shown = derive.main_kept(contents, facts.kept)
    if shown:
        worst = min(shown, key=lambda kept: kept.share.value)
        ends = share_interval(worst.share)
        metric = derive.friendly_metric(worst.metric)
        lowest = ", the lowest of the test sets" if len(shown) > 1 else ""
        found.append(
            _tile(
                "Quality kept",
                numbers.percent(worst.share.value, 1),
                f"{ends + ' ' if ends else ''}of {worst.reference}’s {metric} on {worst.test_set}{lowest}",
            )
        )
    gain = derive.main_gain(contents, facts.gains, cut.name) if cut else None
    if gain:
        best = derive.ideal(contents, gain)
        was, now = (numbers.significant(stat.value) for stat in (gain.was, gain.now))
        note = f"{was} → {now} {derive.METRICS[gain.measure][1]}"
        note += f", {numbers.setting(gain.setting)}" + (f"; ideal {numbers.times(best)}" if best else "")
        note += f"; {gain.doubt}" if gain.doubt else ""
        found.append(_tile("Speed", numbers.times(gain.ratio.value), note))
    spent = sum(seconds_by_stage(contents).values())
    if spent:
        busy = sum(float(stage.get("gpu_seconds") or 0) for stage in stage_entries(contents).values())
        on_cpu = mapping(contents.manifest.get("machine")).get("gpus") == []
        note = f"{numbers.duration(busy)} of GPU time" if busy else "all stages" + (", on the CPU" if on_cpu else "")
        found.append(_tile("Time taken", numbers.duration(spent), note))
    return found


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def share_interval(share: Stat) -> str:
    """`(90.2 to 96.0%)`."""
    if share.low is None or share.high is None:
        return ""
    return f"({numbers.fixed(100 * share.low)} to {numbers.percent(share.high, 1)})"


def span(stat: Stat | None) -> str:
    """The interval of a measurement in three digits; nothing without one."""
    if stat is None or stat.low is None or stat.high is None:
        return ""
    return f"{numbers.significant(stat.low)} to {numbers.significant(stat.high)}"


def drawings(contents: Contents, facts: Facts) -> dict[str, list[Markup]]:
    """Plots by section; a list is empty when there is nothing to draw."""
    sections = ("search", "rounds", "quality", "tradeoffs", "speed", "loads", "heal", "course", "seconds")
    drawn: dict[str, list[str]] = {section: [] for section in sections}
    if contents.plan:
        drawn |= search_drawings(contents.plan, *objective(contents))
    deep = [model for model in contents.models if model.layers is not None]
    if len({model.layers for model in deep if model.scores}) > 1:
        main = derive.main_metric(contents)
        by_importance = sorted(places(contents), key=lambda place: place[1] != main)
        drawn["quality"] = [plots.plot_quality(deep, *place) for place in by_importance]
    gains = [gain for gain in facts.gains if is_telling(gain)]
    # A model as large as the reference has nothing to gain: its mark would only stand on the line at 1.
    marks = {
        (gain.setting, gain.model, gain.measure): best
        for gain in gains
        if (best := derive.ideal(contents, gain)) and abs(best - 1) > 1e-3
    }
    limits = plots.speed_limits(gains, list(marks.values()))
    for setting in contents.settings:
        these = [gain for gain in gains if gain.setting == setting]
        if these:
            ideals = {(model, measure): best for (at, model, measure), best in marks.items() if at == setting}
            drawn["speed"].append(plots.plot_speed(these, contents.models, ideals, setting, limits))
    drawn["tradeoffs"] = tradeoffs(contents)
    loads = {setting: clients for setting in contents.settings if (clients := concurrency(setting))}
    if len(loads) > 1:
        drawn["loads"] = [plots.plot_loads(contents.models, loads, kind) for kind in ("latency", "throughput")]
    rates = {setting: rate for setting in contents.settings if (rate := arrival_rate(setting))}
    if len(rates) > 1:
        drawn["loads"].append(plots.plot_loads(contents.models, rates, "rate"))
    if contents.heal:
        drawn["heal"] = [plots.plot_heal(contents.heal)]
        course = plots.plot_course(contents.heal)
        drawn["course"] = [course] if course else []
    seconds = seconds_by_stage(contents)
    if len(seconds) > 1:
        drawn["seconds"] = [plots.plot_seconds(seconds)]
    return {section: [Markup(svg) for svg in svgs] for section, svgs in drawn.items()}


def is_telling(gain: Gain) -> bool:
    """Whether a measure tells models apart under its load: what comes at a rate is answered at that rate."""
    whole = "e2e_ms" if arrival_rate(gain.setting) is not None else "output_tokens_per_s"
    return gain.measure in ("tpot_ms", "ttft_ms", whole)


def tradeoffs(contents: Contents) -> list[str]:
    """Quality of the main metric, on each test set, against size, time for a token, and time for one in a batch.

    The time is that at the lightest load on the endpoint, and in the largest batches of each engine, where all have
    their answers after the tokens of all.
    """
    metric = derive.main_metric(contents)
    if metric is None:
        return []
    lightest = next((name for name in contents.settings if contents.timed(name)), None)
    largest = {engine(name): name for name in contents.settings if batch_size(name)}
    drawn = []
    for test_set in contents.test_sets:
        scored = [(model, stat) for model in contents.models if (stat := model.score(test_set, metric))]
        sized = [(model, model.bytes / 1e6, stat) for model, stat in scored if model.bytes]
        if len({size for _, size, _ in sized}) > 1:
            drawn.append(plots.plot_tradeoff(sized, metric, "size of the weights, MB", f"by-size-{test_set}"))
        for setting in [*([lightest] if lightest else []), *largest.values()]:
            timed = [(model, took, stat) for model, stat in scored if (took := token_ms(model, setting)) is not None]
            if len(timed) > 1:
                what = f"time for a token, ms, {numbers.setting(setting)}"
                drawn.append(plots.plot_tradeoff(timed, metric, what, f"by-time-{setting}-{test_set}"))
    return drawn


def token_ms(model: Model, setting: str) -> float | None:
    """The median time between tokens of an answer, or in batches the time all took over the tokens of all."""
    if batch_size(setting) is not None:
        per_s = model.measure(setting, "output_tokens_per_s")
        return 1000 / per_s.value if per_s is not None and per_s.value > 0 else None
    took = model.measure(setting, "tpot_ms")
    return took.value if took is not None else None


def search_drawings(plan: Plan, metric: str, digits: int) -> dict[str, list[str]]:
    """Heat maps and cost (`search`), and a plot for each round (`rounds`)."""
    measured = [round_ for round_ in plan.rounds if round_.ranked]
    if plan.strategy == "oneshot" and measured:
        # All its rounds are one: layers were ordered once, and nothing is measured anew.
        measured = [replace(measured[0], removed=plan.removed)]
    alike = [[r for r in measured if r.by_importance == other] for other in (False, True)]
    limits = [plots.round_limits(rounds, plan.baseline) for rounds in alike]
    maps = [plots.plot_importance(rounds, plan.num_layers, metric) for rounds in alike if rounds]
    costs = any(round_.generated is not None and plan.everything(round_) for round_ in plan.rounds)
    rounds = [
        plots.plot_round(each, plan.num_layers, plan.baseline, limits[each.by_importance], metric, digits)
        for each in measured
    ]
    return {"search": [*maps, *([plots.plot_cost(plan)] if costs else [])], "rounds": rounds}


def places(contents: Contents) -> list[tuple[str, str]]:
    """(test set, metric) of every score."""
    found = [(test_set, metric) for test_set in contents.test_sets for metric in contents.metrics]
    return [place for place in found if any(model.score(*place) for model in contents.models)]


def sentences(contents: Contents) -> dict[str, tuple[list[Translation], list[Translation], int]]:
    """By test set: those shown, those folded away, and how many are in the files only."""
    return {
        name: (
            rows[:SENTENCES_SHOWN],
            rows[SENTENCES_SHOWN:SENTENCES_AT_MOST],
            max(0, len(rows) - SENTENCES_AT_MOST),
        )
        for name, rows in contents.translations.items()
    }


def stage_entries(contents: Contents) -> dict[str, dict[str, Any]]:
    """What the manifest has on each stage, in the order in which stages run."""
    found = {name: entry for name, entry in mapping(contents.manifest.get("stages")).items() if isinstance(entry, dict)}
    known = [name for name in STAGE_NAMES if name in found]
    return {name: found[name] for name in [*known, *(name for name in found if name not in known)]}


def seconds_by_stage(contents: Contents) -> dict[str, float]:
    entries = stage_entries(contents)
    return {name: float(entry["seconds"]) for name, entry in entries.items() if entry.get("seconds") is not None}


def stages(contents: Contents) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "seconds": entry.get("seconds"),
            "gpu_seconds": entry.get("gpu_seconds"),
            "finished": _moment(str(entry.get("finished") or "")),
            "summary": [
                (str(key), short) for key, value in mapping(entry.get("summary")).items() if (short := _short(value))
            ],
        }
        for name, entry in stage_entries(contents).items()
    ]


def _moment(iso: str) -> str:
    return iso[:16].replace("T", " ") + (" UTC" if iso.endswith("+00:00") else "")


def _short(value: Any) -> str:
    """A value that fits in a line; nothing for tables within tables, which have a place of their own on the page."""
    stat = read_stat(value) if isinstance(value, dict) else None
    if stat is not None:
        return numbers.fixed(stat.value)
    nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value))
    return "" if nested or value is None else numbers.anything(value)


def splits(contents: Contents) -> list[dict[str, Any]]:
    """A row for each split, or for each corpus and split: how many sentences, and the hash of their text."""
    rows = []
    for name, entry in mapping(contents.manifest.get("data")).items():
        entry = mapping(entry)
        for split, found in [(name, entry)] if "n" in entry else entry.items():
            if isinstance(found, dict) and "n" in found:
                label = name if found is entry else f"{name} {split}"
                rows.append({"split": label, "n": found["n"], "sha256": str(found.get("sha256") or "")})
    return rows


def details(contents: Contents) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where the figures come from: groups of names and values."""
    manifest, bench = contents.manifest, contents.bench
    signatures = {
        metric: stat.signature
        for model in contents.models
        for scores in model.scores.values()
        for metric, stat in scores.items()
        if stat.signature
    }
    decoding = {}
    if contents.plan:
        decoding = {"search backend": contents.plan.backend, "search dtype": contents.plan.dtype}
    groups = {
        "Run": {"directory": contents.url, "created": manifest.get("created"), "raylp": manifest.get("raylp")},
        "Model": {key: value for key, value in mapping(manifest.get("model")).items() if key != "licence"},
        "Machine": mapping(manifest.get("machine")),
        "Machine of the speed figures": {} if bench.get("machine") == manifest.get("machine") else bench.get("machine"),
        "Load": {key: bench.get(key) for key in ("requests", "output_tokens", "repeats", "starts", "errors")},
        "Versions": mapping(manifest.get("versions")),
        "Seeds": mapping(manifest.get("seeds")),
        "Metric signatures": signatures,
        "Search": {name: value for name, value in decoding.items() if value},
    }
    exact = {"Model": ("fingerprint",), "Seeds": None}
    return [
        (group, [(numbers.words(str(key)), _exactly(value, exact.get(group, ()), key)) for key, value in pairs.items()])
        for group, entries in groups.items()
        if (pairs := {key: value for key, value in mapping(entries).items() if value not in (None, "", [], {})})
    ]


def _exactly(value: Any, exact: tuple[str, ...] | None, key: str) -> str:
    """Seeds and hashes are names, not amounts: no separators in them."""
    return str(value) if exact is None or key in exact else numbers.anything(value)


def model_name(contents: Contents) -> str:
    for value in (mapping(contents.manifest.get("model")).get("name"), contents.recipe.get("model")):
        name = value.get("name") if isinstance(value, dict) else value
        if name:
            return str(name)
    return contents.plan.model if contents.plan else ""


def objective(contents: Contents) -> tuple[str, int]:
    """What the search went by, in words, and its decimals."""
    return objective_label(contents.objective), objective_digits(contents.objective, contents.plan)


def descriptions(contents: Contents) -> list[tuple[str, str]]:
    """What each name of a model stands for."""
    adapted = contents.adapted_first
    known = {
        "baseline": "fine-tuned (adapted) before pruning, no layer removed" if adapted else "the model as it came",
        "original": "the model as it came, neither fine-tuned nor pruned",
        "baseline-healed": "no layer removed, healed on the same data in the same way as the pruned one",
        "pruned": "layers removed, not trained afterwards"
        + ("; of the healed model before it, where there is one" if contents.in_turn else ""),
        "compensated": "layers removed, those behind them scaled to the smaller stream (Prune&Comp)",
        "merged": "layers removed, their differences added to a neighbour (LaCo)",
        "concatenated": "layers removed, their most important channels put into a neighbour (CoMe)",
        "healed": "layers removed, then healed",
    }
    found = [(model.name, known[model.kind]) for model in contents.models if model.kind in known]
    for model in contents.models:
        if (whole := whole_of(model.name)) != model.name:
            scheme = SCHEMES[model.name.rpartition("-")[2]]
            found.append((model.name, f"{whole} with {scheme.what}; by {scheme.maker}, run by {scheme.engine}"))
    return found


def _resource(name: str) -> str:
    return (files("raylp.report") / name).read_text(encoding="utf-8")
