"""Where a model keeps its decoder layers, found by structure."""

from dataclasses import dataclass
from typing import Any

from raylp.errors import UserError


@dataclass(frozen=True)
class LayerStack:
    """`path`: module path of the layer list, such as `model.layers`; `num_layers`: its length."""

    path: str
    num_layers: int


def text_config(model: Any) -> Any:
    """The configuration that describes the decoder: the model's own, or the nested one of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def find_stack(model: Any) -> LayerStack:
    """The list of decoder layers: in the decoder, of one class, as many as the text configuration says.

    A multimodal model has further stacks (vision, audio); they lie outside the decoder and are not meant.

    Raises:
        UserError: there is no such list.
    """
    import torch

    expected = getattr(text_config(model), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    found = [
        (name, len(module))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and id(module) in inside
        and len(module) == expected
        and len({type(layer) for layer in module}) == 1
        and any(True for _ in module.parameters())
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no decoder stack: no list of {expected} equal layers in its decoder"
        )
    path, num_layers = min(found, key=lambda item: item[0].count("."))
    return LayerStack(path, num_layers)
