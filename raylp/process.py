"""Work in a process of its own, which gives its memory back when it ends."""

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_S = 0.25
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: a child that was just forked should look for nothing
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_apart(command: Sequence[str], log: Path, beat: Callable[[], None]) -> str | None:
    """Runs `command`, its output in `log`, calling `beat` while it goes on; the last line it said where it failed.

    However this process ends, the other ends too.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, preexec_fn=_end_with_parent)
        try:
            while process.poll() is None:
                beat()
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    if not process.returncode:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    if process.returncode < 0:
        return f"it was ended by signal {-process.returncode}, perhaps for want of memory"
    return lines[-1] if lines else f"it said nothing and left with {process.returncode}"
