"""Layers skipped in place inside a running vLLM worker: no reload, the same tokens as a checkpoint cut the same way.

vLLM mixes `LayerSkip` into its worker class by name (`worker_extension_cls`), so nothing is sent to the worker but
lists of numbers. Imports nothing heavy: it is read in every process of the engine.
"""

import inspect
from collections.abc import Callable
from typing import Any

# Decoder layers that read keys and values of another layer; taking that one out would leave them without.
_SHARED_CACHE = "kv_sharing_target_layer_name"


class LayerSkip:
    """What a vLLM worker can do besides: leave layers out of its decoder. Methods are called by `collective_rpc`.

    Both return what is wrong as text (nothing when all is well): an exception in a worker would end the engine.
    """

    raylp_owner: Any
    raylp_name: str
    raylp_layers: list[Any]
    raylp_skip: Callable[[Any], Any]
    get_model: Callable[[], Any]
    model_config: Any

    def raylp_watch_layers(self) -> str:
        """Finds the decoder's layer list by structure and notes, in the next forward pass, what its layers return."""
        model = self.get_model()
        count = self.model_config.hf_text_config.num_hidden_layers
        if hasattr(model, "get_language_model"):
            model = model.get_language_model()
        found = _layer_lists(model, count)
        if len(found) != 1:
            return f"{type(model).__name__} has {len(found)} lists of {count} equal layers"
        self.raylp_owner, self.raylp_name, self.raylp_layers = found[0]
        if any(getattr(module, _SHARED_CACHE, None) for module in model.modules()):
            return f"layers of {type(model).__name__} share keys and values"
        self.raylp_skip = lambda _: None
        first = self.raylp_layers[0]

        def note(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            hook.remove()
            self.raylp_skip = _skip_rule(layer, args, kwargs, output)

        hook = first.register_forward_hook(note, with_kwargs=True)
        return ""

    def raylp_skip_layers(self, removed: list[int]) -> str:
        """Runs without the layers `removed` from now on; an empty list brings all of them back."""
        import torch

        skipped = [self.raylp_skip(layer) for layer in self.raylp_layers]
        if skipped[0] is None:
            return (
                f"what {type(self.raylp_layers[0]).__name__} returns is neither hidden states nor these and a residual"
            )
        layers = [skipped[i] if i in removed else layer for i, layer in enumerate(self.raylp_layers)]
        setattr(self.raylp_owner, self.raylp_name, torch.nn.ModuleList(layers))
        return ""


def _layer_lists(model: Any, count: int) -> list[tuple[Any, str, list[Any]]]:
    """Owner, attribute and layers of every list of `count` modules of one class in `model`; once each."""
    import torch

    found = {}
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count and len({type(x) for x in child}) == 1:
                found[id(child)] = (owner, name, list(child))
    return list(found.values())


def _skip_rule(layer: Any, args: Any, kwargs: Any, output: Any) -> Callable[[Any], Any]:
    """How a layer like `layer` is skipped, from what one call of it took and gave.

    Two forms are known. The residual stream runs through a layer whole (hidden states in, hidden states out), or in
    two parts, hidden states and residual, which the next layer adds up: both parts then pass unchanged. The first layer
    gets no residual, and neither does the one after it when the first is skipped, just as in a checkpoint without it.
    """
    import torch

    signature = inspect.signature(layer.forward)
    given = signature.bind(*args, **kwargs).arguments
    hidden = given.get("hidden_states")
    in_two_parts = isinstance(output, tuple) and len(output) == 2 and "residual" in signature.parameters
    whole = isinstance(output, torch.Tensor) and "residual" not in signature.parameters
    first = output[0] if in_two_parts else output
    if (
        not (in_two_parts or whole)
        or not isinstance(first, torch.Tensor)
        or first.shape != getattr(hidden, "shape", None)
    ):
        return lambda _: None

    class Skipped(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            return (given["hidden_states"], given.get("residual")) if in_two_parts else given["hidden_states"]

    return lambda _: Skipped()
