"""COMET (Rei et al. 2020, 2022), scored by a process in an environment of its own.

COMET needs older libraries than the rest, so it lives in .venv-comet (`make comet`), and its checkpoints are pickles,
which can run code, so they are read only there. `comet_server.py` says what goes through the pipe.
"""

import contextlib
import hashlib
import json
import math
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from raylp.beside import COMET
from raylp.errors import UserError
from raylp.metrics.ngram import Statistics, mean_of

SERVER = Path(__file__).with_name("comet_server.py")
# How long each phase of the start may take, in seconds: importing, fetching from the hub, reading the checkpoint.
DEADLINES_S = {"start": 300.0, "fetch": 3600.0, "load": 900.0}
CLOSE_S = 5.0

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float16", "float32"]


def is_path(checkpoint: str) -> bool:
    """Whether a checkpoint is named by its place and not by its name on the hub."""
    return checkpoint.startswith(("/", "./", "../", "~")) or checkpoint.endswith(".ckpt") or Path(checkpoint).is_dir()


def checkpoint_file(checkpoint: str) -> Path:
    """The .ckpt file of a local checkpoint: the file itself, or checkpoints/model.ckpt in a directory.

    Raises:
        UserError: it is not there, or lacks the hparams.yaml that COMET keeps beside it.
    """
    place = Path(checkpoint).expanduser()
    file = (place if place.suffix == ".ckpt" else place / "checkpoints/model.ckpt").absolute()
    if not file.is_file():
        raise UserError(
            f"COMET checkpoint {checkpoint!r}: {file} is not there: name a .ckpt file or a directory that holds "
            f"checkpoints/model.ckpt"
        )
    if not (file.parents[1] / "hparams.yaml").is_file():
        raise UserError(
            f"COMET checkpoint {checkpoint!r}: {file.parents[1]} has no hparams.yaml: copy the checkpoint's whole "
            f"directory, hparams.yaml and checkpoints/"
        )
    return file


def short_name(checkpoint: str) -> str:
    """`wmt22-comet-da`: the last part of a hub name, the file's name or the name of a checkpoint's directory."""
    if not is_path(checkpoint):
        return checkpoint.rpartition("/")[2]
    place = Path(checkpoint).expanduser().absolute()
    if place.suffix != ".ckpt":
        return place.name
    return place.parents[1].name if (place.parent.name, place.name) == ("checkpoints", "model.ckpt") else place.stem


