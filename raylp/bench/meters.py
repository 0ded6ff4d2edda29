"""What serving takes besides time: energy, where the machine counts it, and the memory of an engine's processes."""

import importlib
import os
from collections.abc import Callable, Mapping
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
        """Spent since the meter was made. A counter that began anew is taken to have done so once."""
        now = self._read()
        if now is None or self._start is None or now[0] != self._start[0]:
            return None
        spent = 0.0
        for before, after, limit in zip(self._start[1], now[1], now[2], strict=True):
            spent += after - before if after >= before else after + limit - before
        return spent

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


def memory_by_mark(variable: str, marks: Mapping[str, str]) -> dict[str, int]:
    """Bytes that only the processes hold whose environment has `variable` at a mark, by the mark's name (USS).

    A name none of whose processes runs here is left out.
    """
    names = {value: name for name, value in marks.items()}
    found: dict[str, int] = {}
    for process in psutil.process_iter():
        try:
            name = names.get(process.environ().get(variable, ""))
            if name is not None:
                found[name] = found.get(name, 0) + process.memory_full_info().uss
        except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
            continue
    return found
