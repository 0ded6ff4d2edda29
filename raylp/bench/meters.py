"""What serving takes besides time: energy, where the machine counts it, and the memory of an engine's processes."""

import importlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, of all GPUs in sight (NVML) or, without any, of the processor packages (RAPL).

    None where neither can be read: energy that is not counted is not zero. `root`: of the powercap files.
    """

    def __init__(self, root: Path = POWERCAP, gpus: Callable[[], list[float] | None] | None = None) -> None:
        self._gpus = gpus or gpu_joules
        self._zones = sorted(zone for zone in root.glob("intel-rapl:*") if _is_package(zone))
        self._start = self._read()

    @classmethod
    def of(cls, num_nodes: int, on_gpus: bool) -> "EnergyMeter":
        """A meter for engines on so many machines, on GPUs or not: none counts those of several machines."""
        if num_nodes > 1:
            return cls(Path("none"), lambda: None)
        return cls(Path("none")) if on_gpus else cls(gpus=lambda: None)

    @property
    def source(self) -> str | None:
        """`nvml`, `rapl` or None."""
        return self._start[0] if self._start else None

    def joules(self) -> float | None:
        """Spent since the meter was made; None where nothing counts. A counter begins anew once at most."""
        now = self._read()
        if now is None or self._start is None or now[0] != self._start[0]:
            return None
        spent = 0.0
        for before, after, limit in zip(self._start[1], now[1], now[2], strict=True):
            spent += after - before if after >= before else after + limit - before
        return spent or None  # a counter that stands still does not count

    def _read(self) -> tuple[str, list[float], list[float]] | None:
        """Source, counters and the value each begins anew at, in joules."""
        found = self._gpus()
        if found is not None:
            return "nvml", found, [float("inf")] * len(found)
        try:
            counts = [int((zone / "energy_uj").read_text()) / 1e6 for zone in self._zones]
            limits = [int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in self._zones]
        except (OSError, ValueError):  # readable by root alone, mostly
            return None
        return ("rapl", counts, limits) if counts else None


def _is_package(zone: Path) -> bool:
    """Whether a zone is a processor: parts of one have zones of their own, and the whole platform may (psys)."""
    try:
        return zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def gpu_joules(visible: str | None = None) -> list[float] | None:
    """Joules each GPU has used since its driver was loaded; None without NVML, or where a GPU does not count.

    `visible`: numbers or UUIDs of the GPUs that count (default: $CUDA_VISIBLE_DEVICES, which NVML does not heed; all).
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        names = [str(i) for i in range(pynvml.nvmlDeviceGetCount())] if chosen is None else chosen.split(",")
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in (name.strip() for name in names)
            if name
        ]
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in handles] or None
    except pynvml.NVMLError:
        return None


class MemoryMeter:
    """The most memory that processes held since it was made, of what no other process shares (USS).

    Linux keeps the peak of a process's resident memory; how far it was above what is resident now is added to what is
    the process's own now. Where the peak cannot be set back, or there is none, it is what is held now.
    """

    def __init__(self, find: Callable[[], Iterable[psutil.Process]]) -> None:
        self._find = find
        self._older = {process.pid for process in find() if not _forget_peak(process.pid)}

    @classmethod
    def of_mark(cls, variable: str, mark: str) -> "MemoryMeter":
        """Of the processes here whose environment has `variable` at `mark`."""

        def has_mark(process: psutil.Process) -> bool:
            try:
                return bool(process.environ().get(variable) == mark)
            except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
                return False

        return cls(lambda: filter(has_mark, psutil.process_iter()))

    def peak(self) -> int | None:
        """Bytes, the processes' peaks added up, those that started meanwhile too; None where none runs here now."""
        found = []
        for process in self._find():
            try:
                above = 0 if process.pid in self._older else _above_now(process.pid)
                found.append(process.memory_full_info().uss + above)
            except (psutil.Error, OSError):  # ended meanwhile
                continue
        return sum(found) if found else None


def _forget_peak(pid: int) -> bool:
    """Lets the peak of the process's resident memory begin anew (`man 5 proc_pid_clear_refs`); whether it does."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _above_now(pid: int) -> int:
    """Bytes by which the peak of a process's resident memory exceeds what is resident now, as far as that is told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = {name: int(size) for name, size in re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB", status, re.MULTILINE)}
    return 1024 * max(0, sizes["VmHWM"] - sizes["VmRSS"]) if len(sizes) == 2 else 0
