"""What the stages of a recipe ask of a Ray cluster, as far as the recipe tells before the first begins."""

from collections.abc import Iterable
from typing import NamedTuple

from raylp.bench.config import RESIDENT_CPUS, Bench
from raylp.quantize.schemes import SCHEMES
from raylp.recipe import Recipe


class Ask(NamedTuple):
    """`what` needs so many logical CPUs, and where the cluster has GPUs at all, so many of them."""

    what: str
    cpus: float
    gpus: float = 0


def asks(recipe: Recipe, stages: Iterable[str]) -> list[Ask]:
    """What the named stages ask for at the least, each once, in their order."""
    found: list[Ask] = []
    for stage in stages:
        if stage == "evaluate" or (stage == "search" and _scores(recipe)):
            if (workers := recipe.resources.workers) != "auto":
                found.append(Ask(f"resources.workers: {workers}", workers))
        elif stage == "distill" and (distill := recipe.distill) is not None:
            gpus = 0 if distill.endpoint else distill.engines * distill.gpus_per_engine
            found.append(Ask(f"distill with {distill.engines} engines", distill.num_cpus, gpus))
        elif stage in ("adapt", "heal") and (heal := recipe.heal) is not None:
            found.append(Ask(f"heal with {heal.workers} workers", heal.workers, heal.workers))
        elif stage == "bench" and (bench := recipe.bench) is not None:
            found += _of_bench(recipe, bench)
    return list(dict.fromkeys(found))


def to_measure(recipe: Recipe) -> tuple[str, ...]:
    """The models that `bench` compares, by name or kind, before they are made; of those a deeper search leaves in
    several depths one, and of quantised ones those that are surely of these.
    """
    bench = recipe.bench or Bench()
    if bench.models is not None:
        return tuple(bench.models)
    healed = recipe.heal is not None and recipe.heal.when != "before"
    whole = ("baseline", *(["healed" if healed else "pruned"] if recipe.search is not None else []))
    if (quantize := recipe.quantize) is None:
        return whole
    return (*whole, *(f"{name}-{scheme}" for name in whole if name in quantize.models for scheme in quantize.schemes))


def _of_bench(recipe: Recipe, bench: Bench) -> list[Ask]:
    def run_by(engine: str) -> list[str]:
        schemes = {name: SCHEMES.get(name.rpartition("-")[2]) for name in to_measure(recipe)}
        return [name for name, scheme in schemes.items() if scheme is None or scheme.engine == engine]

    found = []
    if any(load.kind != "batch" for load in bench.loads):
        served = run_by("vllm")
        found.append(Ask(f"serving {', '.join(served)} for bench", recipe.serve.num_cpus(len(served))))
    for backend in dict.fromkeys(load.backend for load in bench.loads if load.kind == "batch"):
        held = run_by(backend)
        found.append(Ask(f"holding {len(held)} models for bench.batches", RESIDENT_CPUS * len(held)))
    return found


def _scores(recipe: Recipe) -> bool:
    return recipe.search is not None and recipe.search.given is None
