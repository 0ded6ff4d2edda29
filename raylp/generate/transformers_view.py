"""Greedy generation by transformers, on the model in memory or a view of it without some layers.

Six things make it quick: the prompts' common beginning is computed once for the whole call; batches hold prompts of
like length, as many as memory allows, and rows of different views; rows leave the batch when they end; rows that ramble
or repeat themselves are stopped; and a draft of the output is checked several tokens at a time instead of being
generated one by one.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from raylp.generate.base import Asked, Output, Request, StopRule, common_prefix, continuation, stop_rule, to_output
from raylp.generate.batches import batches
from raylp.models.load import keeps_keys, kv_per_token
from raylp.models.stack import find_stack, text_config
from raylp.models.view import ByRow, check_removed, runs_by_row, without_layers_by_row

# Tokens of all rows that one forward may take to check drafts; 1: drafts are left aside. On a CPU more tokens cost more
# time, which a pruned model's agreements with the whole one do not bring in (Gemma 3 270M: from 13% less to 25% more).
# A data-centre GPU computes 200 to 300 tokens in the time in which it reads its weights.
STEP_TOKENS = {"cpu": 1, "cuda": 256}
# A step reads the weights once for all rows, and lasts for the longest. Gemma 3 270M on two cores: 16 views of 16
# sentences take 2.3 times as long in batches of 16 as in batches of 128; 256 bring little more.
ROWS = {"cpu": 128, "cuda": 256}
MEMORY_SHARE = 0.8  # of a GPU, for weights and caches together
CPU_CACHE_BYTES = 0.75e9  # for keys and values of a batch


class TransformersGenerator:
    """See `raylp.generate.base.Generator`.

    `batch_size`: rows at a time at most, as far as memory allows (default: 128 on a CPU, 256 on a GPU).
    `step_tokens`: tokens of all rows that one forward may take to check drafts (default: 256 on a GPU, none on a CPU).
    `gpu_share`: of the GPU, where models share it.
    """

    backend = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        newline: bool = True,
        batch_size: int | None = None,
        step_tokens: int | None = None,
        gpu_share: float = 1.0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.newline = newline
        kind = model.device.type
        self.batch_size = batch_size or ROWS.get(kind, ROWS["cpu"])
        self.step_tokens = step_tokens or STEP_TOKENS.get(kind, STEP_TOKENS["cpu"])
        self.max_slots = _max_slots(model, gpu_share)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.rule = stop_rule(tokenizer, [text_config(model), model.generation_config], newline)
        # The last position of several rows is a strided view, which torch projects row by row, reading the whole
        # vocabulary matrix for each (4 times slower for 16 rows and 262,144 words); contiguous rows are one product.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def generate(
        self,
        requests: Sequence[Request],
        removed: Sequence[int] = (),
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Output]:
        return self.generate_together([(requests, removed, drafts)])[0]

    def generate_together(self, asked: Sequence[Asked]) -> list[list[Output]]:
        """What `generate` gives for each of `asked`, but for what rounding does to a near-tie: views share batches."""
        if len(asked) > 1 and not self._by_row:
            return [self.generate(*one) for one in asked]
        import torch

        requests = [request for own, _, _ in asked for request in own]
        drafts = [draft for own, _, given in asked for draft in _drafts(own, given)]
        num_layers = find_stack(self.model).num_layers
        sets = [frozenset(check_removed(removed, num_layers)) for _, removed, _ in asked]
        gone = frozenset.intersection(*sets)
        kept = [layer for layer in range(num_layers) if layer not in gone]
        # By request, what its view goes without beyond what all do, as places in the view they share.
        skips = [
            frozenset(kept.index(layer) for layer in own - gone)
            for own, (its, _, _) in zip(sets, asked, strict=True)
            for _ in its
        ]
        # The prompts' common beginning is computed once for each view, and stays beside every batch.
        beginning = self._beginning(requests)
        room = self.max_slots - len(set(skips)) * len(beginning)
        if len(asked) > 1 and room < self.max_slots // 2:
            return [self.generate(*one) for one in asked]
        outputs: dict[int, Output] = {}
        further = sorted(frozenset().union(*skips))
        with torch.inference_mode(), without_layers_by_row(self.model, gone, further) as by_row:
            prefix = _Prefix(self.model, by_row, beginning, skips)
            for batch in batches(requests, self.batch_size, max(1, room)):
                by_row.assign([skips[i] for i in batch])
                chosen, given = [requests[i] for i in batch], [drafts[i] for i in batch]
                of = [prefix.variants[skips[i]] for i in batch]
                made = _greedy(self.model, by_row, prefix, of, chosen, given, self.rule, self.step_tokens)
                for i, (row, finish) in zip(batch, made, strict=True):
                    outputs[i] = to_output(self.tokenizer, row, finish, self.newline)
        every = iter(range(len(requests)))
        return [[outputs[next(every)] for _ in own] for own, _, _ in asked]

    def forget(self) -> None:
        """Nothing is remembered from call to call."""

    def _beginning(self, requests: Sequence[Request]) -> tuple[int, ...]:
        """The tokens that all prompts begin with; none where a sliding cache would drop the first of them."""
        if len(requests) < 2:
            return ()
        length = common_prefix([request.tokens for request in requests])
        window = getattr(text_config(self.model), "sliding_window", None)
        return requests[0].tokens[:length] if window is None or length < window else ()

    @cached_property
    def _by_row(self) -> bool:
        """Whether rows of one batch may run different layers."""
        return _rewinds(self.model) and runs_by_row(self.model)


def _drafts(requests: Sequence[Request], drafts: Sequence[Sequence[int]] | None) -> Sequence[Sequence[int]]:
    if drafts is not None and len(drafts) != len(requests):
        raise ValueError(f"{len(drafts)} drafts for {len(requests)} requests")
    return drafts if drafts is not None else [()] * len(requests)


def _max_slots(model: Any, share: float) -> int:
    """Slots (rows x tokens) whose keys and values fit into a GPU beside the weights, or into a CPU's share.

    Counted from the whole of the GPU's memory, not from what is free: equal machines then make equal batches.
    """
    slot = kv_per_token(text_config(model)) * model.dtype.itemsize
    if model.device.type != "cuda":
        return max(1, int(CPU_CACHE_BYTES // slot))
    import torch

    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    room = share * MEMORY_SHARE * sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(1, int((room - weights) // slot))


def _new_cache(model: Any, rewindable: bool) -> Any:
    """An empty cache for the view that is active. A rewindable one keeps what sliding windows have left behind."""
    from transformers import DynamicCache

    return DynamicCache() if rewindable else DynamicCache(config=model.config)


def _rewinds(model: Any) -> bool:
    """Whether tokens can be taken back: every layer keeps keys and values, and its mask is a plain or sliding one."""
    chunked = "chunked_attention" in (getattr(text_config(model), "layer_types", None) or ())
    return not chunked and keeps_keys(_new_cache(model, False))


class _Prefix:
    """Keys and values of the tokens that all prompts begin with, computed once: a row for each set of `skips`."""

    def __init__(self, model: Any, by_row: ByRow, beginning: tuple[int, ...], skips: Sequence[frozenset[int]]) -> None:
        self.variants = {own: number for number, own in enumerate(dict.fromkeys(skips))}
        self.length = len(beginning)
        self.layers: list[tuple[Any, Any]] = []
        if not beginning:
            return
        import torch

        cache = _new_cache(model, False)
        tokens = torch.tensor([beginning] * len(self.variants), device=model.device)
        by_row.assign(list(self.variants))
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.rows = dict(by_row.rows)

    def fill(self, cache: Any, by_row: ByRow, variants: Sequence[int], padding: list[int]) -> None:
        """Fills `cache` with `self.length` slots for rows that are padded on the left by `padding` tokens each.

        Row r, of the set `variants[r]`, holds `padding[r]` empty slots and then the prefix without its last
        `padding[r]` tokens: what is missing is computed again with the rest of the prompt, so that all rows are as long
        as the longest.
        """
        import torch

        for place, (keys, values) in enumerate(self.layers):
            rows = by_row.rows.get(place, range(len(padding)))
            there = {variant: i for i, variant in enumerate(self.rows.get(place, range(len(keys))))}
            # An idle layer is filled with whatever it has.
            chosen = [(there.get(variants[row], 0), padding[row]) for row in rows]
            cache.update(
                torch.cat([_shift(keys[i : i + 1], count) for i, count in chosen]),
                torch.cat([_shift(values[i : i + 1], count) for i, count in chosen]),
                place,
            )


def _shift(states: Any, count: int) -> Any:
    """(1, heads, length, size) moved `count` slots to the right; zeros come in, the end falls off."""
    import torch

    return torch.nn.functional.pad(states[:, :, : states.shape[2] - count], (0, 0, count, 0))


def _realign(cache: Any, by_row: ByRow, rows: list[int], ends: list[int], lengths: list[int]) -> None:
    """Keeps the rows `rows` of the batch; each ends at slot `ends` (exclusive) and holds `lengths` tokens before it.

    What lies behind a row's end is dropped and the row moved right, so that all rows end together again and padding is
    on the left only: positions and sliding windows are those of a single sentence.
    """
    import torch

    width = max(lengths)
    slots = (torch.tensor(ends)[:, None] - width + torch.arange(width)).clamp(min=0)
    chosen = by_row.keep(rows)
    for place, layer in enumerate(cache.layers):
        held, own = chosen.get(place, rows), by_row.rows.get(place)
        rows_here = torch.tensor(held, device=layer.keys.device)[:, None]
        slots_here = (slots if own is None else slots[own]).to(layer.keys.device)
        layer.keys = layer.keys[rows_here, :, slots_here].transpose(1, 2)
        layer.values = layer.values[rows_here, :, slots_here].transpose(1, 2)


def _greedy(
    model: Any,
    by_row: ByRow,
    prefix: _Prefix,
    variants: Sequence[int],
    requests: list[Request],
    drafts: list[Sequence[int]],
    rule: StopRule,
    step_tokens: int,
) -> list[tuple[tuple[int, ...], str]]:
    """Tokens and why they end, for each request of one batch; `variants`: which row of the prefix is each one's.

    A step feeds every row its last token and what its draft says next, and takes from the row the tokens that the model
    says itself: the draft's as far as they are the same, and one more. So drafts change the time, not the tokens.
    """
    import torch

    drafted = step_tokens > 1 and any(drafts) and _rewinds(model)
    longest = max(len(request.tokens) for request in requests)
    padding = [longest - len(request.tokens) for request in requests]
    shared = prefix.length if max(padding) < prefix.length else 0
    cache = _new_cache(model, drafted)
    if shared:
        prefix.fill(cache, by_row, variants, padding)
    device = model.device
    alive = list(range(len(requests)))
    generated: list[list[int]] = [[] for _ in requests]
    finish = ["length"] * len(requests)
    # What each living row is fed: the rest of its prompt at first, its last token later; `known` slots are before.
    feed = [([0] * count + list(r.tokens))[shared:] for count, r in zip(padding, requests, strict=True)]
    known = shared
    while alive:
        proposed: list[list[int]] = [[] for _ in alive]
        if drafted:
            most = step_tokens // len(alive) - 1
            proposed = [
                continuation(drafts[row], generated[row], min(most, _left(requests[row], generated[row]) - 1))
                for row in alive
            ]
        width = max(map(len, proposed))
        # The shorter proposals are filled up; what comes of the filling is not looked at.
        inputs = [fed + more + [0] * (width - len(more)) for fed, more in zip(feed, proposed, strict=True)]
        lengths = [len(requests[row].tokens) + len(generated[row]) for row in alive]
        total = known + len(feed[0])
        empty = torch.tensor([total - length for length in lengths])[:, None]
        slots = torch.arange(total + width)
        ends = torch.tensor([length + len(more) for length, more in zip(lengths, proposed, strict=True)])[:, None]
        positions = (slots - empty).clamp(min=0).minimum(ends - 1)
        logits = model(
            input_ids=torch.tensor(inputs, device=device),
            attention_mask=(slots >= empty).long().to(device),
            position_ids=positions[:, known:].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=width + 1,
        ).logits[:, -width - 1 :]
        chosen = logits.argmax(-1).tolist()
        going, taken = [], []
        for slot, row in enumerate(alive):
            count = _take(chosen[slot], proposed[slot], generated[row], rule)
            reason = rule.finished(generated[row])
            if reason:
                finish[row] = reason
            elif _left(requests[row], generated[row]) > 0:
                going.append(slot)
                taken.append(count)
        if not going:
            break
        alive = [alive[slot] for slot in going]
        feed = [[generated[row][-1]] for row in alive]
        known = total + width
        if width:
            lengths = [lengths[slot] + count - 1 for slot, count in zip(going, taken, strict=True)]
            _realign(cache, by_row, going, [total + count - 1 for count in taken], lengths)
            known = max(lengths)
        elif len(going) < len(inputs):
            chosen_rows = by_row.keep(going)
            for place, layer in enumerate(cache.layers):
                layer.batch_select_indices(torch.tensor(chosen_rows.get(place, going), device=layer.keys.device))
    return [(tuple(tokens), reason) for tokens, reason in zip(generated, finish, strict=True)]


def _left(request: Request, tokens: list[int]) -> int:
    """How many tokens may still follow."""
    return request.max_new_tokens - len(tokens)


def _take(chosen: list[int], proposed: list[int], tokens: list[int], rule: StopRule) -> int:
    """Appends to `tokens` what the model says, as far as it was asked the right question; how many that are.

    `chosen[k]` is what it says after the first k proposed tokens.
    """
    for count, token in enumerate(chosen, start=1):
        tokens.append(token)
        if rule.finished(tokens) or count > len(proposed) or token != proposed[count - 1]:
            return count
    return len(chosen)
