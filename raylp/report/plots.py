"""Plots as SVG to stand in a page: text stays text, takes the page's font, and nothing is loaded from elsewhere.

Every figure is about 460 units wide, so that it can be read in a column of a wide page and on a telephone alike.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raylp.names import SCHEMES, kind_of, whole_of
from raylp.report import numbers
from raylp.report.contents import Candidate, HealLog, Model, Plan, Round, Stat
from raylp.report.facts import METRICS, Gain, pareto_front
from raylp.report.search_words import LIKELIHOOD_LOSS, measure_label, measure_value

INK, MUTED, FAINT, GRID = "#1c2430", "#5d6875", "#a3abb5", "#e6e8ea"
# Told apart by lightness and by marker too, not by hue alone.
STYLES = {
    "baseline": ("#5d6875", "s"),
    "adapted": ("#5d6875", "s"),
    "original": ("#a3abb5", "s"),
    "baseline-healed": ("#3465a4", "D"),
    "pruned": ("#d97b29", "^"),
    "healed": ("#0f7f6f", "o"),
    "compensated": ("#8b5fbf", "v"),
    "merged": ("#b0506d", "P"),
    "concatenated": ("#6b8e23", "X"),
}
# Who is set against whom: lines in the plot of quality join these.
FAMILIES = {"baseline": "pruned", "pruned": "pruned", "baseline-healed": "healed", "healed": "healed"}
OTHERS = (("#8b5fbf", "v"), ("#b0506d", "P"), ("#6b8e23", "X"))
SCHEME_MARKERS = dict(zip(SCHEMES, ("p", "*", "h", "<", ">", "d", "8", "1", "2", "3"), strict=True))
WIDTH = 6.4
# One hue from light to dark, so that it reads without seeing colours, and in print.
# So few steps that the scale beside the map is drawn and not embedded as an image.
HEAT, HEAT_STEPS = ("#f1f5fa", "#9db9dc", "#3465a4", "#13233b"), 40
COST = "#9fb8b3"
MOVES_SHOWN = 12

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raylp",
    "text.parse_math": False,  # names of models and test sets are not formulas
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.unicode_minus": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.4,
    "lines.solid_capstyle": "round",
}


def plot_round(
    round_: Round,
    num_layers: int,
    baseline: Stat | None,
    limits: tuple[float, float],
    metric: str = "chrF2++",
    digits: int = 1,
) -> str:
    """One round of the search: what each candidate came to, with its interval; the one that was taken filled.

    A swap has hundreds of candidates: its `MOVES_SHOWN` best are drawn.
    """
    with _axes(2.75) as (figure, axes):
        shown = round_.ranked[:MOVES_SHOWN] if round_.swap else sorted(round_.ranked, key=lambda c: c.layers)
        single = all(len(candidate.layers) == 1 and not candidate.back for candidate in shown)
        places = {(c.layers, c.back): float(c.layers[0] if single else number) for number, c in enumerate(shown)}
        if baseline is not None and not round_.by_importance:
            at_right = not any(places[c.layers, c.back] > num_layers / 2 for c in shown if c in round_.taken)
            axes.axhline(baseline.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"all layers {numbers.fixed(baseline.value, digits)}", (0.99 if at_right else 0.01, baseline.value),
                (0, 3), color=MUTED, fontsize=10.5, xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right" if at_right else "left", va="bottom",
            )  # fmt: skip
        others: dict[bool, list[tuple[float, Stat]]] = {True: [], False: []}
        for candidate in shown:
            stat = round_.measured(candidate)
            assert stat is not None
            place = places[candidate.layers, candidate.back]
            if candidate in round_.taken:
                label = candidate_label(candidate)
                if len(round_.taken) == 1:
                    label += f": {measure_value(round_, stat, digits)}"
                _draw_taken(axes, place, stat, label, below=round_.by_importance)
            else:
                others[round_.dropped_early(candidate)].append((place, stat))
        for early, points in others.items():
            axes.plot(
                [x for x, _ in points], [stat.value for _, stat in points], "o", color=FAINT, markersize=5, zorder=3,
                markerfacecolor="white" if early else FAINT, markeredgewidth=1.2,
            )  # fmt: skip
            bars = [(x, stat.low, stat.high) for x, stat in points if stat.low is not None and stat.high is not None]
            axes.vlines(*zip(*bars, strict=True) if bars else ([], [], []), color=FAINT, linewidth=1.4, zorder=2)
        axes.set_ylim(limits)
        if single:
            axes.set_xlim(-0.7, num_layers - 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=18, integer=True, steps=[1, 2, 5, 10]))
            for index in round_.gone:
                axes.annotate(
                    "×", (index, 0), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", va="bottom", color=FAINT, fontsize=10,
                )  # fmt: skip
            axes.set_xlabel("candidate: layer left out, in the original model’s numbering")
        else:
            crowded = len(places) > (6 if round_.swap else 12)
            axes.set_xticks(list(places.values()))
            labels = [candidate_label(candidate) for candidate in shown]
            axes.set_xticklabels(labels, rotation=90 if crowded else 0, fontsize=8 if crowded else 10)
            axes.set_xlabel("best moves: layer out (layer back)" if round_.swap else "candidate: layers left out")
        label = measure_label(round_, metric)
        short = "loss, nats per token" if label == LIKELIHOOD_LOSS else "objective"
        axes.set_ylabel(label if len(label) < 30 else short)
        axes.set_title(round_title(round_))
        taken = numbers.layers(round_.removed) or "none"
        return _svg(
            figure, f"round{round_.number}", f"{round_title(round_)}: {label} of each candidate; taken: {taken}"
        )


def round_title(round_: Round) -> str:
    """Its number, and how it was decided where that was not the usual way."""
    how = "swap" if round_.swap else ""
    if round_.floor is not None:
        how = "decided by the likelihood" if round_.by_importance else "not above noise"
    return f"Round {round_.number}" + (f" ({how})" if how else "")


def candidate_label(candidate: Candidate) -> str:
    """`9`, `9+12`; for a swap `9 (back: 5)`."""
    back = f" (back: {numbers.layers(candidate.back)})" if candidate.back else ""
    return numbers.layers(candidate.layers, "+") + back


def _draw_taken(axes: Any, x: float, stat: Stat, label: str, below: bool) -> None:
    """Labelled on the side where no other candidate is."""
    color = STYLES["healed"][0]
    _whisker(axes, stat, x, color, vertical=True)
    axes.plot([x], [stat.value], "o", color=color, markersize=7, zorder=4)
    end = (stat.low if below else stat.high) or stat.value
    axes.annotate(
        label, (x, end), (0, -8 if below else 8), textcoords="offset points", ha="center",
        va="top" if below else "bottom", color=color, fontweight="bold", fontsize=11.5, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
    )  # fmt: skip


def round_limits(rounds: Sequence[Round], baseline: Stat | None) -> tuple[float, float]:
    """One vertical scale for rounds of one measure, so that they can be compared, with room for the label."""
    stats = [stat for round_ in rounds for c in round_.candidates if (stat := round_.measured(c)) is not None]
    below = bool(rounds) and rounds[0].by_importance
    stats += [baseline] if baseline is not None and not below else []
    if not stats:
        return 0.0, 1.0
    low = min(stat.low if stat.low is not None else stat.value for stat in stats)
    high = max(stat.high if stat.high is not None else stat.value for stat in stats)
    room = high - low or 1e-3
    return low - (0.2 if below else 0.07) * room, high + (0.07 if below else 0.2) * room


def plot_importance(rounds: Sequence[Round], num_layers: int, metric: str = "chrF2++") -> str:
    """Heat map: a row for each round, a column for each layer, by how much worse than the best it is without it.

    A cell is the best candidate of the round that leaves the layer out. Small cells were dropped early: their scores
    are of fewer sentences. All rounds are of one measure.
    """
    cells = {(row, layer): cell for row, round_ in enumerate(rounds) for layer, cell in _losses(round_).items()}
    most = max((loss for loss, _ in cells.values()), default=0.0) or 1.0
    colors = LinearSegmentedColormap.from_list("loss", HEAT, N=HEAT_STEPS)
    norm = PowerNorm(0.5, 0, most)
    squares = {"candidate": 10.0}
    if any(not sure for _, sure in cells.values()):
        squares = {"scored to the end": 10.0, "dropped early, less sure": 5.5}
    handles = [
        Line2D([], [], marker="s", linestyle="", markersize=side, color=HEAT[1], label=label)
        for label, side in squares.items()
    ]
    marks = [
        Line2D(
            [layer for layer, _ in points], [row for _, row in points], linestyle="", zorder=4, marker=marker,
            label=label, markersize=size, markerfacecolor=color, markeredgecolor=edge, markeredgewidth=1,
        )
        for label, points, marker, size, color, edge in (
            ("removed in this round", _at(rounds, lambda r: r.removed), "o", 7.0, STYLES["healed"][0], "white"),
            ("put back", _at(rounds, lambda r: r.restored), "^", 7.0, STYLES["pruned"][0], "white"),
            ("gone already", _at(rounds, lambda r: set(r.gone) - set(r.restored)), "x", 4.0, FAINT, FAINT),
        )
        if points
    ]  # fmt: skip
    handles += marks
    columns = min(3, len(handles))
    legend_rows = -(-len(handles) // columns)
    inches = min(0.3, max(0.2, 5.4 / num_layers)) * len(rounds)
    above, below, left = 0.36 + 0.27 * legend_rows, 1.15, 0.6
    height = above + inches + below
    with _axes(height, grid="") as (figure, axes):
        # Placed by hand: the room around the map is the same however many rounds there are.
        figure.set_layout_engine("none")
        axes.set_position((left / WIDTH, below / height, 1 - (left + 0.1) / WIDTH, inches / height))
        for (row, layer), (loss, sure) in cells.items():
            side = 0.9 if sure else 0.5
            corner = (layer - side / 2, row - side / 2)
            color = colors(norm(loss))
            axes.add_patch(Rectangle(corner, side, side, facecolor=color, edgecolor="#c3ccd8", linewidth=0.4))
        for mark in marks:
            axes.add_line(mark)
        axes.set_xlim(-0.6, num_layers - 0.4)
        axes.set_ylim(len(rounds) - 0.4, -0.6)
        step = 1 if num_layers <= 20 else 2 if num_layers <= 40 else 5
        axes.set_xticks(range(0, num_layers, step))
        step = -(-len(rounds) // 24)
        axes.set_yticks(range(0, len(rounds), step), [str(round_.number) for round_ in rounds[::step]])
        axes.tick_params(labelsize=10)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("layer, in the original model’s numbering")
        axes.set_ylabel("round")
        place = figure.add_axes((left / WIDTH, 0.52 / height, 1 - (left + 0.1) / WIDTH, 0.1 / height))
        bar = figure.colorbar(ScalarMappable(norm, colors), cax=place, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=10)
        bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        measure = measure_label(rounds[0], metric)
        what = "importance" if rounds[0].by_importance else "points lost"
        bar.set_label(f"{what} against the round’s best; dark: the layer matters", color=MUTED)
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2,
            handlelength=1.2,
        )  # fmt: skip
        axes.set_title(f"Importance by {measure}", pad=12 + 18 * legend_rows)
        slug = f"importance-{'by-importance' if rounds[0].by_importance else 'by-score'}"
        return _svg(figure, slug, f"Importance of each layer in each round, by {measure}")


def _at(rounds: Sequence[Round], layers: Callable[[Round], Iterable[int]]) -> list[tuple[int, int]]:
    """(layer, row) of all that `layers` finds in each round."""
    return [(layer, row) for row, round_ in enumerate(rounds) for layer in layers(round_)]


def _losses(round_: Round) -> dict[int, tuple[float, bool]]:
    """By layer: how much worse than the round's best, and whether that was measured as far as the best was."""
    ranked = round_.ranked
    if not ranked:
        return {}
    first = round_.measured(ranked[0])
    assert first is not None
    found: dict[int, tuple[float, bool]] = {}
    for candidate in ranked:
        stat = round_.measured(candidate)
        assert stat is not None
        loss = max(0.0, stat.value - first.value if round_.by_importance else first.value - stat.value)
        sure = not round_.dropped_early(candidate)
        for layer in candidate.layers:
            known = found.get(layer)
            if known is None or (not sure, loss) < (not known[1], known[0]):
                found[layer] = (loss, sure)
    return found


