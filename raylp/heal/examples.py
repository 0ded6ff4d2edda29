"""What a model is healed on: which pairs, and as which tokens. The same for every model of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt
from raylp.data.splits import sentence_hash
from raylp.data.tokens import Example, examples_of


def choose(
    authentic: Sequence[Pair], teacher: Sequence[Mapping[str, Any]], data: str, shown: Mapping[str, Sequence[Any]]
) -> list[Pair]:
    """Pairs to learn from, in a fixed order, each (source, target) once.

    `teacher`: rows of `distill/teacher.parquet`; those not kept are left out. `data`: `authentic`, `teacher` or `both`.
    `shown`: the prompt's examples by language pair; a sentence that stands in the prompt would teach copying.
    """
    told = {(pair, sentence_hash(source)) for pair, examples in shown.items() for source, _ in examples}
    found: list[Pair] = []
    if data in ("authentic", "both"):
        found += authentic
    if data in ("teacher", "both"):
        kept = [row for row in teacher if row["kept"]]
        found += [Pair(f"teacher:{row['id']}", row["source"], row["translation"], row["pair"]) for row in kept]
    chosen: dict[tuple[str, str, str], Pair] = {}
    for example in found:
        if (example.pair, sentence_hash(example.source)) not in told:
            chosen.setdefault((example.pair, example.source, example.target), example)
    return list(chosen.values())


def tokenise(pairs: Sequence[Pair], prompt: Prompt, tokenizer: Any, max_tokens: int) -> list[Example]:
    """Prompts and targets as token ids; examples of more than `max_tokens` tokens are left out, never cut."""
    examples = examples_of(pairs, prompt, tokenizer)
    return [example for example in examples if example.length <= max_tokens]
