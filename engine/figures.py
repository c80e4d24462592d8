"""Numbers and histograms as they stand on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_MIN_BARS, _MAX_BARS = 12, 24


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram, drawn in a box of 100 x 100: bars (x, width, height, what it says), ticks (x, label)."""

    title: str
    summary: str
    highest: str
    bars: list[tuple[float, float, float, str]]
    ticks: list[tuple[float, str]]


def binned(values: Sequence[float]) -> tuple[FloatArray, IntArray]:
    """Edges [n + 1] at round numbers and counts [n] of the bins of values that are not negative; none for no values."""
    if not values:
        return np.zeros(1), np.zeros(0, np.int64)
    low, high = min(values), max(values)
    width = _round_up((high - low) / _MAX_BARS or abs(high) / _MIN_BARS or 1.0)
    if all(isinstance(value, int) for value in values):
        width = max(1.0, width)
    first, last = math.floor(low / width), math.floor(high / width) + 1
    margin = max(0, _MIN_BARS - (last - first)) // 2
    edges = width * np.arange(max(0, first - margin), last + margin + 1)
    return edges, np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def histogram(title: str, unit: str, edges: FloatArray, counts: IntArray) -> Histogram:
    """Lay out `counts` [n] between `edges` [n + 1]; `unit` is its singular. No counts, no bars."""
    total, num_bars = int(counts.sum()), len(counts)
    if not total:
        return Histogram(title, "", "", [], [])
    most, width = int(counts.max()), 100 / num_bars
    bars = [
        (i * width, width, 100 * int(n) / most, _bar_text(edges, i, int(n), unit)) for i, n in enumerate(counts) if n
    ]
    every = -(-num_bars // 4)
    ticks = [(i * width, as_number(float(edges[i]))) for i in range(0, num_bars + 1, every)]
    highest = _bar_text(edges, int(counts.argmax()), most, unit)
    summary = f"Histogram of {as_count(total, unit)}; the highest bar is {highest}."
    return Histogram(title, summary, f"up to {as_count(most, unit)}", bars, ticks)


def _bar_text(edges: FloatArray, i: int, count: int, unit: str) -> str:
    return f"{as_number(float(edges[i]))} to {as_number(float(edges[i + 1]))}: {as_count(count, unit)}"


def as_number(value: float | None) -> str:
    """Four digits, or all before the point; a dash for what is unknown."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def as_count(count: int, unit: str) -> str:
    """A count and its unit, which is given in the singular."""
    plural = {"patch": "patches"}.get(unit, f"{unit}s")
    return f"{as_number(count)} {unit if count == 1 else plural}"


def as_share(value: float | None) -> str:
    """A share as per cent; what is not nothing does not look like nothing, what is not all not like all."""
    if value is None:
        return "–"
    if 0 < value < 0.001:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.3g} %"


def as_size(value: int) -> str:
    """Bytes, in powers of 1000."""
    power = min(5, (len(str(value)) - 1) // 3)
    return f"{_three(value / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def as_duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{_three(seconds)} s"
    return f"{_three(seconds / 60)} min" if seconds < 7200 else f"{_three(seconds / 3600)} h"


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