def plot_cost(plan: Plan) -> str:
    """Sentences generated in each round, against what scoring every candidate on all sentences takes."""
    rows = [
        (round_.number, round_.generated, everything)
        for round_ in plan.rounds
        if round_.generated is not None and (everything := plan.everything(round_))
    ]
    with _axes(2.75) as (figure, axes):
        numbers_, spent, whole = zip(*rows, strict=True) if rows else ((), (), ())
        places = range(len(numbers_))
        axes.bar(
            places, whole, width=0.72, facecolor="white", edgecolor=FAINT, linewidth=1,
            label="scoring everything",
        )  # fmt: skip
        axes.bar(places, spent, width=0.72, facecolor=COST, edgecolor=COST, linewidth=1, label="generated")
        for x, done, all_of_it in zip(places, spent, whole, strict=True):
            if done and all_of_it / done >= 1.05 and len(rows) <= 20:
                axes.annotate(
                    f"{all_of_it / done:.1f}×" if all_of_it / done < 9.95 else f"{all_of_it / done:.0f}×",
                    (x, max(done, all_of_it)), (0, 3), textcoords="offset points", ha="center", va="bottom", color=INK,
                    fontsize=10 if len(rows) <= 12 else 8,
                )  # fmt: skip
        axes.set_xlim(-0.7, max(len(rows), 3) - 0.3)
        axes.set_ylim(0, 1.16 * max([*spent, *whole, 1]))
        step = -(-max(1, len(rows)) // 20)
        axes.set_xticks(places[::step], [str(number) for number in numbers_[::step]])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(value)))
        axes.set_xlabel("round")
        axes.set_ylabel("sentences")
        _title(axes, "Cost of each round", 2)
        return _svg(figure, "search-cost", "Sentences generated in each round, against scoring everything")


