"""Magnitude compensation: the layers behind a gap find the stream smaller than they know it, and are scaled to it.

Prune&Comp scales the embeddings and every output projection before the gap by alpha, the mean over channels of
(mean |x after| / mean |x before|) across what was removed. Every layer reads the stream through a norm, and the last
norm is read by the output layer, so only the proportion of the stream and what is added to it counts: scaling what
comes behind the gap by 1 / alpha is the same function, and tied embeddings stay as they are.
"""

from collections.abc import Sequence
from typing import Any

from raylp.models.view import without_layers
from raylp.repair.layer import calls, scale_layer, states_in
from raylp.search.criteria import branches, real, walk
from raylp.search.forced import Batch, ForcedScorer


def compensate(scorer: ForcedScorer, removed: Sequence[int]) -> dict[int, float]:
    """Scales the layers of `scorer.model` that stay, for every layer of `removed` in order; each one's alpha.

    Raises:
        UserError: the layers do not add two outputs of their parts to their input, or cannot be scaled.
    """
    alphas: dict[int, float] = {}
    for place, layer in enumerate(removed):
        gone = tuple(removed[:place])
        alphas[layer] = alpha = gap(scorer, gone, layer)
        later = [i for i in scorer.alive((*gone, layer)) if i > layer]
        seen = _calls(scorer, (*gone, layer), later)
        for other in later:
            args, kwargs, _ = seen[other]
            scale_layer(scorer.layers[other], _parts(scorer, other, seen[other]), 1 / alpha, args, kwargs)
    return alphas


def gap(scorer: ForcedScorer, gone: Sequence[int], layer: int) -> float:
    """How much larger the stream is behind `layer` than before it, in the model without `gone`."""
    sums: list[Any] = [0.0, 0.0]

    def see(batch: Batch, here: int, before: Any, after: Any) -> None:
        if here == layer:
            mask = real(batch)
            for place, states in enumerate((before, after)):
                sums[place] = sums[place] + states[mask].double().abs().sum(0)

    walk(scorer, gone, see)
    return float((sums[1] / sums[0].clamp(min=1e-12)).mean())


def _calls(scorer: ForcedScorer, gone: Sequence[int], layers: Sequence[int]) -> dict[int, Any]:
    """Of each of `layers`, what it is given and gives on the first batch, in the model without `gone`."""
    import torch

    with torch.no_grad(), without_layers(scorer.model, gone), calls({i: scorer.layers[i] for i in layers}) as seen:
        scorer.model.base_model(input_ids=scorer.batches[0].tokens, use_cache=False)
    return seen


def _parts(scorer: ForcedScorer, layer: int, call: Any) -> tuple[str, str]:
    """The children of a layer whose outputs it adds to the stream."""
    import torch

    module = scorer.layers[layer]
    args, kwargs, after = call
    with torch.no_grad(), calls(dict(module.named_children())) as seen:
        module(*args, **kwargs)
    outputs = {name: output for name, (_, _, output) in seen.items()}
    return branches(outputs, states_in(args, kwargs), after)
