"""Figures as people read them: rounded to what they can bear, with thousands separators and units."""

import re
from typing import Any

from raylp.report.contents import Stat, arrival_rate, batch_size, concurrency, engine

MINUS = "−"
NONE = "–"
# Metrics whose scale is 0 to 100. Trained ones, COMET under any checkpoint's name, mostly go from 0 to 1, where one
# decimal would hide every difference.
_HUNDRED_SCALE = re.compile("chrf|bleu$|ter$|^$", re.IGNORECASE)


def decimals(metric: str, value: float) -> int:
    return 3 if not _HUNDRED_SCALE.search(metric) and abs(value) <= 1.5 else 1


def fixed(value: float, digits: int = 1, sign: bool = False) -> str:
    """Fixed decimals, thousands separators, a real minus sign, no minus zero."""
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits, but never fewer than all digits before the point."""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return fixed(value, max(0, digits - whole) if whole else digits)


def general(value: float) -> str:
    """Three significant digits or more whatever the size, for measures without a usual scale."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return significant(value, 4) if abs(value) >= 1 else fixed(value, 4)


def metric_name(name: str) -> str:
    """`wmt22-comet-da` for a checkpoint that is named by its place."""
    parts = [part for part in name.split("/") if part]
    while len(parts) > 1 and (parts[-1].endswith(".ckpt") or parts[-1] == "checkpoints"):
        parts.pop()
    return parts[-1] if parts else name


def score(stat: Stat | None, metric: str, digits: int | None = None) -> str:
    return NONE if stat is None else fixed(stat.value, decimals(metric, stat.value) if digits is None else digits)


def plus_minus(stat: Stat | None, metric: str, digits: int | None = None) -> str:
    """`48.2 ±1.9`."""
    if stat is None or stat.half is None:
        return score(stat, metric, digits)
    digits = decimals(metric, stat.value) if digits is None else digits
    return f"{score(stat, metric, digits)} ±{fixed(stat.half, digits)}"


def interval(stat: Stat | None, metric: str = "", sign: bool = False, digits: int | None = None) -> str:
    """`46.3 to 50.1`; nothing without an interval."""
    if stat is None or stat.low is None or stat.high is None:
        return ""
    digits = decimals(metric, stat.value) if digits is None else digits
    return f"{fixed(stat.low, digits, sign)} to {fixed(stat.high, digits, sign)}"


def difference(stat: Stat, metric: str) -> str:
    return fixed(stat.value, decimals(metric, stat.value), sign=True)


def verdict(stat: Stat) -> str:
    """What a difference says about `a` against `b`."""
    if stat.excludes_zero is None:
        return "no interval"
    if not stat.excludes_zero:
        return "no clear difference"
    return "higher" if stat.value > 0 else "lower"


def count(value: float | None) -> str:
    return NONE if value is None else fixed(value, 0)


def params(value: float | None) -> str:
    """`268 M`, `8.03 B`."""
    return NONE if value is None else _scaled(value, (("B", 1e9), ("M", 1e6), ("k", 1e3)), "")


def size(value: float | None) -> str:
    """Decimal units, as disks and model pages have them: `536 MB`."""
    return NONE if value is None else _scaled(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def from_to(before: str, after: str) -> str:
    """`268 → 249 M`: the unit once, where both have the same."""
    number, _, unit = before.rpartition(" ")
    return f"{number if number and after.endswith(f' {unit}') else before} → {after}"


def _scaled(value: float, units: tuple[tuple[str, float], ...], smallest: str) -> str:
    for unit, factor in units:
        if value >= factor:
            return f"{significant(value / factor)} {unit}"
    return f"{value:,.0f} {smallest}".strip()


def milliseconds(stat: Stat | None) -> str:
    return NONE if stat is None else significant(stat.value)


def rate(stat: Stat | None) -> str:
    return NONE if stat is None else significant(stat.value)


def times(value: float | None) -> str:
    """`1.12×`."""
    return NONE if value is None else f"{value:.2f}×"


def percent(value: float, digits: int = 0) -> str:
    return f"{fixed(100 * value, digits)}%"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60:,} h"


def layers(indices: Any, joiner: str = ", ") -> str:
    return joiner.join(str(index) for index in indices)


def setting(name: str) -> str:
    """`c1` is `1 request at a time`, `r2.5` is `2.5 requests a second`."""
    if arrival_rate(name) is not None:
        return "1 request a second" if name == "r1" else f"{name[1:]} requests a second"
    if (size := batch_size(name)) is not None:
        return f"{size} at once, {engine(name)}"
    at_once = concurrency(name)
    if at_once is None:
        return name
    return "1 request at a time" if at_once == 1 else f"{at_once} requests at a time"


def words(key: str) -> str:
    """`memory_gb` is `memory (GB)`, `kept_rows` is `kept rows`."""
    for tail, unit in (("_gb", "GB"), ("_s", "s"), ("_ms", "ms")):
        if key.endswith(tail):
            return f"{key.removesuffix(tail).replace('_', ' ')} ({unit})"
    return key.replace("_", " ")


def anything(value: Any) -> str:
    """A value of unknown kind in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return fixed(value, 0)
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, dict):
        return ", ".join(f"{words(str(key))} {anything(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(anything(item) for item in value) or "none"
    return NONE if value is None else str(value)