def plot_quality(models: Sequence[Model], test_set: str, metric: str) -> str:
    """Score over layers left; lines lead from an unpruned model to the pruned ones that are its fair match."""
    with _axes(3.0 + 0.25 * (len(models) > 4)) as (figure, axes):
        shown = [(m, s) for m in models if m.layers is not None and (s := m.score(test_set, metric)) is not None]
        at: dict[int, list[str]] = {}
        for model, _ in shown:
            at.setdefault(model.layers or 0, []).append(model.name)
        span = max(at, default=1) - min(at, default=0) or 1
        lines: dict[str, list[tuple[float, float]]] = {"pruned": [], "healed": []}
        for model, stat in shown:
            beside = at[model.layers or 0]
            # Models of equal depth stand side by side, or their intervals would hide each other.
            x = (model.layers or 0) + (beside.index(model.name) - (len(beside) - 1) / 2) * span * 0.055
            color, marker = style(model)
            _whisker(axes, stat, x, color, vertical=True)
            axes.plot([x], [stat.value], marker, color=color, markersize=7.5, label=model.name, zorder=3, linestyle="")
            if model.kind in FAMILIES:
                lines[FAMILIES[model.kind]].append((x, stat.value))
        for family, points in lines.items():
            places, values = zip(*sorted(points), strict=True) if points else ((), ())
            axes.plot(places, values, color=STYLES[family][0], linewidth=1.2, alpha=0.4, zorder=1)
        axes.set_xlim(min(at, default=0) - 0.16 * span, max(at, default=1) + 0.16 * span)
        axes.set_xticks(sorted(at))
        axes.set_xlabel("layers left")
        axes.set_ylabel(metric)
        _title(axes, test_set, len(shown))
        return _svg(figure, f"quality-{test_set}-{metric}", f"{metric} on {test_set} against layers left")


