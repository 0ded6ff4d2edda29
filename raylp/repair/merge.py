"""Layer merging: what stays takes in how the removed layers differ from it (LaCo).

For a run of removed layers l+1 .. l+m behind a layer l that stays, its weights become
theta_l + sum over k of (theta_l+k - theta_l). A merge is kept where the last hidden states stay near the whole model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylp.errors import UserError
from raylp.models.view import without_layers
from raylp.repair.layer import set_weight
from raylp.search.criteria import real
from raylp.search.forced import ForcedScorer


@dataclass(frozen=True)
class Merge:
    """`into` took in `layers`, or would have. `plain`, `merged`: mean cosine of the last states with the whole model's,
    without the merge and with it.
    """

    into: int
    layers: tuple[int, ...]
    plain: float
    merged: float
    kept: bool


def merge(scorer: ForcedScorer, removed: Sequence[int], above: float | None = None) -> list[Merge]:
    """Merges each run of removed layers into its neighbour in `scorer.model`, where the cosine then is above `above`.

    Without `above`: above that of plain removal. Runs are tried from the last to the first, as published.

    Raises:
        UserError: layers of a run are not built alike.
    """
    whole = _last_states(scorer, ())
    plain = _cosine(whole, _last_states(scorer, removed))
    tried = []
    for into, layers in reversed(runs(removed, scorer.num_layers)):
        target = scorer.layers[into]
        before = dict(target.named_parameters())
        for i in layers:
            _check_alike(before, dict(scorer.layers[i].named_parameters()), into, i)
        for name, value in before.items():
            differences = (scorer.layers[i].get_parameter(name).float() - value.float() for i in layers)
            _set(target, name, value.float() + sum(differences))
        merged = _cosine(whole, _last_states(scorer, removed))
        kept = merged > (plain if above is None else above)
        tried.append(Merge(into, layers, plain, merged, kept))
        if kept:
            plain = merged
        else:
            for name, value in before.items():
                _set(target, name, value)
    return tried


def runs(removed: Sequence[int], num_layers: int) -> list[tuple[int, tuple[int, ...]]]:
    """Neighbouring removed layers, and the layer that stays before them (behind them, where none is before)."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for layer in sorted(removed):
        if found and found[-1][1][-1] == layer - 1:
            found[-1] = (found[-1][0], (*found[-1][1], layer))
        else:
            found.append((layer - 1, (layer,)))
    return [(into if into >= 0 else layers[-1] + 1, layers) for into, layers in found]


def _check_alike(a: dict[str, Any], b: dict[str, Any], into: int, layer: int) -> None:
    if {name: value.shape for name, value in a.items()} != {name: value.shape for name, value in b.items()}:
        raise UserError(f"repair merge: layers {into} and {layer} are built differently; take another method")


def _set(layer: Any, path: str, value: Any) -> None:
    owner, _, name = path.rpartition(".")
    set_weight(layer.get_submodule(owner), name, value)


def _last_states(scorer: ForcedScorer, removed: Sequence[int]) -> list[Any]:
    """The states behind the last norm, of the tokens of every batch: (tokens, hidden size)."""
    import torch

    with torch.no_grad(), without_layers(scorer.model, removed):
        return [
            scorer.model.base_model(input_ids=batch.tokens, use_cache=False)[0][real(batch)].float()
            for batch in scorer.batches
        ]


def _cosine(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Mean over tokens, -1 to 1."""
    import torch

    found = torch.cat([torch.cosine_similarity(x, y, dim=-1) for x, y in zip(a, b, strict=True)])
    return float(found.mean())
