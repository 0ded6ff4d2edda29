"""Cheap criteria: how much each layer matters, from weights or a few passes over the prompts and references.

Lower goes first. Every criterion looks at the model as it is without the layers already removed, so it can be asked
once for all layers (one shot) or again after every removal.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from raylp.errors import UserError
from raylp.models.view import without_layers
from raylp.search.forced import Batch, ForcedScorer, log_probabilities

Importance = dict[int, float]

KEPT_FIRST, KEPT_LAST = 4, 2


def importance(
    name: str, scorer: ForcedScorer, removed: Sequence[int] = (), *, plus: bool = False, seed: int = 0
) -> Importance:
    """The value of every layer left without `removed`, by the model's own indices; lower goes first.

    `name`: a key of `CRITERIA`. `plus`: the first 4 and the last 2 layers left are infinitely important, as in the
    "+" variants of Kim et al. (2024). `seed`: of `random`.

    Raises:
        UserError: there is no such criterion, a layer in `removed` is not there, or the model is not built as `ifr`
            needs it.
    """
    if name not in CRITERIA:
        raise UserError(f"there is no criterion {name!r}; known: {', '.join(CRITERIA)}")
    alive = scorer.alive(removed)
    values = random_order(scorer, removed, seed) if name == "random" else CRITERIA[name](scorer, removed)
    ends = {*alive[:KEPT_FIRST], *alive[-KEPT_LAST:]} if plus else set()
    return {layer: float("inf") if layer in ends else values[layer] for layer in alive}


# --- from the hidden states ---


def block_influence(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """BI_i = 1 - mean over tokens of cos(x_i, x_i+1), x_i the input of layer i (ShortGPT, Men et al. 2024)."""
    import torch

    sums = dict.fromkeys(scorer.alive(removed), 0.0)

    def see(batch: Batch, layer: int, before: Any, after: Any) -> None:
        cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        sums[layer] += float(cosines[real(batch)].sum())

    walk(scorer, removed, see)
    return {layer: 1 - total / _num_real(scorer) for layer, total in sums.items()}


def angular(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The angular distance of every single layer."""
    return angular_blocks(scorer, removed, 1)


def angular_blocks(scorer: ForcedScorer, removed: Sequence[int], size: int) -> Importance:
    """For each block of `size` neighbouring layers left, by its first layer: arccos(cos(x_l, x_l+size)) / pi.

    x_l is the input of layer l at the last token of a sentence; mean over sentences, 0 to 1. Gromov et al. (2024) drop
    the block of the least distance.

    Raises:
        UserError: there are not so many layers.
    """
    import torch

    alive = scorer.alive(removed)
    if not 1 <= size <= len(alive):
        raise UserError(f"a block of {size} layers: the model has {len(alive)} left; ask for 1 to {len(alive)}")
    states: list[list[Any]] = [[] for _ in range(len(alive) + 1)]

    def see(batch: Batch, layer: int, before: Any, after: Any) -> None:
        rows = torch.arange(len(batch.numbers), device=before.device)
        place = alive.index(layer)
        if place == 0:
            states[0].append(before[rows, batch.ends].double())
        states[place + 1].append(after[rows, batch.ends].double())

    walk(scorer, removed, see)
    ends = [torch.cat(parts) for parts in states]
    found = {}
    for place in range(len(alive) - size + 1):
        cosines = torch.cosine_similarity(ends[place], ends[place + size], dim=-1)
        found[alive[place]] = float((cosines.clamp(-1, 1).arccos() / torch.pi).mean())
    return found