def plot_tradeoff(models: Sequence[tuple[Model, float, Stat]], metric: str, what: str, slug: str) -> str:
    """Quality over cost, each model's (model, cost, score), and through those that no other beats in both a line.

    `what`: the cost, in words; less is better, and further left.
    """
    with _axes(3.0 + 0.25 * (len(models) > 4)) as (figure, axes):
        for model, cost, stat in models:
            color, marker = style(model)
            _whisker(axes, stat, cost, color, vertical=True)
            axes.plot(
                [cost], [stat.value], marker, color=color, markersize=7.5, label=model.name, zorder=3, linestyle=""
            )
        points = [(cost, stat.value) for _, cost, stat in models]
        front = [points[i] for i in pareto_front(points)]
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.2, linestyle="--", zorder=1)
        axes.margins(x=0.12)
        axes.set_xlabel(what)
        axes.set_ylabel(metric)
        _title(axes, f"{metric} against {what.partition(',')[0]}", len(models))
        return _svg(figure, slug, f"{metric} against {what}")


def plot_loads(
    models: Sequence[Model], loads: Mapping[str, float], kind: Literal["latency", "rate", "throughput"]
) -> str:
    """The median time of a request over the clients at a time (`latency`) or the requests a second (`rate`);
    `throughput`: tokens a second over that time.

    `loads`: clients or requests a second, by setting. Each model is a line.
    """
    names = {
        "latency": ("requests at a time", "Latency against load"),
        "rate": ("requests a second", "Latency against rate"),
        "throughput": ("time of a request, median, ms", "Throughput against latency"),
    }
    what, title = names[kind]
    with _axes(3.0) as (figure, axes):
        shown = [model for model in models if any(setting in model.speed for setting in loads)]
        for model in shown:
            color, marker = style(model)
            points = []
            for setting, clients in loads.items():
                took, made = model.measure(setting, "e2e_ms"), model.measure(setting, "output_tokens_per_s")
                if took is not None and made is not None:
                    points.append((took.value, made) if kind == "throughput" else (clients, took))
                    _whisker(axes, points[-1][1], points[-1][0], color, vertical=True)
            places, stats = zip(*points, strict=True)
            axes.plot(places, [s.value for s in stats], marker, color=color, linestyle="-", label=model.name, zorder=3)
        axes.set_ylim(bottom=0)
        if kind != "throughput":
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(loads.values()))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(what)
        axes.set_ylabel("tokens a second" if kind == "throughput" else "time of a request, median, ms")
        _title(axes, title, len(shown))
        return _svg(figure, f"loads-{kind}", f"{kind} under load")


