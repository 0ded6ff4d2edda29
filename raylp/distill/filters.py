"""Which teacher translations are fit to learn from. Every rejected row keeps the first reason, in a fixed order."""

import hashlib
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from raylp.data.corpus import Pair
from raylp.data.languages import split_pair
from raylp.data.splits import sentence_hash
from raylp.distill.config import Filters
from raylp.metrics.ngram import metric

# Short strings vary much in relative length ("OK", "Abbrechen"): so many characters are added to both sides.
SLACK = 5
LEAST_TO_IDENTIFY = 30  # characters; of shorter texts a language cannot be told
NEAR_AT_LEAST = 20  # characters; shorter texts are alike by chance


@dataclass(frozen=True)
class Row:
    """A teacher translation. `finish`: `stop`, `length`, `loop`, or `error`: then `translation` says what was wrong.

    `reference` is empty where there is none; `said` is the translation as it was generated, before lines were joined.
    """

    pair: str
    source: str
    reference: str
    translation: str
    finish: str
    said: str = ""


@dataclass
class HeldOut:
    """Sentences of the other splits, both sides: `hashes` with their language pair, `texts` by it."""

    hashes: set[tuple[str, str]] = field(default_factory=set)
    texts: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> "HeldOut":
        found = cls()
        for pair in pairs:
            for text in (pair.source, pair.target):
                found.hashes.add((pair.pair, sentence_hash(text)))
                if len(text) >= NEAR_AT_LEAST:
                    found.texts.setdefault(pair.pair, []).append(text.casefold())
        return found

    def has(self, pair: str, text: str) -> bool:
        """Whether it is one of them, but for case, width, blanks and punctuation."""
        return (pair, sentence_hash(text)) in self.hashes

    def nearly_has(self, pair: str, text: str, limit: float) -> bool:
        """Whether it shares more than `limit` of its characters, in order, with one of them."""
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        if len(text) < NEAR_AT_LEAST:
            return False
        near = process.extractOne(
            text.casefold(), self.texts.get(pair, []), scorer=Indel.normalized_similarity, score_cutoff=limit
        )
        return near is not None


class Judge:
    """Says of rows, in the order they come, whether they are kept. It remembers a hash of each, for duplicates.

    `usual`: of `usual_length_ratios`. `similarity` and `comet`: scores of (source, translation, reference) rows by a
    model, where the recipe asks for it.
    """

    def __init__(
        self,
        filters: Filters,
        usual: Mapping[str, float],
        held_out: HeldOut,
        similarity: Callable[[Sequence[Row]], Sequence[float]] | None = None,
        comet: Callable[[Sequence[Row]], Sequence[float]] | None = None,
    ) -> None:
        self.filters, self.usual, self.held_out = filters, usual, held_out
        self.similarity, self.comet = similarity, comet
        self.seen: set[bytes] = set()
        self.taken: dict[str, int] = dict.fromkeys(self.names(), 0)

    def names(self) -> list[str]:
        """The reasons there may be, in order; those that are turned off are not among them."""
        return ["failed", *(name for name, on, _ in CHECKS if on(self.filters)), *self._models()]

    def _models(self) -> list[str]:
        f = self.filters
        own = (("embedding similarity", f.min_embedding_similarity), ("COMET", f.min_comet))
        return [name for name, limit in own if limit is not False]

    def reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """Why each is rejected, None where it is kept."""
        found = [self._alone(row) for row in rows]
        for name, scores, limit in (
            ("embedding similarity", self.similarity, self.filters.min_embedding_similarity),
            ("COMET", self.comet, self.filters.min_comet),
        ):
            left = [i for i, reason in enumerate(found) if reason is None]
            if limit is not False and scores is not None and left:
                for i, score in zip(left, scores([rows[i] for i in left]), strict=True):
                    found[i] = name if score < limit else None
        for reason in found:
            if reason is not None:
                self.taken[reason] += 1
        return found

    def _alone(self, row: Row) -> str | None:
        if row.finish == "error":
            return "failed"
        return next((name for name, on, fails in CHECKS if on(self.filters) and fails(self, row)), None)

    def is_duplicate(self, row: Row) -> bool:
        """Whether a row like it was there before; it is remembered."""
        key = hashlib.blake2b("\0".join((row.pair, row.source, row.translation)).encode(), digest_size=8).digest()
        there = key in self.seen
        self.seen.add(key)
        return there

    def unusual_length(self, row: Row) -> bool:
        """Whether it is much longer or shorter than its source lets expect; not where nothing is known of the pair."""
        if row.pair not in self.usual:
            return False
        expected = len(row.source) * self.usual[row.pair]
        ratio = (len(row.translation) + SLACK) / (expected + SLACK)
        return max(ratio, 1 / ratio) > self.filters.max_length_ratio

    def held(self, row: Row) -> bool:
        """Whether source or translation is in another split."""
        return any(self.held_out.has(row.pair, text) for text in (row.source, row.translation))

    def nearly_held(self, row: Row) -> bool:
        """Whether source or translation is nearly a sentence of another split."""
        limit = float(self.filters.max_similarity_to_held_out)
        return any(self.held_out.nearly_has(row.pair, text, limit) for text in (row.source, row.translation))

    def foreign(self, text: str, pair: str, side: int) -> bool:
        """Whether the text is not of the language of this side of the pair: 0 source, 1 target."""
        return foreign(text, split_pair(pair)[side], float(self.filters.language))

    def copies(self, row: Row) -> bool:
        """Whether it repeats its source."""
        return is_copy(row.translation, row.source, row.reference, float(self.filters.max_similarity_to_source))

    def far(self, row: Row) -> bool:
        """Whether it shares little with its reference, where there is one."""
        return bool(row.reference) and chrf(row.translation, row.reference) < self.filters.min_chrf_to_reference


