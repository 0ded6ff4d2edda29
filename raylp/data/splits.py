"""Four splits with four uses, cut so that no sentence is in two of them."""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from raylp.data.corpus import Pair
from raylp.errors import UserError

SPLITS = ("search", "train", "dev", "test")


def sentence_hash(text: str) -> str:
    """Equal for texts that differ in case, width, blanks and punctuation only; 16 hex digits."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(c if c.isalnum() else " " for c in folded)
    return hashlib.sha256(" ".join(plain.split() or folded.split()).encode()).hexdigest()[:16]


def text_hash(examples: Iterable[Pair]) -> str:
    """SHA-256 of sentence pairs in their order, equal where their `sentence_hash`es are."""
    text = "\n".join(sentence_hash(example.source) + sentence_hash(example.target) for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(splits: Mapping[str, Sequence[Pair]]) -> None:
    """No source sentence, and no source with its target, stands in two splits of one language pair.

    Raises:
        UserError: with the first such sentence and the two places.
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for split, examples in splits.items():
        for example in examples:
            key = (example.pair, sentence_hash(example.source))
            other = seen.setdefault(key, (split, example.id))
            if other[0] != split:
                raise UserError(
                    f"data: the splits overlap: {example.source[:60]!r} is in {other[0]} (id {other[1]}) and in "
                    f"{split} (id {example.id}); remove it from one of them"
                )


def cut(examples: Sequence[Pair], sizes: Mapping[str, int]) -> dict[str, list[Pair]]:
    """Cuts one list into the splits named in `sizes`; what is left over is `train`.

    Where ids read `document:number`, documents stay whole. The order of documents is by the hash of their names, so
    the cut does not change when text is added. A sentence that was already dealt out is left out of later splits.
    """
    documents: dict[str, list[Pair]] = {}
    for example in examples:
        document = example.id.rpartition(":")[0] or sentence_hash(example.source)
        documents.setdefault(document, []).append(example)
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    dealt: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    used: set[str] = set()
    queue = iter(order)
    for split in ("test", "dev", "search", "train"):
        wanted = sizes.get(split, 0) if split != "train" else sizes.get("train", len(examples))
        while len(dealt[split]) < wanted:
            following = next(queue, None)
            if following is None:
                break
            for example in documents[following]:
                key = sentence_hash(example.source)
                if key not in used:
                    used.add(key)
                    dealt[split].append(example)
        if split != "train" and len(dealt[split]) < wanted:
            raise UserError(
                f"data: {len(examples)} pairs are too few for {wanted} in {split}: lower data.*.cut.{split}"
            )
        dealt[split] = dealt[split][:wanted]
    return dealt
