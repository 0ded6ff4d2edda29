"""Sentence pairs as tokens: what a model is given, and what it should say."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt


@dataclass(frozen=True)
class Top:
    """A teacher's most probable tokens at every place of a text: `ids` and `logprobs` (nats), both (tokens, k)."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]


@dataclass(frozen=True)
class Example:
    """Token ids: `prompt` is given, `target` is scored or learned. Prompts of a language pair `pair` begin alike.

    `top`: what a teacher would have said at the places of `target`, where that is kept.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    pair: str = ""
    top: Top | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens the model reads; the last one of the target is only predicted."""
        return len(self.prompt) + len(self.target) - 1


def examples_of(pairs: Sequence[Pair], prompt: Prompt, tokenizer: Any) -> list[Example]:
    """Every pair asked as the run's prompt asks, with its reference as the target."""
    return [
        Example(
            tuple(prompt.prompt_tokens(tokenizer, pair.source, pair.pair)),
            tuple(prompt.target_tokens(tokenizer, pair.target)),
            pair.pair,
        )
        for pair in pairs
    ]


def words_of(tokenizer: Any) -> str:
    """A hash of the vocabulary, equal where token ids mean the same; 16 hex digits."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
