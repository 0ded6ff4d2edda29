"""Which teacher translations are fit to learn from. Every rejected row keeps the first reason found."""

import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from difflib import SequenceMatcher

from raylp.data.splits import sentence_hash
from raylp.distill.config import Filters
from raylp.metrics.ngram import metric

# Short strings vary much in relative length ("OK", "Abbrechen"): so many characters are added to both sides.
SLACK = 5


@dataclass(frozen=True)
class Row:
    """A teacher translation. `finish`: `stop`, `length`, `loop`, or `error`: then `translation` says what was wrong."""

    pair: str
    source: str
    reference: str
    translation: str
    finish: str


def reasons(rows: Sequence[Row], held_out: AbstractSet[tuple[str, str]], filters: Filters) -> list[str | None]:
    """Why each row is rejected, None where it is kept; of duplicates the first stays.

    `held_out`: (language pair, `sentence_hash`) of sources and targets of the other splits.
    """
    usual = usual_length_ratios(rows)
    seen: set[tuple[str, str, str]] = set()
    found = []
    for row in rows:
        reason = reason_alone(row, usual.get(row.pair, 1.0), held_out, filters)
        key = (row.pair, row.source, row.translation)
        if reason is None and key in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(key)
        found.append(reason)
    return found


def usual_length_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """By language pair, how long a reference usually is for its source, in characters: the median ratio.

    German takes more characters than English and Chinese a third, so lengths are judged by this and not by equality.
    """
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.source and row.reference:
            ratios.setdefault(row.pair, []).append(len(row.reference) / len(row.source))
    return {pair: statistics.median(values) for pair, values in ratios.items()}


def reason_alone(row: Row, usual: float, held_out: AbstractSet[tuple[str, str]], filters: Filters) -> str | None:
    """Why the row is rejected whatever the others are, or None. `usual`: of `usual_length_ratios`."""
    text = row.translation
    if row.finish == "error":
        return "failed"
    if not text.strip():
        return "empty"
    if row.finish != "stop":
        return "not stopped"
    if any(unicodedata.category(character) == "Cc" or character in "\u2028\u2029\ufffd" for character in text):
        return "control characters"
    if len(text.split()) > filters.max_words:
        return "too long"
    if len(text.strip()) < filters.min_characters:
        return "too short"
    ratio = (len(text) + SLACK) / (len(row.source) * usual + SLACK)
    if max(ratio, 1 / ratio) > filters.max_length_ratio:
        return "length ratio"
    if is_copy(text, row.source, row.reference, filters.max_similarity_to_source):
        return "copy of the source"
    if (row.pair, sentence_hash(row.source)) in held_out or (row.pair, sentence_hash(text)) in held_out:
        return "in another split"
    if filters.min_chrf_to_reference > 0 and chrf(text, row.reference) < filters.min_chrf_to_reference:
        return "far from the reference"
    return None


def is_copy(text: str, source: str, reference: str, limit: float) -> bool:
    """Whether the text is more like the source than `limit`, and the reference is not: names and numbers are copied."""
    return alike(text, source, limit) and not alike(reference, source, limit)


def alike(a: str, b: str, limit: float) -> bool:
    """Whether more than this share of the characters, 0 to 1, is common and in order (Ratcliff and Obershelp)."""
    matcher = SequenceMatcher(None, a.casefold(), b.casefold(), autojunk=False)
    # The first two are cheap upper bounds of the third.
    return matcher.real_quick_ratio() > limit and matcher.quick_ratio() > limit and matcher.ratio() > limit


def chrf(text: str, reference: str) -> float:
    """chrF2++ of one sentence, 0 to 100."""
    scorer = metric("chrF2++")
    return scorer.score(scorer.statistics([text], [reference])[0])


def counts(found: Sequence[str | None]) -> Mapping[str, int]:
    """How many rows have each reason, the most frequent first; `kept` before them."""
    kept = sum(reason is None for reason in found)
    rejected = [reason for reason in found if reason is not None]
    order = sorted(set(rejected), key=lambda reason: (-rejected.count(reason), reason))
    return {"kept": kept, **{reason: rejected.count(reason) for reason in order}}
