"""Healing: rows that share a prompt, shares that add up, and training through Ray Train and DeepSpeed."""

import json
import math
import random
from pathlib import Path

import pytest
import toy
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt
from raylp.heal import plan
from raylp.heal.config import Heal
from raylp.heal.examples import choose, tokenise
from raylp.heal.pack import Example, loss_sum, pack, packed_inputs, packed_length
from raylp.models.load import load_model, load_tokenizer
from raylp.models.stack import text_config

# Longer than the tiny models' sliding windows, so that a window by place instead of position would show.
PREFIX = tuple(range(20, 44))


def random_examples(count: int, seed: int = 0, pairs: int = 2) -> list[Example]:
    """Prompts of a language pair begin alike, and differ in length."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        pair = number % pairs
        prompt = (1, 10 + pair, *PREFIX, *(rng.randrange(20, 200) for _ in range(rng.randrange(1, 12))))
        examples.append(Example(f"en-{pair}", prompt, tuple(rng.randrange(20, 200) for _ in range(rng.randrange(1, 9)))))
    return examples


def loss_alone(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """The plain way: the whole text through the model, cross-entropy of the target's tokens."""
    tokens = torch.tensor([(*example.prompt, *example.target)])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(example.target), reduction="sum")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gemma3", "cohere2"])
def test_packing_changes_neither_loss_nor_gradient(kind: str) -> None:
    model = load_model(toy.tiny_random(kind), "float32").double()
    watched = [p for name, p in model.named_parameters() if "q_proj" in name or "down_proj" in name or "norm" in name]
    watched = [p.requires_grad_(True) for p in watched]
    examples = random_examples(6)
    apart = sum(loss_alone(model, example) for example in examples)
    wanted = torch.autograd.grad(apart, watched, allow_unused=True)
    for packed in (True, False):
        loss = loss_sum(model, examples, text_config(model), packed)
        assert loss.item() == pytest.approx(apart.item(), rel=1e-9)
        for found, right in zip(torch.autograd.grad(loss, watched, allow_unused=True), wanted, strict=True):
            assert (found is None) == (right is None)
            if found is not None:
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)  # norms are float32


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "cohere2", "mixtral", "phi3", "gpt2", "opt"])
def test_packing_is_exact_in_float32(kind: str) -> None:
    model = load_model(toy.tiny_random(kind), "float32")
    examples = random_examples(5)
    with torch.no_grad():
        apart = sum(loss_alone(model, example) for example in examples).item()
        packed = loss_sum(model, examples, text_config(model), True).item()
    assert packed == pytest.approx(apart, rel=1e-5)