def ifr(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """Information flow routes (Ferrando and Voita 2024): the shares of the stream that a layer's two branches write.

    With prox(y, s) = max(|s|_1 - |s - y|_1, 0), attention's addition A to the stream x has the share
    prox(A, x + A) / (prox(A, x + A) + prox(x, x + A)), the MLP's likewise of what it finds; sum of both, mean over
    tokens. Where the branches are parallel (Cohere), attention is taken to add first.

    Raises:
        UserError: the layers do not add two outputs of their parts to their input.
    """
    alive = scorer.alive(removed)
    sums = dict.fromkeys(alive, 0.0)
    parts: dict[int, dict[str, Any]] = {layer: {} for layer in alive}
    chosen: dict[int, tuple[str, str]] = {}

    def note(layer: int, name: str, _: Any, __: Any, output: Any) -> None:
        parts[layer][name] = output[0] if isinstance(output, tuple) else output

    def see(batch: Batch, layer: int, before: Any, after: Any) -> None:
        if layer not in chosen:
            chosen[layer] = branches(parts[layer], before, after)
        first, second = (parts[layer][name].reshape(before.shape).double() for name in chosen[layer])
        parts[layer].clear()
        stream = before.double()
        shares = _share(first, stream) + _share(second, stream + first)
        sums[layer] += float(shares[real(batch)].sum())

    with ExitStack() as hooks:
        for layer in alive:
            for name, part in scorer.layers[layer].named_children():
                hooks.callback(part.register_forward_hook(partial(note, layer, name)).remove)
        walk(scorer, removed, see)
    return {layer: total / _num_real(scorer) for layer, total in sums.items()}


def branches(parts: dict[str, Any], before: Any, after: Any) -> tuple[str, str]:
    """The two parts of a layer whose outputs, added to its input, are its output: attention's and the MLP's, in order.

    That holds for branches one after the other or side by side, with or without norms behind them.
    """
    import torch

    names = [name for name, output in parts.items() if torch.is_tensor(output) and output.numel() == before.numel()]
    errors = {}
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            both = parts[first].reshape(before.shape) + parts[second].reshape(before.shape)
            errors[first, second] = float((before + both - after).norm() / after.norm())
    best = min(errors, key=lambda pair: errors[pair], default=None)
    if best is None or errors[best] > 4 * torch.finfo(before.dtype).eps:
        raise UserError(
            "ifr and compensate need layers that add attention and MLP to their input, which this model's do not: take "
            "another criterion or repair"
        )
    return best


def _share(addition: Any, stream: Any) -> Any:
    """(rows, length): the addition's share of stream + addition, 0 to 1."""
    import torch

    total = stream + addition

    def prox(part: Any) -> Any:
        return (total.abs().sum(-1) - (total - part).abs().sum(-1)).clamp(min=0)

    written, kept = prox(addition), prox(stream)
    return torch.where(written > 0, written / (written + kept), 0.0)


def walk(scorer: ForcedScorer, removed: Sequence[int], see: Callable[[Batch, int, Any, Any], None]) -> None:
    """One pass over all examples; `see(batch, layer, input, output)` for each layer left."""
    import torch

    alive = scorer.alive(removed)
    with torch.no_grad(), without_layers(scorer.model, removed):
        for batch in scorer.batches:
            with scorer.watching(alive, partial(see, batch)):
                scorer.model.base_model(input_ids=batch.tokens, use_cache=False)


def real(batch: Batch) -> Any:
    """(rows, length): where tokens are no padding."""
    import torch

    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device) <= batch.ends[:, None]


def _num_real(scorer: ForcedScorer) -> int:
    return sum(int(real(batch).sum()) for batch in scorer.batches)


# --- from the weights and the gradient of the loss ---


