"""Pruning and healing in turn: after every few layers the model is healed, and the search goes on from there.

A leg is a search of its own, on a model with fewer layers than the original; numbers of layers are put back into the
original's when the legs' plans are joined to one. Pure: `raylp.search.stage` and `raylp.heal.stage` run the legs.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from raylp.recipe import Recipe
from raylp.search.config import Search
from raylp.search.plan import protected_layers

LISTS = ("candidates", "healed", "joint")  # of a round, whose entries hold all layers that are left out


def stops(section: Search, every: int, num_layers: int) -> list[int]:
    """Numbers of layers at which the model is healed: after every `every` layers, and at each depth asked for.

    `stops(layers=[15, 14], every=2)` of 18 layers: 16, 15, 14.
    """
    depths = [num_layers - section.remove] if section.remove is not None else section.depths
    return sorted({*depths, *range(num_layers - every, min(depths), -every)}, reverse=True)


def stops_of(recipe: Recipe, num_layers: int) -> list[int]:
    """The recipe's `stops`; empty where it heals once."""
    if recipe.search is None or recipe.heal is None or recipe.heal.every is None:
        return []
    return stops(recipe.search, recipe.heal.every, num_layers)


def section_of(section: Search, stop: int, num_layers: int, gone: Sequence[int]) -> Search:
    """The section for the leg that ends with `stop` layers, of a model that lacks the original's layers `gone`."""
    left = remaining(num_layers, gone)
    protected = protected_layers(section.protect, num_layers)
    protect = [place for place, layer in enumerate(left) if layer in protected]
    return section.model_copy(update={"layers": stop, "remove": None, "protect": protect})


def remaining(num_layers: int, gone: Iterable[int]) -> list[int]:
    """The original's numbers of the layers that are left, by their place."""
    out = set(gone)
    return [layer for layer in range(num_layers) if layer not in out]


def of(section: Search, start: str, blocks: Sequence[Any]) -> str:
    """What a leg's plan is the result of, as a hash: how it was searched, on which model (`start`) and which text."""
    content = [section.model_dump(mode="json"), start, list(blocks)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def joined(plans: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One plan of the legs' plans in order, in the original's numbers.

    `starts`: for each leg but the first, what is known of the model it began with; stands as `start` in its first
    round, beside the model's own score on the search sentences, and the leg's noise and backend.
    """
    whole = {**plans[0], "legs": [depth["layers"] for plan in plans for depth in plan["depths"][-1:]]}
    for plan, start in zip(plans[1:], starts, strict=True):
        gone, left = whole["removed"], remaining(whole["num_layers"], whole["removed"])
        rounds = [_renumbered(entry, gone, left) for entry in plan["rounds"]]
        own = {key: plan.get(key) for key in ("noise", "backend", "dtype")}
        rounds[0] |= {"start": {**start, "score": plan["baseline"], **own}}
        depths = [{**depth, "removed": [*gone, *(left[i] for i in depth["removed"])]} for depth in plan["depths"]]
        spent = {key: whole["spent"].get(key, 0) + value for key, value in plan["spent"].items()}
        whole |= {
            "removed": depths[-1]["removed"],
            "rounds": [*whole["rounds"], *rounds],
            "depths": [*whole["depths"], *depths],
            "spent": {**whole["spent"], **spent},
        }
    return whole


def _renumbered(entry: dict[str, Any], gone: Sequence[int], left: Sequence[int]) -> dict[str, Any]:
    """A round of a leg in the original's numbers; its candidates also lack what was gone before the leg."""
    found = {**entry, **{key: [left[i] for i in entry[key]] for key in ("removed", "restored")}}
    for key in LISTS:
        if key in entry:
            found[key] = [{**one, "removed": [*gone, *(left[i] for i in one["removed"])]} for one in entry[key]]
    return found
