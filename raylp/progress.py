"""Progress on stderr: bars on a terminal, one line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Set by the command line on Ctrl-C: the exception may be raised inside a callback of an engine, which swallows it.
interrupted = threading.Event()
LINE_EVERY_S = 3.0
BEAT_S = 2.0


class Task:
    """A piece of work with a known or unknown number of units."""

    def __init__(self, reporter: "Reporter", name: str, total: float | None) -> None:
        self.reporter = reporter
        self.name = name
        self.total = total
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self._last_line = 0.0
        self._whole = False
        self._bar = reporter.bars.add_task(name, total=total, note="") if reporter.bars else None

    def expect(self, total: float) -> None:
        """`total` units there will be."""
        self.total = total
        if self.reporter.bars is not None and self._bar is not None:
            self.reporter.bars.update(self._bar, total=total)

    def advance(self, units: float = 1, note: str | None = None) -> None:
        """`units` more are done; `note` is shown beside."""
        self.update(self.done + units, note)

    def update(self, done: float, note: str | None = None) -> None:
        """`done` units are done in all.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed and nobody has seen it.
        """
        if interrupted.is_set() and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        self.done = done
        self.note = self.note if note is None else note
        if self.reporter.bars is not None and self._bar is not None:
            self.reporter.bars.update(self._bar, completed=done, note=self.note)
            return
        now = time.monotonic()
        just_whole = self.total is not None and done >= self.total and not self._whole
        if now - self._last_line >= LINE_EVERY_S or just_whole:
            self._last_line = now
            self._whole = self._whole or just_whole
            self.reporter.line(self._text(now - self.started))

    def beat(self, note: str | None = None) -> None:
        """Nothing new is done, but work goes on."""
        self.update(self.done, note)

    def _text(self, seconds: float) -> str:
        parts = [self.name]
        if self.total:
            parts.append(f"{self.done:.0f}/{self.total:.0f}")
            if 0 < self.done < self.total:
                parts.append(f"{seconds:.0f} s, {seconds / self.done * (self.total - self.done):.0f} s left")
            else:
                parts.append(f"{seconds:.0f} s")
        else:
            parts.append(f"{seconds:.0f} s")
        return "  ".join([*parts, self.note] if self.note else parts)


@contextmanager
def heartbeat(task: Task) -> Iterator[None]:
    """Shows that work goes on while the block runs, which cannot say so itself."""
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_S):
            task.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


class Reporter:
    """Where progress is written. `stream` is stderr unless something else is given."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.console = Console(file=self.stream, highlight=False)
        self.bars: Progress | None = None

    def line(self, text: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Task]:
        """A task that is shown while the block runs."""
        if self.quiet or not self.console.is_terminal:
            yield Task(self, name, total)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as self.bars:
            try:
                yield Task(self, name, total)
            finally:
                self.bars = None
