"""The weights of a decoder layer by what they do: what it adds to the stream, its norms, its channels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from raylp.errors import UserError

ROUNDING = {4: 1e-4, 2: 0.05}  # relative difference that a norm's epsilon and rounding leave, by bytes of a number
# What projects back to the stream, by the names that families give it.
OUTPUTS = frozenset({"o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "w2"})


def set_weight(module: Any, name: str, value: Any) -> None:
    """A new parameter instead of the old one, which may be a read-only map of a file."""
    import torch

    old = getattr(module, name)
    setattr(module, name, torch.nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=False))


def is_norm(module: Any) -> bool:
    """Whether the module is a norm over the stream: one vector of weights, and perhaps one of biases."""
    own = dict(module.named_parameters())
    return set(own) in ({"weight"}, {"weight", "bias"}) and all(value.ndim == 1 for value in own.values())


def adds_one(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + its weight, as Gemma's do: with weights of zero something is left."""
    import torch

    weight = norm.weight
    probe = torch.linspace(-1.0, 2.0, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        try:
            set_weight(norm, "weight", torch.zeros_like(weight))
            left = norm(probe[None, None])
        finally:
            norm.weight = weight
    bias = getattr(norm, "bias", None)
    return bool(((left - bias) if bias is not None else left).abs().max() > 0.1)


def gains(norm: Any) -> Any:
    """What a norm multiplies each channel by, in float32: (hidden size,)."""
    return norm.weight.float() + (1.0 if adds_one(norm) else 0.0)


def set_gains(norm: Any, value: Any) -> None:
    """The weights under which a norm multiplies by `value`."""
    set_weight(norm, "weight", value - (1.0 if adds_one(norm) else 0.0))


def scale_part(part: Any, factor: float) -> None:
    """Scales what a part of a layer gives: the last norm, or the projections back to the stream."""
    if is_norm(part):
        set_gains(part, gains(part) * factor)
        if getattr(part, "bias", None) is not None:
            set_weight(part, "bias", part.bias * factor)
        return
    for owner, name in list(_projections(part)):
        set_weight(owner, name, getattr(owner, name) * factor)


def _projections(part: Any) -> Iterator[tuple[Any, str]]:
    """Modules and names of the parameters that project back to the stream; all, where the part is one projection."""
    for path, _ in list(part.named_parameters()):
        *owners, name = path.split(".")
        if not owners or OUTPUTS & {*owners, name}:
            yield part.get_submodule(".".join(owners)), name


@contextmanager
def calls(modules: dict[Any, Any]) -> Iterator[dict[Any, tuple[Any, dict[str, Any], Any]]]:
    """Of each module, by its key, what it was last given and what it gave, while the block runs."""
    seen: dict[Any, tuple[Any, dict[str, Any], Any]] = {}

    def hook(key: Any) -> Any:
        def see(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[key] = (args, kwargs, first(output))

        return see

    handles = [module.register_forward_hook(hook(key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Any:
    """The states in what a layer gives: some families give more beside."""
    return output[0] if isinstance(output, tuple) else output


def states_in(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The states in what a layer is given."""
    return args[0] if args else kwargs["hidden_states"]


def scale_layer(layer: Any, parts: Sequence[str], factor: float, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Scales a layer: of a stream `factor` times as large it then makes `factor` times what it made before.

    `parts`: its children whose outputs it adds to the stream; `args`, `kwargs`: something it is given, to check it by.

    Raises:
        UserError: the layer is not built of projections and norms that can be scaled; it is as before then.
    """
    import torch

    def run(times: float) -> Any:
        with torch.no_grad():
            if args:
                return first(layer(args[0] * times, *args[1:], **kwargs)).float()
            return first(layer(**{**kwargs, "hidden_states": kwargs["hidden_states"] * times})).float()

    saved = [(module, *own) for module in layer.modules() for own in module.named_parameters(recurse=False)]
    wanted = run(1.0) * factor
    for name in parts:
        scale_part(layer.get_submodule(name), factor)
    error = float((run(factor) - wanted).norm() / wanted.norm())
    if error > ROUNDING[states_in(args, kwargs).dtype.itemsize]:
        for module, name, value in saved:
            setattr(module, name, value)
        raise UserError(
            f"repair compensate: {type(layer).__name__} does more than its norms and output projections say; take "
            f"another method"
        )
