"""What an engine's log says of its end."""

import re

# Neither code that raises one, nor talk of one.
_ERROR_LINE = re.compile(r"\b([\w.]*(?:Error|Exception|Interrupt)(?::.*|$))")
_NOT_THE_CAUSE = (
    "EngineDeadError",
    "core initialization failed",
    "WorkerProc initialization failed",
    "raised in creation task",
    "cancelled",
)


def error_lines(log: str) -> list[str]:
    """The lines of an engine's log that name an error, the cause before its consequences last."""
    found = [match.group(1).strip() for line in log.splitlines() if (match := _ERROR_LINE.search(line))]
    causes = [line for line in found if not any(mark in line for mark in _NOT_THE_CAUSE)]
    return causes or found
