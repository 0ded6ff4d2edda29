"""What a teacher has said so far: files that appear whole, one for every batch, read again in the order of the rows.

Only the numbers of rows are kept in memory, a bit for each.
"""

import base64
import heapq
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylp.data.corpus import parse_jsonl, write_jsonl
from raylp.data.tokens import Top
from raylp.rundir import RunDir


def packed(top: Top) -> list[str]:
    """Both arrays as text."""
    return [base64.b64encode(array.tobytes()).decode() for array in (top.ids, top.logprobs)]


def unpacked(texts: Sequence[str], tokens: int) -> Top:
    """The inverse of `packed`, for so many tokens."""
    ids, logprobs = (base64.b64decode(text) for text in texts)
    shape = (tokens, -1) if tokens else (0, 0)
    return Top(np.frombuffer(ids, np.int32).reshape(shape), np.frombuffer(logprobs, np.float16).reshape(shape))


@dataclass(frozen=True)
class Said:
    """One translation of row `index`: `tokens` as generated (or `text`, from an endpoint), the sum of their
    log-probabilities where it was asked for, and `error`, what went wrong if something did.
    """

    index: int
    tokens: tuple[int, ...] = ()
    text: str | None = None
    error: str = ""
    logprob: float | None = None
    finish: str = ""
    top: Top | None = None

    def as_dict(self) -> dict[str, Any]:
        """Fit for JSON, without what is not there."""
        found = {"index": self.index, "tokens": list(self.tokens), "text": self.text, "error": self.error}
        found |= {"logprob": self.logprob, "finish": self.finish, "top": packed(self.top) if self.top else None}
        return {key: value for key, value in found.items() if value not in (None, "", [])}

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Said":
        """The inverse of `as_dict`."""
        tokens = tuple(row.get("tokens", ()))
        top = unpacked(row["top"], len(tokens)) if row.get("top") else None
        return cls(
            row["index"],
            tokens,
            row.get("text"),
            row.get("error", ""),
            row.get("logprob"),
            row.get("finish", ""),
            top,
        )


class Parts:
    """The files under `place` of a run directory, of `rows` rows with `samples` translations each."""

    def __init__(self, rundir: RunDir, place: str, rows: int, samples: int = 1) -> None:
        self.rundir, self.place, self.samples = rundir, place, samples
        self.done = np.zeros(rows * samples, dtype=bool)
        self._first: list[tuple[int, str]] = []
        for name in rundir.names(place):
            if name.startswith("part-"):
                self._note(name, [row["index"] for row in self._lines(name)])

    def _note(self, name: str, indices: Sequence[int]) -> None:
        assert not self.done[list(indices)].any(), f"{name}: a row was translated twice"
        self.done[list(indices)] = True
        self._first.append((min(indices), name))

    def missing(self) -> NDArray[np.int64]:
        """Numbers of what is not done, rising; of several samples, number = row x samples + sample."""
        return np.flatnonzero(~self.done)

    def add(self, said: Sequence[Said]) -> None:
        """A part appears, whole."""
        name = f"part-{secrets.token_hex(8)}.jsonl"
        rows = sorted(said, key=lambda one: one.index)
        self.rundir.write_text(f"{self.place}/{name}", write_jsonl(one.as_dict() for one in rows))
        self._note(name, [one.index for one in rows])

    def __iter__(self) -> Iterator[Said]:
        """All, in order; a file is read when its first row's turn comes."""
        waiting = sorted(self._first, reverse=True)
        open_: list[tuple[int, str, dict[str, Any], Iterator[dict[str, Any]]]] = []
        while waiting or open_:
            while waiting and (not open_ or waiting[-1][0] <= open_[0][0]):
                _, name = waiting.pop()
                self._push(open_, name, iter(self._lines(name)))
            _, name, row, rest = heapq.heappop(open_)
            yield Said.of(row)
            self._push(open_, name, rest)

    def _push(self, heap: list[Any], name: str, rest: Iterator[dict[str, Any]]) -> None:
        row = next(rest, None)
        if row is not None:
            heapq.heappush(heap, (row["index"], name, row, rest))

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return parse_jsonl(self.rundir.read_text(f"{self.place}/{name}"))