LINE_BREAK = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")

# The order of the published filters, then those of translations by a model: reason, whether on, whether a row has it.
CHECKS: tuple[tuple[str, Callable[[Filters], bool], Callable[[Judge, Row], bool]], ...] = (
    ("duplicate", lambda f: f.duplicates, Judge.is_duplicate),
    ("empty", lambda f: f.empty, lambda judge, row: not row.translation.strip()),
    ("newline", lambda f: f.newlines, lambda judge, row: bool(LINE_BREAK.search(as_said(row)))),
    ("control characters", lambda f: f.control_characters, lambda judge, row: any(map(_is_control, as_said(row)))),
    ("repetition", lambda f: f.loops, lambda judge, row: row.finish == "loop"),
    ("not stopped", lambda f: f.cut_off, lambda judge, row: row.finish == "length"),
    (
        "too long",
        lambda f: f.max_words is not False,
        lambda judge, row: len(row.translation.split()) > judge.filters.max_words,
    ),
    ("length ratio", lambda f: f.max_length_ratio is not False, Judge.unusual_length),
    (
        "too short",
        lambda f: f.min_characters is not False,
        lambda judge, row: len(row.translation.strip()) < judge.filters.min_characters,
    ),
    ("source language", lambda f: f.language is not False, lambda judge, row: judge.foreign(row.source, row.pair, 0)),
    (
        "target language",
        lambda f: f.language is not False,
        lambda judge, row: judge.foreign(row.translation, row.pair, 1),
    ),
    ("copy of the source", lambda f: f.max_similarity_to_source is not False, Judge.copies),
    ("in another split", lambda f: True, Judge.held),
    ("near another split", lambda f: f.max_similarity_to_held_out is not False, Judge.nearly_held),
    ("far from the reference", lambda f: f.min_chrf_to_reference is not False, Judge.far),
)


def as_said(row: Row) -> str:
    """The translation with its line breaks, where they are known."""
    return row.said.strip() or row.translation


def _is_control(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and not LINE_BREAK.match(character)
    return control or character == "\ufffd"


def usual_length_ratios(pairs: Iterable[Pair]) -> dict[str, float]:
    """By language pair, how long a reference usually is for its source, in characters: the median ratio.

    German takes more characters than English and Chinese a third, so lengths are judged by this and not by equality.
    """
    ratios: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.source and pair.target:
            ratios.setdefault(pair.pair, []).append(len(pair.target) / len(pair.source))
    return {pair: statistics.median(values) for pair, values in ratios.items()}


def foreign(text: str, language: str, least: float) -> bool:
    """Whether the text is long enough to tell its language, and is of `language` with less than this probability.

    Languages that the identifier does not know are never foreign.
    """
    code = language.partition("_")[0]
    identifier, known = _identifier()
    wanted = _CODES.get(code, frozenset({code})) & known
    if len(text) < LEAST_TO_IDENTIFY or not wanted:
        return False
    return sum(share for name, share in identifier.rank(text) if name in wanted) < least


# Languages that the identifier has under other codes, or splits where what is written lies in between.
_ARABIC = frozenset({"ar", "arz", "ary"})
_CODES = {
    **{code: _ARABIC for code in ("ar", "ara", "arz", "ary", "apc", "ars")},
    **{ours: frozenset({its}) for ours, its in (("ces", "cs"), ("deu", "de"), ("eng", "en"), ("zho", "zh"))},
    **{code: frozenset({"no", "nb", "nn"}) for code in ("no", "nb", "nob")},
}


@cache
def _identifier() -> tuple[Any, frozenset[str]]:
    """A language identifier with its model inside the package, and the codes that it knows."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier, frozenset(identifier.nb_classes)


def is_copy(text: str, source: str, reference: str, limit: float) -> bool:
    """Whether the text is more like the source than `limit`, and the reference is not: names and numbers are copied."""
    return alike(text, source, limit) and not (reference and alike(reference, source, limit))


def alike(a: str, b: str, limit: float) -> bool:
    """Whether more than this share of the characters, 0 to 1, is common and in order."""
    from rapidfuzz.distance import Indel

    return Indel.normalized_similarity(a.casefold(), b.casefold()) > limit


def chrf(text: str, reference: str) -> float:
    """chrF2++ of one sentence, 0 to 100."""
    scorer = metric("chrF2++")
    return scorer.score(scorer.statistics([text], [reference])[0])