class CometScorer:
    """A COMET model in a process of its own, started with the first call and kept until `close`.

    Scores are those of COMET's command line, which computes in half precision; `dtype="float32"` does not.

    Args:
        checkpoint: a hub name (`Unbabel/wmt22-comet-da`, fetched by COMET itself), a .ckpt file, or a directory that
            holds checkpoints/model.ckpt.
        log: where the process's own output goes; without one it is kept only as long as the process.
        deadlines_s: seconds for each phase of the start, as `DEADLINES_S`.

    Raises:
        UserError: COMET's environment or a local checkpoint is not there.
    """

    def __init__(
        self,
        checkpoint: str,
        device: Device = "auto",
        dtype: Dtype = "float16",
        log: Path | None = None,
        deadlines_s: Mapping[str, float] = DEADLINES_S,
    ) -> None:
        self.python, self.version = COMET.require()
        self.checkpoint = checkpoint
        self.device, self.dtype, self.log, self.deadlines_s = device, dtype, log, deadlines_s
        self._place = str(checkpoint_file(checkpoint)) if is_path(checkpoint) else checkpoint
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> "CometScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process else None

    def score(self, rows: Sequence[Mapping[str, str]], advance: Callable[[int], object] | None = None) -> list[float]:
        """One score for each row, on COMET's own scale.

        Args:
            rows: `src`, `mt` and, unless the model does without, `ref`; white space around them does not count.
            advance: told how many more rows are done, now and then.

        Raises:
            UserError: the checkpoint cannot be fetched or read, or the process died; with what it said last.
        """
        if not rows:
            return []
        if self._process is None:
            self._start()
        self._send({"rows": [{key: text.strip() for key, text in row.items()} for row in rows]})
        told = 0
        while "scores" not in (answer := self._answer(None)):
            if "error" in answer:
                raise UserError(f"COMET checkpoint {self.checkpoint!r} could not score: {answer['error']}", 1)
            if advance:
                advance(answer["done"] - told)
            told = answer["done"]
        scores: list[float] = answer["scores"]
        if wrong := [row for row, score in zip(rows, scores, strict=True) if not math.isfinite(score)]:
            raise UserError(
                f"COMET checkpoint {self.checkpoint!r} gives no number for {wrong[0]['mt'][:60]!r}: it overflows in "
                f"{self.dtype}",
                1,
            )
        if advance:
            advance(len(rows) - told)
        return scores

    def close(self) -> None:
        """Ends the process; the next call of `score` starts another."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it is dead already
                process.stdin.close()
            try:
                process.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._said is not None:
            self._said.close()
            self._said = None

    def _start(self) -> None:
        if self.log is None:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._said = self.log.open("a+b")
        self._pending = b""
        # -I: the caller's PYTHONPATH is for another environment, and in the server's own folder `comet` is this file.
        command = [str(self.python), "-I", str(SERVER), self._place, self.device, self.dtype]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            self.close()
            raise UserError(f"COMET's interpreter {self.python} does not run ({error}): run make comet", 1) from error
        phase = "start"
        while "ready" not in (answer := self._answer(phase)):
            if "error" in answer:
                self.close()
                raise UserError(self._refusal(phase, answer["error"]), 1)
            phase = answer["phase"]

    def _refusal(self, phase: str, error: str) -> str:
        name = f"COMET checkpoint {self.checkpoint!r}"
        if phase == "fetch":
            remedy = "check its name, your access to it and the network, or name a local .ckpt file"
            return f"{name} could not be fetched ({error}): {remedy}"
        if phase == "load":
            return f"{name} could not be read: {error}"
        return f"COMET does not start ({error}): run make comet again"

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _answer(self, phase: str | None) -> dict[str, Any]:
        """The next line; during the start by the deadline of its phase."""
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout.fileno()
        until = time.monotonic() + self.deadlines_s[phase] if phase else None
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        while b"\n" not in self._pending:
            if not poll.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000):
                assert phase is not None
                last = self._last_line()
                self._process.kill()
                self.close()
                doing = {"start": "did not start", "fetch": "was not fetched", "load": "was not read"}[phase]
                raise UserError(
                    f"COMET checkpoint {self.checkpoint!r} {doing} in {self.deadlines_s[phase]:g} s: {last}", 1
                )
            part = os.read(stream, 1 << 16)
            if not part:
                raise self._death()
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> UserError:
        """What to raise for a process that is gone: how it ended and its last words."""
        assert self._process is not None
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = self._last_line()
        self.close()
        where = f" (log: {self.log})" if self.log else ""
        hint = "; perhaps memory is short" if code == -signal.SIGKILL else ""
        return UserError(f"COMET's process ended, {how}{hint}: {last}{where}", 1)

    def _last_line(self) -> str:
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


class CometMetric:
    """COMET as a metric with additive statistics: rows of a sentence's score and 1; the score is their mean.

    `name` is the checkpoint's short name. The process starts with the first `statistics`, and `close` ends it.
    `advance` is told of sentences done.
    """

    def __init__(
        self,
        checkpoint: str,
        device: Device = "auto",
        dtype: Dtype = "float16",
        log: Path | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> None:
        self.scorer = CometScorer(checkpoint, device, dtype, log)
        self.name = short_name(checkpoint)
        self.advance = advance
        source = f"sha256:{_digest(checkpoint_file(checkpoint))}" if is_path(checkpoint) else checkpoint
        self.signature = f"{self.name}|checkpoint:{source}|dtype:{dtype}|version:{self.scorer.version}"

    def __enter__(self) -> "CometMetric":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] = ()
    ) -> Statistics:
        """(sentences, 2) float64: score and 1. `references` may be empty for a checkpoint that needs none."""
        if len(sources) != len(hypotheses) or len(references) not in (0, len(hypotheses)):
            raise ValueError(
                f"COMET needs a source for each hypothesis: {len(hypotheses)} hypotheses, {len(sources)} sources, "
                f"{len(references)} references"
            )
        columns = {"src": sources, "mt": hypotheses, **({"ref": references} if references else {})}
        rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
        scores = self.scorer.score(rows, self.advance)
        return np.column_stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))])

    def score(self, totals: Statistics) -> float:
        """The mean, on COMET's own scale, from the sum of rows."""
        return mean_of(totals)

    def close(self) -> None:
        self.scorer.close()


@cache
def _digest(file: Path) -> str:
    """12 hex digits of a checkpoint's sha256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
