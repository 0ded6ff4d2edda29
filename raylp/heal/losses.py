"""What a step minimises: cross-entropy of the targets, nearness to a teacher's words, nearness to its states.

All are sums over target tokens, so that rows, steps and workers add up. Pure torch.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raylp.data.tokens import Example
from raylp.heal.config import Loss
from raylp.heal.pack import IGNORED, cross_entropy, in_order, place
from raylp.models.stack import find_stack, text_config


@dataclass(frozen=True)
class Teacher:
    """The model that was pruned. `layers`: for every layer of the student, the teacher's whose output it should give.

    A layer that stays stands for itself and those removed right behind it: its output is what the next one is given.
    """

    model: Any
    layers: tuple[int, ...]


def correspondence(num_layers: int, removed: Sequence[int]) -> tuple[int, ...]:
    """`Teacher.layers` for a student without the layers `removed` of `num_layers`; the last belongs to the last."""
    kept = [layer for layer in range(num_layers) if layer not in set(removed)]
    return tuple(following - 1 for following in (*kept[1:], num_layers))


def losses(
    model: Any,
    examples: Sequence[Example],
    config: Any,
    packed: bool,
    pad: int,
    options: Loss,
    teacher: Teacher | None = None,
    layers: Sequence[Any] = (),
) -> dict[str, Any]:
    """The parts of the loss, by name, each summed over all target tokens; scalars with their graph.

    `model`: the student, anything called like a transformers causal model; `config`: its text configuration; `layers`:
    its decoder layers, where their states are to be near the teacher's.
    """
    import torch

    inputs, labels, predict = place(model, examples, config, packed, pad)
    # A packed row keeps no other places, and a slice copies none of the logits.
    learned: Any = slice(None) if packed else labels != IGNORED
    with states_of(layers if options.hidden > 0 else (), predict) as ours:
        logits = model(**inputs).logits.flatten(0, 1)
    found = {"cross_entropy": cross_entropy(logits, labels)}
    if options.distillation > 0 and options.teacher == "stored":
        chosen, top = stored(in_order(examples) if packed else examples)
        known = logits[learned][chosen]
        found["distillation"] = among(known, *top, options) if len(known) else 0 * found["cross_entropy"]
    if not options.needs_base:
        return found
    assert teacher is not None, "a teacher to learn from"
    own = list(teacher.model.get_submodule(find_stack(teacher.model).path))
    wanted = [own[layer] for layer in teacher.layers] if options.hidden > 0 else []
    given, _, _ = place(teacher.model, examples, text_config(teacher.model), packed, pad)
    with torch.no_grad(), states_of(wanted, predict) as theirs:
        told = teacher.model(**given).logits.flatten(0, 1)
    if options.distillation > 0 and options.teacher == "base":
        found["distillation"] = divergence(logits[learned], told[learned], options)
    if options.hidden > 0:
        parts = [distance(a[learned], b[learned]) for a, b in zip(ours, theirs, strict=True)]
        found["hidden"] = torch.stack(parts).mean()
    return found


def stored(examples: Sequence[Example]) -> tuple[Any, tuple[Any, Any]]:
    """Which target tokens of the examples, in order, have a teacher's words; their ids and logits, (tokens, k) each."""
    import torch

    start, places, ids, values = 0, [], [], []
    for example in examples:
        if example.top is not None:
            places.append(torch.arange(start, start + len(example.target)))
            ids.append(torch.from_numpy(example.top.ids.astype("int64")))
            values.append(torch.from_numpy(example.top.logprobs.astype("float32")))
        start += len(example.target)
    if not places:
        return [], (None, None)
    return torch.cat(places), (torch.cat(ids), torch.cat(values))


@contextmanager
def states_of(layers: Sequence[Any], places: Any) -> Iterator[list[Any]]:
    """What each of `layers` gives at the `places` of every row while the block runs: (rows x places, hidden size)."""
    seen: list[Any] = []

    def see(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[:, places].flatten(0, 1))

    handles = [layer.register_forward_hook(see) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def divergence(student: Any, teacher: Any, options: Loss) -> Any:
    """KL between teacher's and student's words, summed over (tokens, vocabulary) logits, in nats times temperature^2.

    Of the teacher's `top_k` words its own probabilities are made one again; forward, KL(teacher || student), asks the
    student to give all its probability to them; reverse, KL(student || teacher), compares the two among these words.
    With `entropy_weighted` a token counts by the teacher's entropy, as a share of the most that so many words can have.
    """
    if options.top_k is not None and options.top_k < teacher.shape[-1]:
        values, places = teacher.topk(options.top_k, dim=-1)
        return among(student, places, values, options)
    heat = options.temperature
    ours, theirs = (_precise(x) / heat for x in (student, teacher))
    return _sum(ours.log_softmax(-1), theirs.log_softmax(-1), options)


def among(student: Any, places: Any, values: Any, options: Loss) -> Any:
    """`divergence` where only the teacher's words at `places` are known, and their logits `values`: (tokens, k)."""
    places, values = places.to(student.device), _precise(values).to(student.device)
    ours = _precise(student) / options.temperature
    said = ours.gather(-1, places)
    said = said - ours.logsumexp(-1, keepdim=True) if options.direction == "forward" else said.log_softmax(-1)
    return _sum(said, (values / options.temperature).log_softmax(-1), options)


def _sum(said: Any, expected: Any, options: Loss) -> Any:
    """From log-probabilities of student and teacher."""
    first, second = (expected, said) if options.direction == "forward" else (said, expected)
    each = (first.exp() * (first - second)).sum(-1)
    if options.entropy_weighted:
        each = each * -(expected.exp() * expected).sum(-1) / math.log(expected.shape[-1])
    return options.temperature**2 * each.sum()


def _precise(values: Any) -> Any:
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))


def distance(ours: Any, theirs: Any) -> Any:
    """Squared distance of states as a share of the teacher's own square, summed over (tokens, hidden size)."""
    wanted = theirs.float()
    return ((ours.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-6)).sum()
