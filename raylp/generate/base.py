"""What every backend takes and gives, and the rules for where a translation ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LOOP_REPEATS = 4
LOOP_SPAN = 12
LOOP_PERIOD = 12
VLLM_LENGTH = 1024  # tokens of a prompt and its translation that an engine of vLLM holds, unless it is told otherwise
REJOIN = 2  # tokens in which output and draft must agree for the draft to be believed again


@dataclass(frozen=True)
class Request:
    """`tokens`: the prompt; `max_new_tokens`: how many may follow."""

    tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Output:
    """`text` without prompt, stop and surrounding blanks, on one line; `tokens` as generated, the stop included.

    `finish`: `stop` (a newline or the end token), `length` (the bound was met) or `loop` (it repeated itself).
    """

    text: str
    tokens: tuple[int, ...]
    finish: str


# What one view is asked: the requests, the layers it goes without, and drafts if there are any.
Asked = tuple[Sequence[Request], Sequence[int], Sequence[Sequence[int]] | None]


class Generator(Protocol):
    """A resident model that translates with any of its layers left out.

    `backend`: `transformers` or `vllm`; `dtype`: of weights and activations. Both are part of every score's key.
    `rule`: where translations end.
    """

    backend: str
    dtype: str
    rule: "StopRule"

    def generate(
        self,
        requests: Sequence[Request],
        removed: Sequence[int] = (),
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Output]:
        """Greedy continuations, one for each request and in their order.

        `drafts`: for each request the tokens its output is thought to have (the parent model's, say; empty for none). A
        backend may use them to be quicker; the output is that without them, but for what rounding does to a near-tie.
        """
        ...

    def generate_together(self, asked: Sequence[Asked]) -> list[list[Output]]:
        """What `generate` gives for each of `asked`, at once as far as the backend can; rounding may differ."""
        ...

    def forget(self) -> None:
        """Lets go of what is remembered of earlier prompts, so that none is answered more quickly for it."""
        ...


@dataclass(frozen=True)
class StopRule:
    """Ends a translation at any of the tokens `stop` and where it has begun to repeat itself."""

    stop: frozenset[int]

    def finished(self, tokens: Sequence[int]) -> str | None:
        """`stop` or `loop` if the tokens so far are all there will be, else None. Looks at the last token only."""
        if tokens and tokens[-1] in self.stop:
            return "stop"
        return "loop" if loops(tokens) else None

    def cut(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The tokens up to where the rule ends them, and why; `length` if it does not."""
        for end in range(1, len(tokens) + 1):
            if reason := self.finished(tokens[:end]):
                return tuple(tokens[:end]), reason
        return tuple(tokens), "length"


class _Never(StopRule):
    def finished(self, tokens: Sequence[int]) -> str | None:
        return None


NEVER = _Never(frozenset())  # every translation is as long as it may be


def loops(tokens: Sequence[int]) -> bool:
    """Whether the end is a block of at most 12 tokens said at least 4 times over, 12 tokens or more together."""
    for period in range(1, LOOP_PERIOD + 1):
        span = max(LOOP_SPAN, period * LOOP_REPEATS)
        if len(tokens) < span:
            continue
        tail = tokens[-span:]
        if all(tail[i] == tail[i - period] for i in range(period, span)):
            return True
    return False


def continuation(draft: Sequence[int], tokens: Sequence[int], most: int) -> list[int]:
    """At most `most` tokens that `draft` says will follow `tokens`.

    While `tokens` are the draft's beginning, they are what comes next in it. Later the draft is taken up again where it
    has the last two of `tokens`, at the place nearest to their own.
    """
    if most < 1 or not draft:
        return []
    place = len(tokens)
    if list(draft[:place]) != list(tokens):
        last = list(tokens[-REJOIN:])
        places = [i for i in range(REJOIN, len(draft)) if list(draft[i - REJOIN : i]) == last]
        place = min(places, key=lambda i: abs(i - len(tokens)), default=len(draft))
    return list(draft[place : place + most])


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest common beginning that leaves every prompt at least its last token."""
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return length


def stop_rule(tokenizer: Any, configs: Iterable[Any], newline: bool = True) -> StopRule:
    """End-of-text tokens of the tokenizer and of `configs` and, with `newline`, every token that holds a newline.

    `configs`: the model's configuration and its generation configuration: a chat model often names the token that ends
    its turn in the second only.
    """
    stop: set[int] = set()
    for ends in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        stop |= set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
    if newline:
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        marks = ("\n", "Ċ", "<0x0A>")  # as is, in byte-level vocabularies, in SentencePiece's byte fallback
        maybe = [i for i, piece in enumerate(pieces) if piece and any(mark in piece for mark in marks)]
        stop |= {i for i in maybe if "\n" in tokenizer.decode([i])}
    return StopRule(frozenset(stop))


def to_output(tokenizer: Any, tokens: tuple[int, ...], finish: str, newline: bool = True) -> Output:
    """Text of the tokens: the first line, or with `newline` off all lines joined to one."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    line = text.split("\n", 1)[0] if newline else " ".join(text.split())
    return Output(" ".join(line.split()), tokens, finish)
