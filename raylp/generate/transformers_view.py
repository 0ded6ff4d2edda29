"""Greedy generation by transformers, on the model in memory or a view of it without some layers.

Four things make it quick: the prompts' common beginning is computed once for the whole call; batches hold prompts of
like length; rows leave the batch when they end; and rows that ramble or repeat themselves are stopped.
"""

from collections.abc import Sequence
from typing import Any

from raylp.generate.base import Output, Request, StopRule, common_prefix, stop_rule, to_output
from raylp.models.stack import text_config
from raylp.models.view import without_layers


class TransformersGenerator:
    """See `raylp.generate.base.Generator`. `batch_size`: rows at a time."""

    backend = "transformers"

    def __init__(self, model: Any, tokenizer: Any, newline: bool = True, batch_size: int = 16) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.newline = newline
        self.batch_size = batch_size
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.rule = stop_rule(tokenizer, [text_config(model), model.generation_config], newline)
        # The last position of several rows is a strided view, which torch projects row by row, reading the whole
        # vocabulary matrix for each (4 times slower for 16 rows and 262,144 words); contiguous rows are one product.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def generate(self, requests: Sequence[Request], removed: Sequence[int] = ()) -> list[Output]:
        import torch

        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].tokens), requests[i].max_new_tokens))
        outputs: dict[int, Output] = {}
        with torch.inference_mode(), without_layers(self.model, removed):
            prefix = _Prefix(self.model, [request.tokens for request in requests])
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                tokens = _greedy(self.model, prefix, [requests[i] for i in batch], self.rule)
                for i, (row, finish) in zip(batch, tokens, strict=True):
                    outputs[i] = to_output(self.tokenizer, row, finish, self.newline)
        return [outputs[i] for i in range(len(requests))]


class _Prefix:
    """Keys and values of the tokens that all prompts begin with, computed once (batch of one)."""

    def __init__(self, model: Any, prompts: list[tuple[int, ...]]) -> None:
        from transformers import DynamicCache

        self.model = model
        self.length = common_prefix(prompts) if len(prompts) > 1 else 0
        self.layers: list[tuple[Any, Any]] = []
        if self.length == 0:
            return
        window = getattr(text_config(model), "sliding_window", None)
        if window is not None and self.length >= window:
            self.length = 0  # a sliding cache would already have dropped its beginning
            return
        import torch

        cache = DynamicCache(config=model.config)
        tokens = torch.tensor([prompts[0][: self.length]], device=model.device)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, padding: list[int]) -> Any:
        """A cache of `self.length` slots for rows that are padded on the left by `padding` tokens each.

        Row r holds `padding[r]` empty slots and then the prefix without its last `padding[r]` tokens: what is missing
        is computed again with the rest of the prompt, so that all rows are as long as the longest.
        """
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(
                torch.cat([_shift(keys, count) for count in padding]),
                torch.cat([_shift(values, count) for count in padding]),
                index,
            )
        return cache


def _shift(states: Any, count: int) -> Any:
    """(1, heads, length, size) moved `count` slots to the right; zeros come in, the end falls off."""
    import torch

    return torch.nn.functional.pad(states[:, :, : states.shape[2] - count], (0, 0, count, 0))


def _greedy(model: Any, prefix: _Prefix, requests: list[Request], rule: StopRule) -> list[tuple[tuple[int, ...], str]]:
    import torch

    longest = max(len(request.tokens) for request in requests)
    padding = [longest - len(request.tokens) for request in requests]
    shared = prefix.length if max(padding) < prefix.length else 0
    rows = [[0] * count + list(request.tokens) for count, request in zip(padding, requests, strict=True)]
    device = model.device
    mask = torch.tensor([[0] * count + [1] * (longest - count) for count in padding], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if shared:
        cache = prefix.cache(padding)
    else:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    inputs = torch.tensor(rows, device=device)[:, shared:]
    position_ids = positions[:, shared:]
    alive = list(range(len(requests)))
    generated: list[list[int]] = [[] for _ in requests]
    finish = ["length"] * len(requests)
    while alive:
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = logits.argmax(-1).tolist()
        going = []
        for slot, (row, token) in enumerate(zip(alive, chosen, strict=True)):
            generated[row].append(token)
            reason = rule.finished(generated[row])
            if reason:
                finish[row] = reason
            elif len(generated[row]) < requests[row].max_new_tokens:
                going.append(slot)
        if not going:
            break
        position_ids = position_ids[:, -1:] + 1
        inputs = torch.tensor(chosen, device=device)[:, None]
        if len(going) < len(alive):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            mask, position_ids, inputs = mask[keep], position_ids[keep], inputs[keep]
            alive = [alive[slot] for slot in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=-1)
    return [(tuple(tokens), reason) for tokens, reason in zip(generated, finish, strict=True)]
