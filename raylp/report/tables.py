"""The figures of a run as tables for a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raylp.report import numbers
from raylp.report.contents import Contents, Model, read_contents
from raylp.report.facts import METRICS, compared, find_facts, taken
from raylp.report.search_words import objective_digits, objective_label, search_lines
from raylp.rundir import RunDir

# As many columns of scores as fit beside name, layers, parameters and size in 80 characters.
MAX_SCORE_COLUMNS = 2


def print_tables(rundir: RunDir, console: Console) -> None:
    """How the search went, models with quality, their speed, the comparisons; a line for each part there is nothing on.

    Raises:
        UserError: the directory is not a run's.
    """
    contents = read_contents(rundir)
    facts = find_facts(contents)
    console.print(facts.headline, style="bold", markup=False, highlight=False)
    if contents.plan:
        objective = objective_label(contents.objective)
        for line in search_lines(contents.plan, objective, objective_digits(contents.objective, contents.plan)):
            console.print(line, markup=False, highlight=False)
    for table in (
        *model_tables(contents),
        speed_table(contents),
        ratio_table(contents),
        taken_table(contents),
        *comparison_tables(contents),
    ):
        if table.row_count:
            console.print()
            console.print(table)
    if contents.adapted_first and contents.models:
        note = "baseline: the model adapted before pruning; original: the model as it came."
        console.print(note, style="dim", highlight=False)
    for missing in facts.missing:
        how = f"run `raylp {missing.verb} RECIPE`" if missing.wanted else "not asked for by the recipe"
        console.print(f"Not run: {missing.part} ({how}).", style="dim", highlight=False)


def model_tables(contents: Contents) -> list[Table]:
    """One table; when there are many scores, another for each test set."""
    places = [(test_set, metric) for test_set in contents.test_sets for metric in contents.metrics]
    places = [place for place in places if any(model.score(*place) for model in contents.models)]
    together = len(places) <= MAX_SCORE_COLUMNS
    models = _table("Models")
    models.add_column("model")
    for name in ("layers", "params", "size"):
        models.add_column(name, justify="right")
    for test_set, metric in places if together else []:
        models.add_column(f"{escape(test_set)}\n{escape(metric)}", justify="right")
    for model in contents.models:
        scores = [numbers.plus_minus(model.score(*place), place[1]) for place in places if together]
        sizes = (numbers.count(model.layers), numbers.params(model.params), numbers.size(model.bytes))
        models.add_row(escape(model.name), *sizes, *scores)
    return [models] if together else [models, *(_quality_table(contents, name) for name in contents.test_sets)]


def _quality_table(contents: Contents, test_set: str) -> Table:
    metrics = [metric for metric in contents.metrics if any(m.score(test_set, metric) for m in contents.models)]
    table = _table(f"Quality on {escape(test_set)}, with 95% intervals")
    table.add_column("model")
    for metric in metrics:
        table.add_column(escape(metric), justify="right")
    for model in contents.models:
        if test_set in model.scores:
            scores = [numbers.plus_minus(model.score(test_set, metric), metric) for metric in metrics]
            table.add_row(escape(model.name), *scores)
    return table


def speed_table(contents: Contents) -> Table:
    table = _table("Speed, medians")
    table.add_column("model")
    table.add_column("load")
    for name in ("tokens/s", "TTFT p50\nms", "TPOT p50\nms"):
        table.add_column(name, justify="right")
    for setting in contents.settings:
        table.add_section()
        for model in contents.models:
            if setting in model.speed:
                table.add_row(escape(model.name), escape(numbers.setting(setting)), *_speeds(model, setting))
    return table


def ratio_table(contents: Contents) -> Table:
    """What the benchmark concludes, by the one metric it was told to conclude by."""
    told = str(contents.bench.get("metric"))
    metric, _ = METRICS.get(told, ("speed", ""))
    table = _table(f"Times as fast, by {metric}, repeat by repeat, with 95% intervals")
    table.add_column("model", no_wrap=True)
    table.add_column("load")
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("so it is", no_wrap=True)
    for found in compared(contents):
        stat = found.ratio
        ratio = f"{numbers.times(stat.value)} ({numbers.times(stat.low)} to {numbers.times(stat.high)})"
        load = numbers.setting(found.setting) + (f", by {METRICS[found.metric][0]}" if found.metric != told else "")
        table.add_row(escape(f"{found.model} over {found.over}"), escape(load), ratio, found.said)
    return table


def taken_table(contents: Contents) -> Table:
    """Memory, start-up and energy, as far as they were noted."""
    table = _table("What it took")
    table.add_column("model", no_wrap=True)
    table.add_column("engine")
    for name in ("memory", "GPU", "start-up"):
        table.add_column(name, justify="right")
    table.add_column("J for 1,000 tokens")
    for row in taken(contents):
        sizes = (numbers.size(row.memory), numbers.size(row.gpu), numbers.duration(row.ready))
        table.add_row(escape(row.model), row.engine, *sizes, escape(row.energy))
    return table


def comparison_tables(contents: Contents) -> list[Table]:
    """One for each test set."""
    return [_comparison_table(contents, name) for name in dict.fromkeys(c.test_set for c in contents.comparisons)]


def _comparison_table(contents: Contents, test_set: str) -> Table:
    table = _table(f"Differences on {escape(test_set)}, with 95% intervals (clear: zero is not in it)")
    table.add_column("models", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("clear", no_wrap=True)
    for found in contents.comparisons:
        if found.test_set == test_set:
            stat = found.difference
            clear = {True: "yes", False: "no", None: numbers.NONE}[stat.excludes_zero]
            # A comma, so that a row with COMET still fits into 80 characters.
            ends = numbers.interval(stat, found.metric, sign=True).replace(" to ", ", ")
            gap = numbers.difference(stat, found.metric) + (f" ({ends})" if ends else "")
            models = escape(f"{found.a} {numbers.MINUS} {found.b}")
            table.add_row(models, escape(found.metric), gap, clear, style=None if stat.excludes_zero else "dim")
    return table


def _speeds(model: Model, setting: str) -> tuple[str, str, str]:
    throughput = model.measure(setting, "output_tokens_per_s")
    first, each = model.measure(setting, "ttft_ms"), model.measure(setting, "tpot_ms")
    return numbers.rate(throughput), numbers.milliseconds(first), numbers.milliseconds(each)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
