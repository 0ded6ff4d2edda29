"""Channel concatenation: a layer that stays keeps its most important channels and takes in those of a removed one.

CoMe rates channel c of what a projection back to the stream reads by E|a_c| x sum over outputs of |W_out[:, c]|, and
joins the top channels of two neighbouring layers, in the ratio of their importances, to one layer of the same shape.
Here a channel of the MLP is one of its inner neurons, and of attention a group of heads that share keys and values: a
head's own dimensions belong together. Where there is one group, the more important layer's attention is taken whole.
The norms before the projections are multiplied into them, so that channels of both layers read the same stream; those
behind them are mixed in the ratio. Importance is block influence, 1 - cos(input, output).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylp.errors import UserError
from raylp.models.load import head_dim
from raylp.models.stack import text_config
from raylp.models.view import without_layers
from raylp.repair.layer import gains, set_gains, set_weight
from raylp.repair.merge import runs
from raylp.search.criteria import block_influence, real
from raylp.search.forced import ForcedScorer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Joined:
    """`into` took in channels of `layer`: how many `neurons` and `groups` of heads of each are left, (into, layer)."""

    into: int
    layer: int
    neurons: tuple[int, int]
    groups: tuple[int, int]


def concatenate(
    scorer: ForcedScorer, removed: Sequence[int], importance: Mapping[int, float] | None = None
) -> list[Joined]:
    """Joins every removed layer of `scorer.model` to the one that stays beside it.

    `importance`: of each layer (default: block influence).

    Raises:
        UserError: the layers are not built of q, k, v, o and gate, up, down projections between norms without biases.
    """
    for layer in scorer.layers:
        check_built(layer)
    importance = importance or block_influence(scorer)
    rated = _sensitivities(scorer)
    joined = []
    for into, layers in runs(removed, scorer.num_layers):
        weight = importance[into]
        for layer in layers:
            share = weight / (weight + importance[layer]) if weight + importance[layer] > 0 else 0.5
            joined.append(_join(scorer, into, layer, share, rated))
            weight += importance[layer]
    return joined


def check_built(layer: Any) -> None:
    """Refuses a layer that `concatenate` does not know how to take apart."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    known = all(hasattr(attention, name) for name in ATTENTION) and all(hasattr(mlp, name) for name in MLP)
    norms = [*_norms(layer)[:2], *(norm for _, norm in _norms(layer)[2])] if known else []
    if not known or any(norm is None or getattr(norm, "bias", None) is not None for norm in norms):
        raise UserError(
            f"repair concatenate: {type(layer).__name__} is not built of q, k, v, o and gate, up, down projections "
            f"behind norms without biases; take another method"
        )


def _norms(layer: Any) -> tuple[Any, Any, list[tuple[str, Any]]]:
    """The norms before attention and before the MLP, and those behind them with their names."""
    before = getattr(layer, "input_layernorm", None)
    if hasattr(layer, "pre_feedforward_layernorm"):
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
        return before, layer.pre_feedforward_layernorm, [(name, getattr(layer, name)) for name in names]
    return before, getattr(layer, "post_attention_layernorm", before), []


