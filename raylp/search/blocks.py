"""The search sentences in blocks: the unit of work and of the ledger."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt
from raylp.generate.base import Request
from raylp.ledger import block_hash


@dataclass(frozen=True)
class Block:
    """Sentences of one language pair. `hash`: of all that is asked and what it is held against.

    `targets`: the references as the tokens a model should say, end included.
    """

    pair: str
    sources: tuple[str, ...]
    references: tuple[str, ...]
    requests: tuple[Request, ...]
    targets: tuple[tuple[int, ...], ...]
    hash: str

    def __len__(self) -> int:
        return len(self.sources)


def make_blocks(examples: Sequence[Pair], prompt: Prompt, tokenizer: Any, size: int) -> list[Block]:
    """Blocks of `size` sentences, the last of a pair maybe smaller; those of several pairs take turns.

    Sentences are shuffled, by a hash of their text: neighbours in a file are often alike, and a race judges by its
    first blocks what the rest will be like.
    """
    mixed = sorted(examples, key=_shuffled)
    asked = prompt.requests(tokenizer, [(example.source, example.pair) for example in mixed])  # some bounds are of all
    by_pair: dict[str, list[list[tuple[Pair, Request]]]] = {}
    for pair in dict.fromkeys(example.pair for example in examples):
        own = [(example, request) for example, request in zip(mixed, asked, strict=True) if example.pair == pair]
        by_pair[pair] = [own[start : start + size] for start in range(0, len(own), size)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_pair.values()))
    blocks = []
    for turn in turns:
        if turn is None:
            continue
        part, requests = zip(*turn, strict=True)
        references = tuple(example.target for example in part)
        blocks.append(
            Block(
                part[0].pair,
                tuple(example.source for example in part),
                references,
                tuple(requests),
                tuple(tuple(prompt.target_tokens(tokenizer, text)) for text in references),
                block_hash(requests, references),
            )
        )
    return blocks


def _shuffled(example: Pair) -> str:
    return hashlib.sha256(f"{example.source}\t{example.target}".encode()).hexdigest()
