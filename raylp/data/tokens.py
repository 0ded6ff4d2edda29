"""Sentence pairs as tokens: what a model is given, and what it should say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt


@dataclass(frozen=True)
class Example:
    """Token ids: `prompt` is given, `target` is scored or learned. Prompts of a language pair `pair` begin alike."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    pair: str = ""

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