def plot_speed(
    gains: Sequence[Gain],
    models: Sequence[Model],
    ideals: dict[tuple[str, str], float],
    setting: str,
    limits: tuple[float, float],
) -> str:
    """How many times as fast as the baseline; an open diamond is what the smaller size alone would give."""
    names = [model for model in models if any(gain.model == model.name for gain in gains)]
    measures = [measure for measure in METRICS if any(gain.measure == measure for gain in gains)]
    with _axes(1.1 + 0.27 * len(measures) * (len(names) + 1), grid="x") as (figure, axes):
        axes.axvline(1, color=MUTED, linewidth=1, zorder=1)
        row, ticks = 0.0, []
        for measure in measures:
            first = row
            for model in names:
                gain = next((g for g in gains if (g.model, g.measure) == (model.name, measure)), None)
                if gain is None:
                    continue
                color, marker = style(model)
                _whisker(axes, gain.ratio, row, color, vertical=False)
                known = model.name in axes.get_legend_handles_labels()[1]
                axes.plot(
                    [gain.ratio.value], [row], marker, color=color, markersize=7, zorder=3, linestyle="",
                    label=None if known else model.name,
                )  # fmt: skip
                axes.annotate(
                    numbers.times(gain.ratio.value), (gain.ratio.value, row), (0, 6), textcoords="offset points",
                    ha="center", va="bottom", color=color, fontsize=10.5, fontweight="bold",
                )  # fmt: skip
                if (model.name, measure) in ideals:
                    axes.plot(
                        [ideals[model.name, measure]], [row], "D", markersize=6.5, color=color, zorder=2, linestyle="",
                        markerfacecolor="none", markeredgewidth=1.1,
                    )  # fmt: skip
                row += 1
            ticks.append(((first + row - 1) / 2, METRICS[measure][0]))
            row += 1.2
        if ideals:
            axes.plot(
                [], [], "D", color=MUTED, markerfacecolor="none", markersize=6.5, label="ideal", linestyle="",
                markeredgewidth=1.1,
            )  # fmt: skip
        axes.set_yticks([place for place, _ in ticks])
        axes.set_yticklabels([label.replace(" per second", "\nper second") for _, label in ticks])
        axes.set_ylim(row - 1.2 + 0.1, -1.1)
        axes.set_xlim(limits)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel(f"times as fast as {gains[0].reference}; right is better")
        _title(axes, numbers.setting(setting), len(names) + bool(ideals))
        return _svg(figure, f"speed-{setting}", f"Speed against the baseline, {numbers.setting(setting)}")


