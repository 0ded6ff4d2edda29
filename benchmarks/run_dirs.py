"""A model of a run directory, for the benchmarks of the endpoint."""

import sys
from pathlib import Path

from raylp.context import Context
from raylp.names import choose_models
from raylp.pipeline import open_context
from raylp.progress import Reporter
from raylp.recipe import load_recipe


def open_run(run: str, model: str) -> tuple[Context, str, Path]:
    """The run, its endpoint on any free port, and the name and place of its model `model`."""
    recipe = load_recipe(Path(run) / "recipe.yaml", [f"run_dir={run}", "serve.port=0"])
    context = open_context(recipe, Reporter(sys.stderr))
    ((name, path),) = choose_models([model], context.models(), "--model").items()
    return context, name, path
