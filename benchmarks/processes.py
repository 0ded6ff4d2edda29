"""What the processes of an endpoint take, by their kind: those that this process, or its Ray, started."""

from collections import Counter
from typing import Any

import psutil

# A process by a part of its command line; the first that fits.
KINDS = {
    "ray::ProxyActor": "proxy",
    "RunIngress": "ingress",
    "LLMServer": "replica",
    "ServeController": "controller",
    "VLLM::": "engine",
    "api_server": "bare server",
}


def by_kind() -> dict[str, list[psutil.Process]]:
    """Those that are there now."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        kind = next((kind for part, kind in KINDS.items() if part in line), None)
        if kind:
            found.setdefault(kind, []).append(process)
    return found


def cpu_seconds() -> Counter[str]:
    """CPU time so far by kind of process."""
    found: Any = Counter()
    for kind, processes in by_kind().items():
        for process in processes:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            found[kind] += times.user + times.system
    return found


def unique_bytes() -> Counter[str]:
    """Memory that no other process shares (USS), by kind of process."""
    found: Counter[str] = Counter()
    for kind, processes in by_kind().items():
        for process in processes:
            try:
                found[kind] += process.memory_full_info().uss
            except psutil.NoSuchProcess:
                continue
    return found
