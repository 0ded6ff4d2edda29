"""Percentiles of latencies and means of throughputs, with 95% intervals. No engine is needed here."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
RESAMPLES = 1000
SEED = 12345

# Student's t, 97.5%, for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def percentiles(repeats: Sequence[Sequence[Sequence[float]]], signature: str) -> dict[str, dict[str, Any]]:
    """p50, p90 and p99 of all values, each as {"value", "low", "high", "n", "signature"}.

    `repeats`: of each repeat its requests, of each request its values: one, or of the waits within an answer many. The
    interval is a bootstrap's in two steps, repeats and then requests within them, since requests of one repeat share
    the machine's mood, and waits of one answer are alike (Davison and Hinkley 1997, section 3.8). A p99 of fewer than
    100 values is little more than their maximum; `n` says how many there were.
    """
    requests = [np.asarray(request, dtype=float) for repeat in repeats for request in repeat]
    pooled = np.concatenate(requests)
    # Sorted once; a resample is then each value so many times as its request was drawn.
    order = np.argsort(pooled)
    ranked, owner = pooled[order], np.repeat(np.arange(len(requests)), [len(request) for request in requests])[order]
    wanted, rng = list(PERCENTILES.values()), np.random.default_rng(SEED)
    sizes = np.asarray([len(repeat) for repeat in repeats])
    draws = [_percentiles_of(ranked, _times_drawn(sizes, rng)[owner], wanted) for _ in range(RESAMPLES)]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    values = np.percentile(pooled, wanted)
    said = f"{signature}|bs:{RESAMPLES}|seed:{SEED}"
    return {
        name: {
            "value": float(v),
            "low": float(min(a, v)),
            "high": float(max(b, v)),
            "n": pooled.size,
            "signature": said,
        }
        for name, v, a, b in zip(PERCENTILES, values, low, high, strict=True)
    }


def mean_of_repeats(values: Sequence[float], signature: str) -> dict[str, Any]:
    """The mean of one value a repeat, with Student's t interval; `n` is the number of repeats, two at least."""
    n = len(values)
    mean = float(np.mean(values))
    half = _t(n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return {"value": mean, "low": max(0.0, mean - half), "high": mean + half, "n": n, "signature": f"{signature}|t"}


def _times_drawn(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each request is drawn, (requests,): as many repeats as there are, and in each as many as it has."""
    starts = np.cumsum(sizes) - sizes
    chosen = rng.integers(len(sizes), size=len(sizes))
    drawn = [starts[repeat] + rng.integers(sizes[repeat], size=sizes[repeat]) for repeat in chosen]
    return np.bincount(np.concatenate(drawn), minlength=int(sizes.sum()))


def _percentiles_of(ranked: np.ndarray, times: np.ndarray, wanted: Sequence[float]) -> np.ndarray:
    """Percentiles of sorted values, each so many times there; interpolated as `np.percentile` does."""
    ends = np.cumsum(times)
    places = np.asarray(wanted) / 100 * (ends[-1] - 1)
    below, above = (ranked[np.searchsorted(ends, at, side="right")] for at in (np.floor(places), np.ceil(places)))
    return below + (places % 1) * (above - below)


def ratio(above: Sequence[float], below: Sequence[float], signature: str) -> dict[str, Any]:
    """How many times `above` is `below`, in pairs measured side by side: the geometric mean, with Student's t interval.

    One value a repeat in each, in the same order; two repeats at least. A drift of the machine that both of a pair meet
    falls out.
    """
    logs = np.log(np.asarray(above, dtype=float)) - np.log(np.asarray(below, dtype=float))
    n = logs.size
    half = _t(n - 1) * float(np.std(logs, ddof=1)) / n**0.5
    middle = float(np.mean(logs))
    low, value, high = (math.exp(end) for end in (middle - half, middle, middle + half))
    return {"value": value, "low": low, "high": high, "n": n, "signature": f"{signature}|paired-log-t"}


def verdict(found: dict[str, Any]) -> str:
    """`more`, `less` or `unclear`: whether the interval of a ratio lies on one side of 1."""
    return "more" if found["low"] > 1 else "less" if found["high"] < 1 else "unclear"


def _t(freedom: int) -> float:
    """Student's t, 97.5%."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.37 / freedom + 2.8 / freedom**2