def _sensitivities(scorer: ForcedScorer) -> dict[tuple[int, str], Any]:
    """By layer and output projection, of every channel that it reads: (channels,)."""
    import torch

    sums: dict[tuple[int, str], Any] = {}
    current: list[Any] = []

    def hook(layer: int, name: str) -> Any:
        def see(_: Any, args: Any) -> None:
            states = args[0][current[0]].double().abs().sum(0)
            sums[layer, name] = sums.get((layer, name), 0.0) + states

        return see

    projections = {
        (number, name): owner.get_submodule(name)
        for number, layer in enumerate(scorer.layers)
        for owner, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj"))
    }
    handles = [module.register_forward_pre_hook(hook(*key)) for key, module in projections.items()]
    try:
        with torch.no_grad(), without_layers(scorer.model, ()):
            for batch in scorer.batches:
                current[:] = [real(batch)]
                scorer.model.base_model(input_ids=batch.tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {key: sums[key] * module.weight.double().abs().sum(0) for key, module in projections.items()}


def _join(scorer: ForcedScorer, into: int, layer: int, share: float, rated: dict[tuple[int, str], Any]) -> Joined:
    """Joins one pair, and rates the channels of what comes of it."""
    import torch

    a, b = scorer.layers[into], scorer.layers[layer]
    config = text_config(scorer.model)
    size = head_dim(config)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    kinds = getattr(config, "layer_types", None)
    alike = kinds is None or kinds[into] == kinds[layer]  # another kind has another window, or other positions

    by_group = [rated[i, "o_proj"].reshape(groups, -1).sum(1) for i in (into, layer)]
    kept = groups if not alike else max(0, min(groups, round(share * groups)))
    own, other = _top(by_group[0], kept), _top(by_group[1], groups - kept)
    neurons = rated[into, "down_proj"].numel()
    mine = max(0, min(neurons, round(share * neurons)))
    first, second = _top(rated[into, "down_proj"], mine), _top(rated[layer, "down_proj"], neurons - mine)

    (pre, mid, posts), (pre_b, mid_b, posts_b) = _norms(a), _norms(b)
    folded = [[gains(norm) for norm in pair] for pair in ((pre, pre_b), (mid, mid_b))]
    q, o = (_rows(picked, heads // groups * size) for picked in (own, other))
    k, v = (_rows(picked, size) for picked in (own, other))
    for name, (rows_a, rows_b) in {"q_proj": (q, o), "k_proj": (k, v), "v_proj": (k, v)}.items():
        _join_inputs(a.self_attn, b.self_attn, name, rows_a, rows_b, folded[0])
    _join_outputs(a.self_attn, b.self_attn, "o_proj", q, o, share)
    for name in ("gate_proj", "up_proj"):
        _join_inputs(a.mlp, b.mlp, name, first, second, folded[1])
    _join_outputs(a.mlp, b.mlp, "down_proj", first, second, share)
    part = kept / groups
    for name in ("q_norm", "k_norm"):
        if getattr(a.self_attn, name, None) is not None:
            _mix(getattr(a.self_attn, name), getattr(b.self_attn, name), part)
    for (name, norm), (_, norm_b) in zip(posts, posts_b, strict=True):
        _mix(norm, norm_b, part if name == "post_attention_layernorm" else mine / neurons)
    for norm in {id(norm): norm for norm in (pre, mid)}.values():
        set_gains(norm, torch.ones_like(gains(norm)))
    rated[into, "o_proj"] = torch.cat([rated[into, "o_proj"][q], rated[layer, "o_proj"][o]])
    rated[into, "down_proj"] = torch.cat([rated[into, "down_proj"][first], rated[layer, "down_proj"][second]])
    return Joined(into, layer, (mine, neurons - mine), (kept, groups - kept))


def _top(values: Any, count: int) -> Any:
    """The places of the `count` largest values, in rising order."""
    return values.topk(count).indices.sort().values


def _rows(groups: Any, size: int) -> Any:
    """Rows of a projection that belong to these groups of `size` rows each."""
    import torch

    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _join_inputs(a: Any, b: Any, name: str, own: Any, other: Any, norms: Sequence[Any]) -> None:
    """Rows of two projections that read the stream, each behind its own norm's gains."""
    import torch

    first, second = getattr(a, name), getattr(b, name)
    rows = [first.weight.float()[own] * norms[0], second.weight.float()[other] * norms[1]]
    set_weight(first, "weight", torch.cat(rows))
    if first.bias is not None:
        set_weight(first, "bias", torch.cat([first.bias[own], second.bias[other]]))


def _join_outputs(a: Any, b: Any, name: str, own: Any, other: Any, share: float) -> None:
    """Columns of two projections back to the stream."""
    import torch

    first, second = getattr(a, name), getattr(b, name)
    set_weight(first, "weight", torch.cat([first.weight[:, own], second.weight[:, other]], dim=1))
    if first.bias is not None:
        set_weight(first, "bias", share * first.bias + (1 - share) * second.bias)


def _mix(norm: Any, other: Any, share: float) -> None:
    """A norm's gains, `share` of them its own and the rest another's."""
    set_gains(norm, share * gains(norm) + (1 - share) * gains(other))