def speed_limits(gains: Sequence[Gain], ideals: Sequence[float]) -> tuple[float, float]:
    """One horizontal scale for all loads, with 1 on it."""
    ends = [end for gain in gains for end in (gain.ratio.low, gain.ratio.value, gain.ratio.high) if end is not None]
    low, high = min([1.0, *ends]), max([1.0, *ends, *ideals])
    room = max(high - low, 0.02)
    return low - 0.12 * room, high + 0.12 * room


def plot_heal(logs: Sequence[HealLog]) -> str:
    """Training loss (thin: each step; thick: running mean) and dev loss (points) of every healing."""
    with _axes(3.0) as (figure, axes):
        for log in logs:
            color, marker = style(Model(log.name))
            steps, losses = [row["step"] for row in log.steps], [row["loss"] for row in log.steps]
            axes.plot(steps, losses, color=color, linewidth=0.7, alpha=0.35)
            axes.plot(steps, _running_mean(losses), color=color, linewidth=1.8, label=f"{log.name}, training")
            if log.dev:
                axes.plot(
                    [step for step, _, _ in log.dev], [loss for _, _, loss in log.dev], marker, color=color,
                    markersize=7, markeredgecolor="white", markeredgewidth=1, linestyle="", zorder=4,
                    label=f"{log.name}, dev", clip_on=False,
                )  # fmt: skip
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right", ncols=1)
        return _svg(figure, "heal", "Loss during healing: " + ", ".join(log.name for log in logs))


# Of a training's steps: label, and the value from a step's record where it has one.
COURSE: tuple[tuple[str, Callable[[dict[str, float]], float | None]], ...] = (
    ("dev chrF++", lambda step: step.get("dev_chrf")),
    ("learning rate", lambda step: step.get("lr")),
    ("tokens/s", lambda step: step["tokens"] / step["seconds"] if step.get("tokens") and step.get("seconds") else None),
    ("memory, GB", lambda step: step["memory"] / 1e9 if step.get("memory") else None),
)


