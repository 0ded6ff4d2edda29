"""raylp: take layers out of language models, guided by what the task loses."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raylp.recipe import Recipe
    from raylp.rundir import RunDir


def run(recipe: "Recipe | str", overrides: tuple[str, ...] = (), only: str | None = None) -> "RunDir":
    """Runs a recipe (or the file it is in), or `only` one stage of it, and returns the run directory.

    Raises:
        raylp.errors.UserError: what is wrong, where, and what to do.
    """
    from raylp.pipeline import run as run_pipeline
    from raylp.recipe import load_recipe

    loaded = load_recipe(recipe, overrides) if isinstance(recipe, str) else recipe
    return run_pipeline(loaded, only=only)


def load_recipe(path: str, overrides: tuple[str, ...] = ()) -> "Recipe":
    """See `raylp.recipe.load_recipe`."""
    from raylp.recipe import load_recipe as load

    return load(path, overrides)


def results(run_dir: str) -> dict[str, Any]:
    """What results.json of a run directory says."""
    from raylp.rundir import RunDir

    return RunDir(run_dir).read_json("results.json")
