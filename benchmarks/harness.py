"""How every benchmark here measures: interleaved rounds, a clock that leaves fsync out, medians of same-round ratios.

The load of a shared machine changes by the minute, and hits contenders that take turns alike: so each round runs all
of them, and a ratio is taken within its round. Rates are of one machine at one time; ratios can be compared.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from engine.console import progress

OURS = "ours"

Case = Callable[["Setting"], dict[str, Any]]
# Does a contender's work once: writes below an empty folder, returns how many units (patches, slides) it did.
Run = Callable[[Path], int]
# Measures a contender once.
Measure = Callable[[], "Round"]


class CannotRunError(Exception):
    """A case needs what this machine does not have; the message says what."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a case is given. `cores` are those this process had before it was pinned to one of them."""

    work: Path
    rounds: int
    quick: bool
    cores: frozenset[int]


@dataclass(frozen=True, slots=True)
class Round:
    """One run of one contender; `seconds` is its time without `fsync_s`, the time that os.fsync took.

    `cpu_s` is the processor time of this process and of its children that ended: far below `seconds` where others took
    the core.
    """

    units: int
    seconds: float
    fsync_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        return self.units / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.units / self.cpu_s


@dataclass(slots=True)
class FsyncClock:
    """Time spent in os.fsync and os.fdatasync of this process within `counting`."""

    seconds: float = 0.0
    calls: int = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        originals = {name: getattr(os, name) for name in ("fsync", "fdatasync")}
        for name, original in originals.items():
            setattr(os, name, self._timed(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)

    def _timed(self, original: Callable[..., None]) -> Callable[..., None]:
        def timed(descriptor: Any) -> None:
            started = time.perf_counter()
            try:
                original(descriptor)
            finally:
                self.seconds += time.perf_counter() - started
                self.calls += 1

        return timed


def run_cases(bench: str, known: Mapping[str, Case], names: Sequence[str], setting: Setting) -> dict[str, Any]:
    """Run the named cases, all where none is named.

    Returns {cases: [{name, value, unit, ratio_to, spread, rounds, ...}], skipped: [{name, reason}]}. Raises ValueError
    where there is no such case.
    """
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no case {unknown[0]!r}; known: {', '.join(known)}.")
    names = names or list(known)
    cases, skipped = [], []
    with progress(f"bench {bench}", len(names), "cases") as advance:
        for name in names:
            try:
                cases.append({"name": name, **known[name](setting)})
            except CannotRunError as error:
                skipped.append({"name": name, "reason": str(error)})
            advance(1, name)
    return {"cases": cases, "skipped": skipped}


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: everyone once, and everyone first in turn."""
    for number in range(rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def play(contenders: Mapping[str, Run], setting: Setting) -> dict[str, list[Round]]:
    """Run all contenders as `measure` does, each into a folder that is removed afterwards."""
    return measure({name: partial(_once, run, setting.work / "out") for name, run in contenders.items()}, setting)


def measure(contenders: Mapping[str, Measure], setting: Setting) -> dict[str, list[Round]]:
    """Measure all contenders once uncounted (caches, imports), then `setting.rounds` times in turns."""
    played: dict[str, list[Round]] = {name: [] for name in contenders}
    for order in turns(list(contenders), 1 + setting.rounds):
        for name in order:
            played[name].append(contenders[name]())
    return {name: rounds[1:] for name, rounds in played.items()}


def _once(run: Run, out: Path) -> Round:
    out.mkdir(parents=True)
    clock = FsyncClock()
    try:
        with clock.counting():
            started, cpu_started = time.perf_counter(), cpu_seconds()
            units = run(out)
            seconds, cpu_s = time.perf_counter() - started, cpu_seconds() - cpu_started
    finally:
        shutil.rmtree(out)
    return Round(units, seconds - clock.seconds, clock.seconds, cpu_s)


def cpu_seconds() -> float:
    """Processor time so far of this process with all its threads, and of its children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def against_peers(played: Mapping[str, Sequence[Round]], unit: str) -> dict[str, Any]:
    """Our rate and its ratio to every peer's: medians over the rounds, with [min, max] as `spread`.

    `cpu_share` tells how quiet the machine was: near 1 where the core was ours alone. `cpu_rates` and `cpu_ratio_to`
    count processor time instead.
    """
    ours = played[OURS]
    peers = {name: rounds for name, rounds in played.items() if name != OURS}
    ratios = {
        name: [mine.rate / theirs.rate for mine, theirs in zip(ours, rounds, strict=True)]
        for name, rounds in peers.items()
    }
    cpu_ratios = {
        name: [mine.cpu_rate / theirs.cpu_rate for mine, theirs in zip(ours, rounds, strict=True)]
        for name, rounds in peers.items()
    }
    return {
        "value": median(one.rate for one in ours),
        "unit": unit,
        "ratio_to": {name: median(values) for name, values in ratios.items()},
        "spread": {"value": extremes([one.rate for one in ours])}
        | {name: extremes(values) for name, values in ratios.items()},
        "rounds": len(ours),
        "rates": {name: median(one.rate for one in rounds) for name, rounds in played.items()},
        "units_per_round": {name: rounds[0].units for name, rounds in played.items()},
        "fsync_s": {name: median(one.fsync_s for one in rounds) for name, rounds in played.items()},
        "cpu_share": {name: median(one.cpu_s / one.seconds for one in rounds) for name, rounds in played.items()},
        "cpu_rates": {name: median(one.cpu_rate for one in rounds) for name, rounds in played.items()},
        "cpu_ratio_to": {name: median(values) for name, values in cpu_ratios.items()},
    }


def alone(values: Sequence[float], unit: str) -> dict[str, Any]:
    """A case without peers: the median of `values`."""
    return {
        "value": median(values),
        "unit": unit,
        "ratio_to": {},
        "spread": {"value": extremes(values)},
        "rounds": len(values),
    }


def extremes(values: Sequence[float]) -> list[float]:
    """[min, max]"""
    return [min(values), max(values)]


@contextmanager
def every_core(setting: Setting) -> Iterator[None]:
    """Undo the pinning within the block, for the processes that are started there."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, setting.cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)
