"""What a step minimises: cross-entropy of the targets, nearness to a teacher's words, nearness to its states.

All are sums over target tokens, so that rows, steps and workers add up. Pure torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raylp.data.tokens import Example
from raylp.heal.config import Loss
from raylp.heal.pack import IGNORED, cross_entropy, place
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
    learned = labels != IGNORED
    with states_of(layers if options.hidden > 0 else (), predict) as ours:
        logits = model(**inputs).logits.flatten(0, 1)
    found = {"cross_entropy": cross_entropy(logits, labels)}
    if not options.taught:
        return found
    assert teacher is not None, "a teacher to learn from"
    own = list(teacher.model.get_submodule(find_stack(teacher.model).path))
    wanted = [own[layer] for layer in teacher.layers] if options.hidden > 0 else []
    given, _, _ = place(teacher.model, examples, text_config(teacher.model), packed, pad)
    with torch.no_grad(), states_of(wanted, predict) as theirs:
        told = teacher.model(**given).logits.flatten(0, 1)
    if options.distillation > 0:
        found["distillation"] = divergence(logits[learned], told[learned], options)
    if options.hidden > 0:
        parts = [distance(a[learned], b[learned]) for a, b in zip(ours, theirs, strict=True)]
        found["hidden"] = torch.stack(parts).mean()
    return found


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
    import torch

    heat = options.temperature
    ours, theirs = (x.to(torch.promote_types(x.dtype, torch.float32)) / heat for x in (student, teacher))
    if options.top_k is not None and options.top_k < theirs.shape[-1]:
        values, places = theirs.topk(options.top_k, dim=-1)
        expected = values.log_softmax(-1)
        if options.direction == "forward":
            said = ours.gather(-1, places) - ours.logsumexp(-1, keepdim=True)
        else:
            said = ours.gather(-1, places).log_softmax(-1)
    else:
        expected, said = theirs.log_softmax(-1), ours.log_softmax(-1)
    first, second = (expected, said) if options.direction == "forward" else (said, expected)
    each = (first.exp() * (first - second)).sum(-1)
    if options.entropy_weighted:
        entropy = -(expected.exp() * expected).sum(-1)
        each = each * (entropy / torch.log(torch.tensor(float(expected.shape[-1])))).detach()
    return heat * heat * each.sum()


def distance(ours: Any, theirs: Any) -> Any:
    """Squared distance of states as a share of the teacher's own square, summed over (tokens, hidden size)."""
    wanted = theirs.float()
    return ((ours.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-6)).sum()