def magnitude(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The sum of |w| over the matrices of a layer (Kim et al. 2024)."""
    return {
        layer: sum(float(weight.detach().abs().double().sum()) for weight in _matrices(scorer, layer))
        for layer in scorer.alive(removed)
    }


def taylor(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The sum of |w dL/dw| over the matrices of a layer; L is the mean loss of the target tokens (Kim et al. 2024).

    The gradients need as much memory as the layers' weights. The weights are only read.
    """
    import torch

    matrices = {layer: _matrices(scorer, layer) for layer in scorer.alive(removed)}
    weights = [weight for group in matrices.values() for weight in group]
    asked = [weight.requires_grad for weight in weights]
    totals: list[Any] = [0.0] * len(weights)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in scorer.batches:
            final, _ = _graph(scorer, removed, batch)
            grads = torch.autograd.grad(final, weights, _loss_gradient(scorer, batch, final), allow_unused=True)
            # An expert that no token was sent to has no gradient.
            totals = [total if grad is None else total + grad for total, grad in zip(totals, grads, strict=True)]
    finally:
        for weight, before in zip(weights, asked, strict=True):
            weight.requires_grad_(before)
    products = {
        id(weight): float((weight.detach() * total).abs().double().sum())
        for weight, total in zip(weights, totals, strict=True)
    }
    return {layer: sum(products[id(weight)] for weight in group) for layer, group in matrices.items()}


def gate_taylor(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The loss that leaving out a layer adds, to first order, in nats a target token: one backward pass for all layers.

    Layer i as x + g (f(x) - x), f(x) its output: closing the gate from g = 1 adds -dL/dg, which is minus the inner
    product of dL/df(x) and f(x) - x. No weight has a gradient.
    """
    import torch

    alive = scorer.alive(removed)
    sums = dict.fromkeys(alive, 0.0)
    for batch in scorer.batches:
        final, seen = _graph(scorer, removed, batch)
        outputs = [seen[layer][1] for layer in alive]
        grads = torch.autograd.grad(final, outputs, _loss_gradient(scorer, batch, final))
        for layer, grad in zip(alive, grads, strict=True):
            before, after = seen[layer]
            sums[layer] -= float((grad.double() * (after - before).detach().double()).sum())
    return sums


def _matrices(scorer: ForcedScorer, layer: int) -> list[Any]:
    return [weight for weight in scorer.layers[layer].parameters() if weight.ndim > 1 and weight.is_floating_point()]


def _graph(scorer: ForcedScorer, removed: Sequence[int], batch: Batch) -> tuple[Any, dict[int, tuple[Any, Any]]]:
    """One pass that can be differentiated: the last layer's outputs where targets are predicted (targets, size), and
    by layer its input and output.
    """
    import torch

    alive = scorer.alive(removed)
    seen: dict[int, tuple[Any, Any]] = {}

    def see(layer: int, before: Any, after: Any) -> None:
        seen[layer] = (before, after)

    words = scorer.model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        with torch.enable_grad(), without_layers(scorer.model, removed), scorer.watching(alive, see):
            scorer.model.base_model(input_ids=batch.tokens, use_cache=False)
            return seen[alive[-1]][1][batch.rows, batch.places], seen
    finally:
        words.remove()


def _loss_gradient(scorer: ForcedScorer, batch: Batch, final: Any) -> Any:
    """(targets, size): dL/d`final` of the batch's part of the mean loss, some positions at a time."""
    import torch

    grads = []
    with torch.enable_grad(), scorer.projecting() as logits:
        for start in range(0, len(final), scorer.chunk):
            part = final[start : start + scorer.chunk].detach().requires_grad_()
            targets = batch.targets[start : start + scorer.chunk]
            loss = -log_probabilities(logits(part), targets).sum() / scorer.num_targets
            grads += torch.autograd.grad(loss, part)
    return torch.cat(grads)


# --- from the loss itself ---


def perplexity(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The perplexity of the targets without the layer, by the prefix sweep (Kim et al. 2024; iterated, it is SLEB).

    Raises:
        UserError: one layer is left, so none can be tried.
    """
    swept = scorer.sweep(removed, scorer.alive(removed))
    return {layer: float(np.exp(-rows[:, 0].sum() / rows[:, 1].sum())) for layer, rows in swept.items()}


# --- baselines, blind to the model ---


def random_order(scorer: ForcedScorer, removed: Sequence[int] = (), seed: int = 0) -> Importance:
    """A fixed random order of the whole model's layers."""
    ranks = np.random.default_rng(seed).permutation(scorer.num_layers)
    return {layer: float(ranks[layer]) for layer in scorer.alive(removed)}


def middle(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The distance from the middle of the whole model: a block there goes first."""
    return {layer: abs(layer - (scorer.num_layers - 1) / 2) for layer in scorer.alive(removed)}


def tail(scorer: ForcedScorer, removed: Sequence[int] = ()) -> Importance:
    """The distance from the whole model's end: the last layers go first."""
    return {layer: float(scorer.num_layers - 1 - layer) for layer in scorer.alive(removed)}


CRITERIA: dict[str, Callable[..., Importance]] = {
    "block_influence": block_influence,
    "angular": angular,
    "magnitude": magnitude,
    "taylor": taylor,
    "gate_taylor": gate_taylor,
    "perplexity": perplexity,
    "ifr": ifr,
    "random": random_order,
    "middle": middle,
    "tail": tail,
}
