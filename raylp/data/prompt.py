"""How a model is asked for a translation: the same way for every model of a run, and kept beside the weights."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raylp.data.corpus import Pair
from raylp.data.languages import language_name, split_pair
from raylp.errors import UserError
from raylp.generate.base import Request

DEFAULT_TEMPLATE = "{source_language}: {source}\n{target_language}:"
# For every chat template: of a model that may think before it answers, the answer alone. Templates leave out what they
# do not know.
CHAT_OPTIONS = {"enable_thinking": False}


class Bound(BaseModel):
    """The most tokens a translation may have: `ratio` x the source's length + `extra`.

    `of`: the source's `tokens`, its `words`, or `mean_words`, the mean over all sentences asked at once (the published
    search uses 3 x mean_words + 0).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(2.0, gt=0)
    of: Literal["tokens", "words", "mean_words"] = "tokens"
    extra: int = Field(8, ge=0)


class Prompt(BaseModel):
    """A resolved prompt. `template` has the fields {source}, {source_language}, {target_language}; no target.

    Without `chat`, the model goes on from the template with a blank and the target, and ends with a newline; the
    `examples` (per pair: source, target) stand before, in the same form. With `chat`, template and examples become
    turns of the tokenizer's own chat template.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str = DEFAULT_TEMPLATE
    examples: dict[str, list[tuple[str, str]]] = {}
    chat: bool = False
    bound: Bound = Bound()

    def ask(self, source: str, pair: str) -> str:
        """The template filled in."""
        first, second = split_pair(pair)
        try:
            return self.template.format(
                source=source, source_language=language_name(first), target_language=language_name(second)
            )
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"prompt.template: {error} is not a field; use {{source}}, {{source_language}}, {{target_language}}"
            ) from error

    def prompt_tokens(self, tokenizer: Any, source: str, pair: str) -> list[int]:
        """Token ids of all that stands before the translation."""
        shown = self.examples.get(pair, [])
        if self.chat:
            if tokenizer.chat_template is None:
                raise UserError(
                    "prompt.chat is on, but the model's tokenizer has no chat template: set prompt.chat: false"
                )
            turns = []
            for example, translation in shown:
                turns.append({"role": "user", "content": self.ask(example, pair)})
                turns.append({"role": "assistant", "content": translation})
            turns.append({"role": "user", "content": self.ask(source, pair)})
            return list(
                tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False, **CHAT_OPTIONS
                )
            )
        text = "".join(self.ask(example, pair) + " " + translation + "\n" for example, translation in shown)
        return list(tokenizer(text + self.ask(source, pair)).input_ids)

    def target_tokens(self, tokenizer: Any, target: str) -> list[int]:
        """Token ids the model should say after the prompt, the end included."""
        if self.chat:
            return [*tokenizer(target, add_special_tokens=False).input_ids, _end_of_turn(tokenizer)]
        return list(tokenizer(" " + target + "\n", add_special_tokens=False).input_ids)

    def requests(
        self, tokenizer: Any, sources: Sequence[tuple[str, str]], mean_words: float | None = None
    ) -> list[Request]:
        """One request for each (source, pair), bounded by `bound`; `mean_words`: where `sources` are part of more."""
        if self.bound.of == "mean_words" and mean_words is not None:
            lengths = [mean_words] * len(sources)
        else:
            lengths = self._lengths(tokenizer, [source for source, _ in sources])
        return [
            Request(
                tuple(self.prompt_tokens(tokenizer, source, pair)),
                max(1, math.ceil(self.bound.ratio * length) + self.bound.extra),
            )
            for (source, pair), length in zip(sources, lengths, strict=True)
        ]

    def _lengths(self, tokenizer: Any, sources: list[str]) -> list[float]:
        """The length of each source in the unit of `bound`."""
        if self.bound.of == "tokens":
            return [len(tokenizer(source, add_special_tokens=False).input_ids) for source in sources]
        words = [len(source.split()) for source in sources]
        return [sum(words) / len(words)] * len(words) if self.bound.of == "mean_words" else list(words)

    @property
    def newline(self) -> bool:
        """Whether a newline ends a translation."""
        return not self.chat


@functools.lru_cache(maxsize=8)  # asked for every target; listing the added tokens alone takes milliseconds
def _end_of_turn(tokenizer: Any) -> int:
    """The token that the tokenizer's chat template puts behind an answer: where it is no special one, the end of text.

    Of many models the two are not the same: Gemma's turns end with <end_of_turn>, its texts with <eos>.
    """
    said = "raylp"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False, **CHAT_OPTIONS).rpartition(said)[2]
    ids = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else tokenizer.eos_token_id


def choose_examples(train: Sequence[Pair], count: int) -> dict[str, list[tuple[str, str]]]:
    """The first `count` training pairs of every language pair: what the prompt shows is known and can be chosen."""
    chosen: dict[str, list[tuple[str, str]]] = {}
    for example in train:
        shown = chosen.setdefault(example.pair, [])
        if len(shown) < count:
            shown.append((example.source, example.target))
    return chosen if count else {}


def beside_examples(pairs: Sequence[Pair], examples: Mapping[str, Sequence[tuple[str, str]]], count: int) -> list[Pair]:
    """The first `count` pairs that no prompt shows (`examples`), those of several language pairs in turn."""
    shown = {source for own in examples.values() for source, _ in own}
    by_pair: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.source not in shown:
            by_pair.setdefault(pair.pair, []).append(pair)
    turns = itertools.zip_longest(*by_pair.values())
    return [pair for turn in turns for pair in turn if pair is not None][:count]
