"""Every score ever computed, so that none is computed twice: in this run, or in another through a shared cache.

A line is a fact about (model, removed layers, block of sentences as asked, metric, backend, dtype), filed under a hash
of those. One line of each unit also keeps its translations, so that another metric needs no generation. Lines stand in
segments: files of whole lines, each made by one writer and never changed afterwards.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from raylp.generate.base import LOOP_PERIOD, LOOP_REPEATS, LOOP_SPAN, Output, Request
from raylp.rundir import RunDir

FOLDER = "ledger"
TRANSLATION = "translation"  # the metric of a line that only keeps translations; its rows count their tokens
FACTS = ("model", "removed", "block", "decoding", "metric", "backend", "dtype")


def block_hash(requests: Sequence[Request], references: Sequence[str]) -> str:
    """What is asked and what it is held against: prompt tokens, bounds and references; 16 hex digits."""
    content = [
        [list(request.tokens), request.max_new_tokens, text] for request, text in zip(requests, references, strict=True)
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def score_key(facts: dict[str, Any]) -> str:
    """The key of the line with these facts; 32 hex digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def score_facts(
    model: str, removed: Sequence[int], block: str, metric: str, backend: str, dtype: str, decoding: str
) -> dict[str, Any]:
    """What a score is a fact about; `model` and `block` are hashes, the order of `removed` does not matter."""
    return {
        "model": model,
        "removed": sorted(removed),
        "block": block,
        "decoding": decoding,
        "metric": metric,
        "backend": backend,
        "dtype": dtype,
    }


def decoding_of(chat: bool, stop: Iterable[int] = ()) -> str:
    """How translations are made, as a line names it; `stop`: the tokens that end one."""
    ends = hashlib.sha256(json.dumps(sorted(stop)).encode()).hexdigest()[:8]
    return f"greedy|loop:{LOOP_PERIOD},{LOOP_REPEATS},{LOOP_SPAN}|chat:{chat}|stop:{ends}"


def said(pair: str, outputs: Sequence[Output], seconds: float) -> dict[str, Any]:
    """What the one line of a unit that keeps its translations holds beside facts and statistics."""
    return {
        "pair": pair,
        "texts": [output.text for output in outputs],
        "tokens": sum(len(output.tokens) for output in outputs),
        "finish": [output.finish for output in outputs],
        "seconds": round(seconds, 4),
    }


def shares(seconds: float, made: Sequence[Sequence[Output]]) -> list[float]:
    """The time of what was translated together, shared out by tokens."""
    tokens = [sum(len(output.tokens) for output in outputs) for outputs in made]
    return [seconds * own / max(1, sum(tokens)) for own in tokens]


def unit_key(facts: dict[str, Any]) -> str:
    """The key of what was generated, whatever metric it was scored by; 32 hex digits."""
    return score_key({name: value for name, value in facts.items() if name != "metric"})


class Ledger:
    """The lines of a run directory, with those of a shared `cache` behind it."""

    def __init__(self, rundir: RunDir, cache: RunDir | None = None) -> None:
        self.rundir = rundir
        self.cache = cache = None if cache is not None and cache.uri("") == rundir.uri("") else cache
        self.lines: dict[str, dict[str, Any]] = {}
        self._shared: dict[str, dict[str, Any]] = {}
        self._texts: dict[str, dict[str, Any]] = {}
        for place, lines in ((rundir, self.lines), (cache, self._shared)):
            if place is None:
                continue
            for name in place.names(FOLDER):
                if name.endswith(".jsonl"):
                    for line in place.read_text(f"{FOLDER}/{name}").splitlines():
                        entry = json.loads(line)
                        lines[entry["key"]] = entry
                        self._index(entry)
        missing = [line for key, line in self.lines.items() if key not in self._shared]
        if cache is not None and missing:  # of a run that was killed, or had no cache before
            write_segment(cache, missing)
            self._shared |= {line["key"]: line for line in missing}

    def find(self, key: str) -> dict[str, Any] | None:
        """The line under `key`; one found only in the cache is taken over into the run."""
        if key not in self.lines and key in self._shared:
            self.lines[key] = self._shared[key]
            write_segment(self.rundir, [self.lines[key]])
        return self.lines.get(key)

    def translated(self, key: str) -> dict[str, Any] | None:
        """A line that keeps the translations of the unit `key`, under whatever metric."""
        line = self._texts.get(key)
        return self.find(line["key"]) if line else None

    def remember(self, line: dict[str, Any]) -> None:
        """Adds a line that its writer has already filed in the run directory, and files it in the cache."""
        self.lines[line["key"]] = line
        self._index(line)
        if self.cache is not None and line["key"] not in self._shared:
            write_segment(self.cache, [line])

    def _index(self, line: dict[str, Any]) -> None:
        if "texts" in line:
            self._texts[unit_key({name: line[name] for name in FACTS})] = line


def write_segment(place: RunDir, lines: Sequence[dict[str, Any]]) -> None:
    """Files whole lines as one new segment."""
    name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
    place.write_text(f"{FOLDER}/{name}", "".join(json.dumps(line) + "\n" for line in lines))
