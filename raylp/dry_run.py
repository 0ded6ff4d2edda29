"""What a recipe would do and cost, from counts and a short timing of the model itself."""

import time
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.table import Table

from raylp import cluster
from raylp.asks import to_measure
from raylp.context import Context
from raylp.generate.layout import CPU_BYTES, MAX_ON_CPU
from raylp.generate.pool import make_generator
from raylp.models.checkpoint import count_parameters
from raylp.pipeline import check_names, needed_disk, num_depths, open_context, wanted_stages
from raylp.progress import Reporter
from raylp.quantize.engines import are_shared, weights_bytes
from raylp.recipe import Recipe
from raylp.search.targets import most_evaluations, target_of

TIMED_SENTENCES = 64  # about as many as are translated at once
TRAINING_OVER_GENERATION = 0.75  # a token learned to one generated: 0.6 on two cores with batches of 8
START_S = {
    "search": 15,
    "prune": 20,
    "repair": 30,
    "distill": 60,
    "adapt": 60,
    "heal": 120,
    "quantize": 60,
    "evaluate": 20,
    "bench": 120,
}


def dry_run(recipe: Recipe, out: TextIO) -> dict[str, dict[str, Any]]:
    """Prints, and returns, for each stage: evaluations, sentences, tokens, and estimated hours on this machine.

    The estimate times the unpruned model on a few of the recipe's sentences, on all cores; broken candidates run to
    their bound, so a search takes the bound's tokens, not the baseline's.
    """
    reporter = Reporter()
    context = open_context(recipe, reporter)
    check_names(context, None)
    with reporter.task("timing the model"):
        measured = _time(context)
    stages = estimates(context, measured)
    table = Table(title=f"{recipe.run_dir}: what would be done", title_justify="left")
    for column in ("stage", "evaluations", "sentences", "tokens, at most", "estimate"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, row in stages.items():
        table.add_row(
            name, f"{row['evaluations']:,}", f"{row['sentences']:,}", f"{row['tokens']:,}", _hours(row["hours"])
        )
    total = sum(row["hours"] for row in stages.values())
    table.add_section()
    table.add_row("all", "", "", "", _hours(total))
    console = Console(file=out, width=None if out.isatty() else 110)
    console.print(table)
    parameters, size = count_parameters(context.original)
    workers = min(cluster.cores(), MAX_ON_CPU)
    copies = 1 if are_shared(context.original, context.dtype) else workers
    memory = copies * weights_bytes(context.original, context.dtype) + workers * CPU_BYTES
    console.print(
        f"model: {parameters / 1e6:,.0f}M parameters, {size / 1e9:.2f} GB; {measured['tokens_per_s']:.0f} tokens/s "
        f"here, {measured['sentences']} sentences timed"
    )
    console.print(
        f"memory: about {memory / 1e9:.1f} GB in the search with {workers} workers, "
        f"{psutil.virtual_memory().available / 1e9:.1f} GB free; disk: about {needed_disk(context) / 1e9:.1f} GB"
    )
    return stages


def estimates(context: Context, measured: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Per stage: `evaluations` of a model on a set, `sentences` and `tokens` to generate or train on, `hours`."""
    recipe = context.recipe
    per_sentence = measured["tokens_per_sentence"]
    bound = measured["bound_per_sentence"]
    depths = num_depths(context) if recipe.search is not None else 0
    repaired = depths * len(recipe.repair.methods) if recipe.repair is not None else 0
    models = 1 + depths + repaired + (depths + recipe.heal.baseline if recipe.heal is not None else 0)
    quantised = len(recipe.quantize.models) * len(recipe.quantize.schemes) if recipe.quantize is not None else 0
    models = len(recipe.evaluate.models) if recipe.evaluate and recipe.evaluate.models else models + quantised
    rows: dict[str, dict[str, Any]] = {}
    for stage in wanted_stages(recipe):
        evaluations = sentences = 0
        tokens = 0.0
        scale = 1.0
        if stage.name == "search" and recipe.search is not None and recipe.search.given is None:
            evaluations = most_evaluations(recipe.search, target_of(recipe.search, context.original))
            sentences = evaluations * len(context.splits.search)
            tokens = sentences * bound
        elif stage.name == "distill" and recipe.distill is not None:
            sources = len(getattr(context.splits, recipe.distill.sources))
            sentences = min(sources, recipe.distill.limit or sources) * recipe.distill.samples
            tokens = sentences * per_sentence
        elif stage.name in ("heal", "adapt") and recipe.heal is not None:
            both = 2 if recipe.heal.data == "both" and stage.name == "heal" else 1
            # Healed in turn, the unpruned model is as often.
            times = depths if recipe.heal.every is not None else 1
            trained = depths + times * recipe.heal.baseline if stage.name == "heal" else 1
            sentences = len(context.splits.train) * both * recipe.heal.epochs * trained
            tokens = sentences * per_sentence
            scale = TRAINING_OVER_GENERATION
        elif stage.name == "quantize" and recipe.quantize is not None:
            sentences = quantised * recipe.quantize.sentences
            tokens = sentences * per_sentence
        elif stage.name == "evaluate":
            evaluations = models * len(context.splits.test)
            sentences = models * sum(len(examples) for examples in context.splits.test.values())
            tokens = sentences * per_sentence
        elif stage.name == "bench" and recipe.bench is not None:
            bench = recipe.bench
            sentences = len(to_measure(recipe)) * bench.repeats * sum(map(bench.num_requests, bench.loads))
            tokens = sentences * (bench.output_tokens or per_sentence)
        seconds = START_S[stage.name] + scale * tokens / measured["tokens_per_s"]
        rows[stage.name] = {
            "evaluations": evaluations,
            "sentences": sentences,
            "tokens": round(tokens),
            "hours": seconds / 3600,
        }
    return rows


def _time(context: Context) -> dict[str, float]:
    """Tokens a second of the unpruned model on a batch of the recipe's sentences, tokens and bound of a sentence."""
    generator: Any = make_generator(context.original, "transformers", context.dtype, context.prompt.newline)
    examples = context.splits.search or context.splits.train or context.splits.mono
    examples = examples or next(iter(context.splits.test.values()))
    asked = [(example.source, example.pair) for example in examples[:TIMED_SENTENCES]]
    requests = context.prompt.requests(generator.tokenizer, asked)
    started = time.perf_counter()
    outputs = generator.generate(requests)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.tokens) for output in outputs)
    return {
        "sentences": len(asked),
        "tokens_per_s": tokens / seconds,
        "tokens_per_sentence": tokens / len(asked),
        "bound_per_sentence": sum(request.max_new_tokens for request in requests) / len(asked),
    }


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h"
