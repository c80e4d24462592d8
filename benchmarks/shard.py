"""`engine bench shard`: slides to shards beside the usual ways, and how our own work scales.

Timed is the way from a plan to committed shards, with checksums, idx and Parquet, on one core with the slides in the
page cache; fsync is counted apart. A peer is given a part of the patches: it needs many times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import peers
from benchmarks.harness import OURS, Case, Run, Setting, against_peers, alone, every_core, play, turns
from benchmarks.ours import Ours, Patch
from benchmarks.slides import SlideSet, painted
from engine.cluster import Crash, fan_out

QUALITY = 85
# What no peer does is left out of the comparison.
SAME_WORK = {"quality": QUALITY, "optimize_huffman": False, "patch_flags": False}
# Patches per round of a peer: a few tenths of a second of work.
_CUCIM_PATCHES, _OPENSLIDE_PATCHES = 768, 256
_PARALLEL_ROUNDS = 3  # each starts processes or a cluster
_PARALLEL_JOBS = 8
_BARRIER_S = 120.0


def _rates(
    setting: Setting,
    slides: SlideSet,
    *,
    count: int | None = None,
    floor: bool = False,
    checked: bool = True,
    **keys: Any,
) -> dict[str, Any]:
    """Our rate beside the peers', on `count` slides of the set; `floor` adds sendfile; `keys` are the recipe's."""
    ours = Ours.prepare(painted(setting, slides)[:count], check_tiles=checked, **SAME_WORK, **keys)
    patches = ours.patches()
    contenders: dict[str, Run] = {
        OURS: ours.run,
        "openslide_pil": peers.openslide_pil(_middle(patches, _OPENSLIDE_PATCHES), QUALITY),
        "cucim_simplejpeg": peers.cucim_simplejpeg(_middle(patches, _CUCIM_PATCHES), QUALITY),
    }
    if floor:
        contenders["sendfile"] = peers.sendfile(patches)
    return against_peers(play(contenders, setting), "patches/s")


def _middle(patches: list[Patch], count: int) -> list[Patch]:
    """`count` neighbours from the middle, where tissue is: a peer that caches profits from neighbours."""
    start = max(0, (len(patches) - count) // 2)
    return patches[start : start + count]


def _plan(setting: Setting) -> dict[str, Any]:
    ours = Ours.prepare(painted(setting, "large"), **SAME_WORK)
    played = play({OURS: lambda _: ours.plan()}, setting)[OURS]
    return alone([1000 / one.rate for one in played], "ms/slide")


def _workers_2(setting: Setting) -> dict[str, Any]:
    """Decoding with two processes over one."""
    rate = partial(_parallel_rate, setting, "decode", local=True)
    return _ratio(setting, {"workers_2": partial(rate, workers=2), "workers_1": partial(rate, workers=1)})


def _ray(setting: Setting, routes: str) -> dict[str, Any]:
    """Ray over local processes, as many of either."""
    rate = partial(_parallel_rate, setting, routes, workers=min(2, len(setting.cores)))
    return _ratio(setting, {"ray": partial(rate, local=False), "local": partial(rate, local=True)})


def _ratio(setting: Setting, rates: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """The first rate over the second; the unit says which."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for order in turns(list(rates), min(setting.rounds, _PARALLEL_ROUNDS)):
        for name in order:
            found[name].append(rates[name]())
    ratios = [one / other for one, other in zip(*found.values(), strict=True)]
    return alone(ratios, "/".join(rates)) | {"rates": {name: median(values) for name, values in found.items()}}


@dataclass(frozen=True, slots=True)
class _Job:
    """Work for one process; `barrier` makes it wait until as many processes have come as `parties`."""

    ours: Ours
    out: Path
    barrier: Path | None = None
    parties: int = 0


def _parallel_rate(setting: Setting, routes: str, *, workers: int, local: bool) -> float:
    """Patches per second of `workers` processes, counted from the moment when all of them have started.

    fsync is part of it: processes wait for the disk side by side.
    """
    # About the 4096 patches of a shard where they are copied; decoding takes long enough as it is.
    slides = painted(setting, "chroma_420")[: 1 if routes == "decode" else None]
    ours = Ours.prepare(slides, check_tiles=False, routes=routes, **SAME_WORK)
    with TemporaryDirectory(dir=setting.work) as folder, every_core(setting):
        barrier = Path(folder) / "barrier"
        barrier.mkdir()
        first = [_Job(ours, Path(folder) / f"first-{i}", barrier, workers) for i in range(workers)]
        jobs = [_Job(ours, Path(folder) / f"{i}") for i in range(2 if setting.quick else _PARALLEL_JOBS)]
        started, ended, patches = 0.0, 0.0, 0
        for done in fan_out(_timed, [*first, *jobs], workers=workers, local=local):
            if isinstance(done.result, Crash):
                raise RuntimeError(done.result.reason)
            count, at = done.result
            if done.job.barrier is not None:
                started = max(started, at)
            else:
                ended, patches = max(ended, at), patches + count
    return patches / (ended - started)


def _timed(job: _Job) -> tuple[int, float]:
    """(patches, when it was done): CLOCK_MONOTONIC is one clock for all processes of a machine."""
    patches = job.ours.run(job.out)
    if job.barrier is not None:
        (job.barrier / job.out.name).touch()
        give_up = time.monotonic() + _BARRIER_S
        while len(list(job.barrier.iterdir())) < job.parties:
            if time.monotonic() > give_up:
                raise RuntimeError(f"{job.parties} processes were asked for, and not all came in {_BARRIER_S:g} s")
            time.sleep(0.001)
    return patches, time.monotonic()


CASES: dict[str, Case] = {
    "copy_420": partial(_rates, slides="chroma_420", floor=True, checked=False),
    "copy_444": partial(_rates, slides="chroma_444", floor=True, checked=False),
    "copy_420_checked": partial(_rates, slides="chroma_420", floor=True),
    "copy_444_checked": partial(_rates, slides="chroma_444", floor=True),
    "decode_aligned": partial(_rates, slides="chroma_420", count=1, routes="decode"),
    # Patches of 256 px on a slide with tiles of 240 px.
    "decode_unaligned": partial(_rates, slides="tile_240"),
    # 0.5 um/px from a slide of 0.25: 512 px are read, and reduced.
    "half_scale": partial(_rates, slides="large"),
    "plan": _plan,
    "workers_2": _workers_2,
    "ray_copy": partial(_ray, routes="auto"),
    "ray_decode": partial(_ray, routes="decode"),
}
