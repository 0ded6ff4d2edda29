"""The screen belongs to raylp: what engines print goes to a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def engines_to(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Sends this process's standard output and error, with those of its children, to `log` while the block runs.

    Yields the real (stdout, stderr), for results and progress.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    streams = [os.fdopen(os.dup(descriptor), "w", buffering=1, encoding="utf-8") for descriptor in saved]
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield streams[0], streams[1]
    finally:
        for stream in (sys.stdout, sys.stderr, *streams):
            stream.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        for stream in streams:
            stream.close()


@contextmanager
def results_alone() -> Iterator[TextIO]:
    """Yields the real standard output, for results; what else goes there while the block runs, goes to standard error.

    Engines have parts that write past Python.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    results = os.fdopen(os.dup(saved), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        yield results
    finally:
        with suppress(BrokenPipeError):  # nobody reads on, which whoever wrote last was told
            results.close()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
