"""Several examples in one row: what their prompts begin with in common is computed once.

A row reads `prefix, rest of example 1, rest of example 2, ...`; positions start again after the prefix, and a mask lets
every example see the prefix and itself only. Causal attention makes that the same function as one row for each example,
with the same gradients. Few-shot prompts are mostly prefix, so the work falls to a third and less.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raylp.data.tokens import Example
from raylp.generate.base import common_prefix

# Rotary tables are computed for it; longer positions than this are no use to a mask either.
NO_WINDOW = 1 << 30
IGNORED = -100  # a label that nothing is learned from


@dataclass(frozen=True)
class Row:
    """One row for the model, all lists of one length but the last two.

    `groups` numbers the sets of examples that share a prefix, `members` the examples, 0 for a prefix. `predict` are the
    places whose next token is learned, `targets` those tokens.
    """

    tokens: list[int]
    positions: list[int]
    groups: list[int]
    members: list[int]
    predict: list[int]
    targets: list[int]


def by_pair(examples: Sequence[Example]) -> list[list[Example]]:
    """Those of a language pair together, in the order of their first."""
    pairs: dict[str, list[Example]] = {}
    for example in examples:
        pairs.setdefault(example.pair, []).append(example)
    return list(pairs.values())


def in_order(examples: Sequence[Example]) -> list[Example]:
    """The examples as `pack` puts them one after the other."""
    return [example for shared in by_pair(examples) for example in shared]


def pack(examples: Sequence[Example]) -> Row:
    """All examples in one row, those of a language pair behind their common prefix."""
    row = Row([], [], [], [], [], [])
    member = 0
    for group, shared in enumerate(by_pair(examples)):
        length = common_prefix([example.prompt for example in shared]) if len(shared) > 1 else 0
        _append(row, shared[0].prompt[:length], 0, group, 0)
        for example in shared:
            member += 1
            rest = example.prompt[length:]
            start = len(row.tokens) + len(rest) - 1
            row.predict.extend(range(start, start + len(example.target)))
            row.targets.extend(example.target)
            _append(row, (*rest, *example.target[:-1]), length, group, member)
    return row


def packed_length(examples: Sequence[Example]) -> int:
    """How many tokens the row of these examples has."""
    return sum(
        sum(example.length for example in shared) - (len(shared) - 1) * common_prefix([e.prompt for e in shared])
        for shared in by_pair(examples)
    )


def _append(row: Row, tokens: Sequence[int], position: int, group: int, member: int) -> None:
    row.tokens.extend(tokens)
    row.positions.extend(range(position, position + len(tokens)))
    row.groups.extend([group] * len(tokens))
    row.members.extend([member] * len(tokens))


def block_mask(row: Row, window: int | None, dtype: Any, device: Any) -> Any:
    """What each place of the row may look at: (1, 1, length, length), 0 where it may, the least number where not.

    `window`: of a layer with sliding attention, counted in positions, its own included.
    """
    import torch

    positions, groups, members = (
        torch.tensor(values, device=device) for values in (row.positions, row.groups, row.members)
    )
    distance = positions[:, None] - positions[None, :]
    allowed = (groups[:, None] == groups[None, :]) & (distance >= 0) & (distance < (window or NO_WINDOW))
    allowed &= (members[None, :] == 0) | (members[:, None] == members[None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


def attention_masks(row: Row, config: Any, dtype: Any, device: Any) -> Any:
    """The mask in the form the decoder of this text configuration takes: by layer type, or one for all layers."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return block_mask(row, window, dtype, device)
    masks = {"full_attention": block_mask(row, None, dtype, device)}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = block_mask(row, window, dtype, device)
    return masks


def packed_inputs(row: Row, config: Any, dtype: Any, device: Any) -> dict[str, Any]:
    """Arguments of the model's forward pass for one packed row; its logits are those of `row.predict` alone."""
    import torch

    return {
        "input_ids": torch.tensor([row.tokens], device=device),
        "position_ids": torch.tensor([row.positions], device=device),
        "attention_mask": attention_masks(row, config, dtype, device),
        "logits_to_keep": torch.tensor(row.predict, device=device),
        "use_cache": False,
    }


def padded_inputs(examples: Sequence[Example], pad: int, device: Any) -> tuple[dict[str, Any], Any]:
    """A row for each example, padded on the right, where a causal model needs no mask; and the labels.

    For architectures that do not take a mask of their own. Labels: (rows, kept places), `IGNORED` where nothing is.
    """
    import torch

    longest = max(example.length for example in examples)
    first = min(len(example.prompt) for example in examples) - 1
    tokens = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest - first), IGNORED)
    for index, example in enumerate(examples):
        tokens[index, : example.length] = torch.tensor((*example.prompt, *example.target[:-1]))
        start = len(example.prompt) - 1 - first
        labels[index, start : start + len(example.target)] = torch.tensor(example.target)
    inputs = {
        "input_ids": tokens.to(device),
        "logits_to_keep": torch.arange(first, longest, device=device),
        "use_cache": False,
    }
    return inputs, labels.to(device)


def place(
    model: Any, examples: Sequence[Example], config: Any, packed: bool, pad: int = 0
) -> tuple[dict[str, Any], Any, Any]:
    """Arguments of the model's forward pass, labels (rows x kept places), and the kept places of each row.

    `model`: anything called like a transformers causal model; `config`: its text configuration.
    """
    import torch

    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if packed:
        row = pack(examples)
        inputs = packed_inputs(row, config, reference.dtype, reference.device)
        labels = torch.tensor(row.targets, device=reference.device)
    else:
        inputs, labels = padded_inputs(examples, pad, reference.device)
        labels = labels.flatten()
    return inputs, labels, inputs["logits_to_keep"]


def loss_sum(model: Any, examples: Sequence[Example], config: Any, packed: bool, pad: int = 0) -> Any:
    """Cross-entropy summed over the target tokens of all examples, in nats; a scalar with its graph."""
    inputs, labels, _ = place(model, examples, config, packed, pad)
    return cross_entropy(model(**inputs).logits.flatten(0, 1), labels)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Summed over the labels that are learned, in nats; (places, vocabulary) and (places,)."""
    import torch

    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(precise, labels, ignore_index=IGNORED, reduction="sum")


def why_not_packed(model: Any, examples: Sequence[Example], config: Any, pad: int = 0) -> str | None:
    """Why examples cannot share a row in this architecture: seen, not assumed, on the first two that are alike.

    None where they can. Arguments as of `loss_sum`.
    """
    import torch

    pair = examples[0].pair
    two = [example for example in examples if example.pair == pair][:2]
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    with torch.no_grad(), _exact_products():
        apart = loss_sum(model, two, config, False, pad).item()
        try:
            packed = loss_sum(model, two, config, True).item()
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
    if abs(packed - apart) <= tolerance * max(1.0, abs(apart)):
        return None
    return f"the loss of two examples is {packed:.4f} packed and {apart:.4f} apart"


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever `matmul` says; rounding would pass for a difference."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
