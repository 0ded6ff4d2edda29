"""Which examples belong to which step, worker and row, and how fast each step learns. Fixed before the start.

Everything follows from the seed and the number of examples, so a run that was interrupted goes on with the same steps,
and every worker knows the shares of all others without asking.
"""

import math
import random
from collections.abc import Mapping, Sequence

from raylp.data.tokens import Example
from raylp.heal.pack import packed_length

MOST_PADDING = 0.05  # of a row's tokens, where examples of unequal length share one and cannot be packed


def steps(num_examples: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The example numbers of every optimiser step; each epoch has all examples once, in an order of its own."""
    plan = []
    for epoch in range(epochs):
        order = list(range(num_examples))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        plan += [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]
    return plan


def looks(num_steps: int, epochs: int, every: int | None) -> frozenset[int]:
    """The steps (from 1) after which the dev split is looked at: the last one, and each `every` or each epoch's end."""
    step = every or num_steps // epochs
    return frozenset({num_steps, *range(step, num_steps + 1, step)})


def best_look(values: Mapping[int, float], more_is_better: bool) -> int:
    """The step whose value is the best, of equals the first."""
    return min(values, key=lambda step: (-values[step] if more_is_better else values[step], step))


def no_better(values: Mapping[int, float], more_is_better: bool, patience: int | None) -> bool:
    """Whether the last `patience` looks brought nothing better than what was there before them."""
    if patience is None or not values:
        return False
    best = best_look(values, more_is_better)
    return sum(step > best for step in values) >= patience


def divide(
    batch: Sequence[int], examples: Sequence[Example], num_workers: int, row_tokens: int, packed: bool
) -> list[list[list[int]]]:
    """The batch as [worker][row] lists of example numbers: as many rows for every worker, some perhaps empty.

    Workers compute in lockstep (ZeRO-3 gathers weights in every forward pass), so the counts of rows must agree. Long
    and short examples are dealt in turn, so that all workers have about as much to do.
    """
    by_length = sorted(batch, key=lambda i: (-examples[i].length, i))
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    for place, example in enumerate(by_length):
        turn, worker = divmod(place, num_workers)
        shares[worker if turn % 2 == 0 else num_workers - 1 - worker].append(example)
    divided = [_rows(share, examples, row_tokens, packed) for share in shares]
    longest = max(len(rows) for rows in divided)
    return [rows + [[]] * (longest - len(rows)) for rows in divided]


def _rows(share: Sequence[int], examples: Sequence[Example], row_tokens: int, packed: bool) -> list[list[int]]:
    """Neighbours of like language pair and length together, as many as stay within `row_tokens`; one at the least.

    Where they are padded, a row takes no example that would make more of it than `MOST_PADDING` padding.
    """
    rows: list[list[int]] = []
    for index in sorted(share, key=lambda i: (examples[i].pair, examples[i].length, i)):
        longer = [examples[i] for i in (*(rows[-1] if rows else ()), index)]
        whole = size(longer, packed)
        if rows and whole <= row_tokens and padding(longer, packed) <= MOST_PADDING * whole:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


def size(examples: Sequence[Example], packed: bool) -> int:
    """Tokens that a row of these examples is computed on, padding included."""
    if not examples:
        return 0
    return packed_length(examples) if packed else len(examples) * max(example.length for example in examples)


def padding(examples: Sequence[Example], packed: bool) -> int:
    """How many of them are padding; a packed row has none."""
    return 0 if packed else size(examples, False) - sum(example.length for example in examples)


def learning_rate(step: int, num_steps: int, peak: float, warmup: float, schedule: str) -> float:
    """Of optimiser step `step` (from 1): up over the first `warmup` share of the steps, then as `schedule` says.

    `linear` and `cosine` come down to nothing right after the last step.
    """
    rising = math.ceil(warmup * num_steps)
    if step <= rising:
        return peak * step / rising
    if schedule == "constant":
        return peak
    gone = (step - rising - 1) / max(1, num_steps - rising)
    return peak * ((1 - gone) if schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2)
