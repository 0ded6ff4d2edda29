"""What a model is healed on: which pairs, and as which tokens. The same for every model of a run."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raylp.data.corpus import Pair
from raylp.data.prompt import Prompt
from raylp.data.splits import sentence_hash
from raylp.data.tokens import Example, Top, examples_of

TEACHER = "teacher:"  # before the id of a pair whose target is a teacher's


def choose(
    authentic: Sequence[Pair],
    teacher: Sequence[Mapping[str, Any]],
    data: str,
    shown: Mapping[str, Sequence[Any]],
    teacher_share: float | None = None,
    stored: bool = False,
) -> list[Pair]:
    """Pairs to learn from, in a fixed order, each (source, target) once.

    `teacher`: rows of `distill/teacher.parquet`; those not kept are left out. `data`: `authentic`, `teacher` or `both`.
    `shown`: the prompt's examples by language pair; a sentence that stands in the prompt would teach copying.
    `teacher_share`: of the pairs; as many stay as allow it. `stored`: where teacher and reference say the same, it is
    the teacher's, whose probabilities are known.
    """
    told = {(pair, sentence_hash(source)) for pair, examples in shown.items() for source, _ in examples}
    found: list[Pair] = []
    if data in ("authentic", "both"):
        found += authentic
    if data in ("teacher", "both"):
        kept = [row for row in teacher if row["kept"]]
        found += [Pair(f"{TEACHER}{row['id']}", row["source"], row["translation"], row["pair"]) for row in kept]
    chosen: dict[tuple[str, str, str], Pair] = {}
    for example in found:
        if (example.pair, sentence_hash(example.source)) not in told:
            text = example.pair, example.source, example.target
            chosen[text] = example if stored else chosen.get(text, example)
    return mixed(list(chosen.values()), teacher_share) if teacher_share is not None else list(chosen.values())


def mixed(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """As many of `pairs` as can stay for this share of them to be a teacher's; which go is told by a hash."""
    kinds = [[pair for pair in pairs if pair.id.startswith(TEACHER) is taught] for taught in (False, True)]
    whole = min(len(kinds[0]) / (1 - share), len(kinds[1]) / share)
    kept: set[str] = set()
    for kind, part in zip(kinds, (1 - share, share), strict=True):
        order = sorted(kind, key=lambda pair: hashlib.sha256(f"{pair.pair}\0{pair.id}".encode()).digest())
        kept |= {f"{pair.pair}\0{pair.id}" for pair in order[: round(whole * part)]}
    return [pair for pair in pairs if f"{pair.pair}\0{pair.id}" in kept]


def tokenise(
    pairs: Sequence[Pair],
    prompt: Prompt,
    tokenizer: Any,
    max_tokens: int,
    said: Mapping[tuple[str, str], tuple[tuple[int, ...], Top]] | None = None,
) -> list[Example]:
    """Prompts and targets as token ids; examples of more than `max_tokens` tokens are left out, never cut.

    `said`: by (pair, id), targets as a teacher generated them, and what else it might have said at each place.
    """
    examples = examples_of(pairs, prompt, tokenizer)
    for place, pair in enumerate(pairs):
        if said and (pair.pair, pair.id) in said:
            target, top = said[pair.pair, pair.id]
            examples[place] = replace(examples[place], target=target, top=top)
    return [example for example in examples if example.length <= max_tokens]
