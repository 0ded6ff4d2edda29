"""A model without some of its layers, in memory: nothing is copied, and everything comes back afterwards.

`layer_idx`, which addresses the key-value cache, lives on the shared modules, and configurations list layers by their
place. Both belong to the view that is active, so a process has one active view of a model at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raylp.errors import UserError
from raylp.models.stack import LayerStack, find_stack, text_config

# Entries that are layer numbers, or the number of leading layers of a kind: neither is a list of one entry per layer.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "skip_layers")
LEADING_COUNTS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")


def check_removed(removed: Iterable[int], num_layers: int) -> list[int]:
    """`removed` as a list without surprises.

    Raises:
        UserError: a number is not a layer of the model, stands twice, or nothing would be left.
    """
    layers = list(removed)
    outside = [i for i in layers if not 0 <= i < num_layers]
    if outside:
        raise UserError(f"layers {outside} are not there: the model has layers 0 to {num_layers - 1}")
    if len(set(layers)) != len(layers):
        raise UserError(f"the list of layers to remove names one twice: {layers}")
    if len(layers) >= num_layers:
        raise UserError(f"{len(layers)} layers to remove, but the model has {num_layers}: at least one must stay")
    return layers


def cut_config(config: dict[str, Any], kept: list[int], num_layers: int) -> dict[str, Any]:
    """What changes in a decoder's configuration when only the layers `kept` stay: new values by key.

    Every list of one entry per layer is cut (`layer_types`, `mlp_layer_types`, ...), whatever its name; layer numbers
    are renumbered; counts of leading layers are recounted.
    """
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key, value in config.items():
        if key in INDEX_LISTS and isinstance(value, list):
            changes[key] = [kept.index(i) for i in value if i in kept]
        elif key in LEADING_COUNTS and isinstance(value, int):
            changes[key] = sum(i < value for i in kept)
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and not _other_list(key):
            changes[key] = [value[i] for i in kept]
    return changes


def _other_list(key: str) -> bool:
    """Lists that may be as long as the model is deep by chance."""
    return key == "architectures" or key.endswith("_token_id")


@contextmanager
def without_layers(model: Any, removed: Iterable[int]) -> Iterator[Any]:
    """The same model object, running without the layers `removed` (its own indices) until the block ends.

    Raises:
        UserError: see `check_removed`.
    """
    stack = find_stack(model)
    gone = set(check_removed(removed, stack.num_layers))
    with _running(model, stack, [i for i in range(stack.num_layers) if i not in gone]):
        yield model


@contextmanager
def resumed(model: Any, layers: Sequence[int]) -> Iterator[Any]:
    """The same model object, going on in the middle: only `layers` run, in rising order, until the block ends.

    Yields an entry that stands for all layers before `layers[0]`, of which there is at least one. Its `output`, to be
    set by the caller, is what the last of them returned. What the model does before and after its layers (embeddings,
    masks, positions, last norm, output layer) stays.
    """
    import torch

    class Entry(torch.nn.Module):
        output: Any = None

        def forward(self, *_: Any, **__: Any) -> Any:
            return self.output

    stack = find_stack(model)
    entry = Entry()
    # The entry stands in the per-layer lists as the layer before; as the last one where no layer follows.
    place = layers[0] - 1 if layers else stack.num_layers - 1
    with _running(model, stack, [place, *layers], {place: entry}):
        yield entry


@contextmanager
def _running(model: Any, stack: LayerStack, kept: list[int], instead: Mapping[int, Any] = {}) -> Iterator[None]:
    """Only the layers `kept`, in their order; `instead` has modules that stand in for some of them."""
    import torch

    owner, _, name = stack.path.rpartition(".")
    parent = model.get_submodule(owner)
    layers = getattr(parent, name)
    saved_configs = []
    for config in _decoder_configs(model, stack):
        changes = cut_config(config.to_dict(), kept, stack.num_layers)
        saved_configs.append((config, {key: getattr(config, key) for key in changes}))
        _assign(config, changes)
    saved_indices = [
        (module, module.layer_idx) for layer in layers for module in layer.modules() if hasattr(module, "layer_idx")
    ]
    running = [instead.get(i, layers[i]) for i in kept]
    setattr(parent, name, torch.nn.ModuleList(running))
    for place, layer in enumerate(running):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    try:
        yield
    finally:
        setattr(parent, name, layers)
        for module, index in saved_indices:
            module.layer_idx = index
        for config, values in saved_configs:
            _assign(config, values)


def _decoder_configs(model: Any, stack: LayerStack) -> list[Any]:
    """Every configuration object in the model that describes the decoder; nested models keep copies."""
    described = text_config(model)
    objects = [described, *(module.config for module in model.modules() if hasattr(module, "config"))]
    distinct = {id(config): config for config in objects}
    return [
        config
        for config in distinct.values()
        if type(config) is type(described) and config.num_hidden_layers == stack.num_layers
    ]


def _assign(config: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, value)