def plot_course(logs: Sequence[HealLog]) -> str | None:
    """How each training went, step by step: what `COURSE` names and any of them has; None where none has any."""
    there = [(label, value) for label, value in COURSE if any(value(s) is not None for log in logs for s in log.steps)]
    if not there:
        return None
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.25 * len(there)), layout="constrained")
        panels = figure.subplots(len(there), sharex=True, squeeze=False)[:, 0]
        for (label, value), axes in zip(there, panels, strict=True):
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            for log in logs:
                color, marker = style(Model(log.name))
                points = [(step["step"], found) for step in log.steps if (found := value(step)) is not None]
                steps, values = [step for step, _ in points], [found for _, found in points]
                mark = marker if label == "dev chrF++" else ""
                shown = _running_mean(values) if label == "tokens/s" else values
                axes.plot(steps, shown, color=color, linewidth=1.6, marker=mark, markersize=6, label=log.name)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            if label != "dev chrF++":
                axes.set_ylim(bottom=0)
        panels[0].legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(4, len(logs)), borderaxespad=0.2)
        panels[-1].set_xlabel("optimiser step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "course", "The course of healing: " + ", ".join(log.name for log in logs))


def plot_seconds(seconds: dict[str, float]) -> str:
    """Where the time went, stage by stage."""
    with _axes(0.35 + 0.34 * len(seconds), grid="") as (figure, axes):
        names = list(seconds)
        axes.barh(names, list(seconds.values()), color=COST, height=0.56)
        for row, value in enumerate(seconds.values()):
            axes.annotate(
                numbers.duration(value), (value, row), (5, 0), textcoords="offset points", va="center", color=INK,
                fontsize=10,
            )  # fmt: skip
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.28 * max(seconds.values(), default=1) or 1)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, "seconds", "Time by stage")


def style(model: Model) -> tuple[str, str]:
    """Colour and marker of a model, the same in every plot."""
    if model.kind in STYLES:
        return STYLES[model.kind]
    if (whole := kind_of(whole_of(model.name))) in STYLES:  # quantised: its model's colour, a marker of its scheme's
        scheme = model.name.rpartition("-")[2]
        return STYLES[whole][0], SCHEME_MARKERS[scheme]
    return OTHERS[sum(model.name.encode()) % len(OTHERS)]


def _whisker(axes: Any, stat: Stat, place: float, color: str, vertical: bool) -> None:
    if stat.low is not None and stat.high is not None:
        ends = ([place, place], [stat.low, stat.high])
        axes.plot(*(ends if vertical else reversed(ends)), color=color, linewidth=1.6, alpha=0.75, zorder=2)


def _title(axes: Any, title: str, entries: int) -> None:
    """A title, and under it a legend, never on the data."""
    columns = min(entries, 4)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.2)
    axes.set_title(title, pad=12 + 18 * -(-entries // columns))


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of a window around each value; centred, since a trailing one lags behind a falling loss."""
    reach = max(1, len(values) // 30)
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


@contextmanager
def _axes(height: float, grid: Literal["x", "y", ""] = "y") -> Iterator[tuple[Figure, Any]]:
    """A figure of its own: pyplot would keep every one of them for the life of a notebook."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        if grid:
            axes.grid(axis=grid, color=GRID, linewidth=0.8)
        yield figure, axes


def _svg(figure: Figure, slug: str, label: str) -> str:
    """The drawing alone, to stand inside HTML: no prologue or metadata, and no id that another drawing has too."""
    stream = StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    slug = re.sub("[^a-zA-Z0-9]+", "-", slug)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {name for pair in used for name in pair if name}
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{slug}-{m[1]}"' if m[1] in names else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{slug}-", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{_attribute(label)}">'
    return re.sub(r"\n\s*", "\n", head + svg[svg.index(">") + 1 :]).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
