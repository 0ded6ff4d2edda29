"""A model without some of its layers, in memory: nothing is copied, and everything comes back afterwards.

`layer_idx`, which addresses the key-value cache, lives on the shared modules, and configurations list layers by their
place. Both belong to the view that is active, so a process has one active view of a model at a time.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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


class ByRow:
    """Which rows of a batch run a layer of the active view that not all rows run; layers are told by their place in it.

    `rows`: those that run it, and whose keys and values its cache holds, in rising order. A layer that no row wants
    runs all the same, for one row and without effect, so that its cache grows as those of the others do: `idle`.
    """

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.idle: set[int] = set()
        self._indices: dict[tuple[int, Any], Any] = {}  # `rows` as tensors, by place and device

    def assign(self, skips: Sequence[Collection[int]]) -> None:
        """From now on row r of every batch goes without the layers at the places `skips[r]`."""
        places = sorted({place for own in skips for place in own})
        self.rows = {place: [r for r, own in enumerate(skips) if place not in own] for place in places}
        self.idle = {place for place, rows in self.rows.items() if not rows}
        self.rows |= {place: [0] for place in self.idle}
        self._indices = {}

    def keep(self, going: Sequence[int]) -> dict[int, list[int]]:
        """Only the rows `going` are left, in this order: for each layer, what to keep of what its cache holds."""
        new = {row: place for place, row in enumerate(going)}
        chosen: dict[int, list[int]] = {}
        self._indices = {}
        for place, rows in self.rows.items():
            chosen[place] = [i for i, row in enumerate(rows) if row in new and place not in self.idle]
            self.rows[place] = [new[rows[i]] for i in chosen[place]]
            if not chosen[place]:
                self.idle.add(place)
                chosen[place], self.rows[place] = [0], [0]
        return chosen

    def run(self, place: int, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer at `place` on the rows that want it; the others pass it by."""
        import torch

        if place not in self.rows:
            return layer(*args, **kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        index = self._indices.get((place, states.device))
        if index is None:
            index = self._indices[place, states.device] = torch.tensor(self.rows[place], device=states.device)
        pick = partial(_pick, index=index, rows=len(states))
        result = layer(*map(pick, args), **{key: pick(value) for key, value in kwargs.items()})
        own, *more = result if isinstance(result, tuple) else (result,)
        merged = states if place in self.idle else states.index_copy(0, index, own.to(states.device))
        return (merged, *more) if isinstance(result, tuple) else merged


def _pick(value: Any, index: Any, rows: int) -> Any:
    """The part of a layer's argument that belongs to the rows `index`: of tensors (rows, ...), and what holds them."""
    import torch

    if isinstance(value, torch.Tensor):
        return value[index.to(value.device)] if value.ndim > 1 and len(value) == rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(_pick(part, index, rows) for part in value)
    return value


@contextmanager
def without_layers_by_row(model: Any, removed: Iterable[int], further: Iterable[int]) -> Iterator[ByRow]:
    """`without_layers`, where each row of a batch may also go without some of the layers `further` (all places of it).

    One pass then serves many candidates, and weights that all of them have are read once.
    """
    stack = find_stack(model)
    with without_layers(model, removed):
        running = model.get_submodule(stack.path)
        by_row = ByRow()
        patched = [(running[place], place) for place in further]
        before = [layer.__dict__.get("forward") for layer, _ in patched]  # accelerate puts one there
        for layer, place in patched:
            layer.forward = partial(by_row.run, place, layer.forward)
        try:
            yield by_row
        finally:
            for (layer, _), forward in zip(patched, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def runs_by_row(model: Any) -> bool:
    """Whether all that the layers are given belongs to rows or to none, so that rows can be taken apart."""
    import torch

    rows = 7  # no model has heads, sections or tokens like that
    found: list[bool] = []

    def look(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.ndim < 2 or len(value) in (1, rows)
        return not isinstance(value, (tuple, list)) or all(map(look, value))

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        found.append(look(args) and look(list(kwargs.values())))

    layer = model.get_submodule(find_stack(model).path)[0]
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.inference_mode():
            model(
                input_ids=torch.ones((rows, 5), dtype=torch.long, device=model.device),
                attention_mask=torch.tensor([[0] + [1] * 4] * rows, device=model.device),
            )
    finally:
        handle.remove()
    return all(found)


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
