"""What sharding a slide would give, for `--dry-run`: planned, a few patches tried, nothing written."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharding.encode import encode_patch, read_patch
from sharding.plan import SlidePlan
from sharding.slide import DamagedTileError, Slide, SlideError, open_slide
from sharding.stage import SlideJob, plan_of, unexpected
from sharding.writer import BLOCK

_TRIED_PATCHES = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """`seconds` is one process's time. A slide that would be quarantined has a `reason` and no patches."""

    slide_id: str
    reason: str
    mpp: float | None = None
    mpp_source: str = ""
    reader: str = ""
    patches: int = 0
    patches_copied: int = 0
    bytes: int = 0
    seconds: float = 0.0


def not_planned(slide_id: str, reason: str) -> Estimate:
    """The estimate of a slide that would be quarantined."""
    return Estimate(slide_id, reason)


def expected_shards(patches: int, patches_per_shard: int) -> int:
    """How many shards a group of slides has, about: each patch falls into one at random, and an empty one is none."""
    most = -(-patches // patches_per_shard)
    return round(most * (1 - (1 - 1 / most) ** patches)) if most else 0


@dataclass(frozen=True, slots=True)
class EstimateJob:
    """One slide of a dry run."""

    slide: SlideJob

    def run(self) -> Estimate:
        return estimate_slide(self.slide)


def estimate_slide(job: SlideJob) -> Estimate:
    """Plan one slide, read a few of its patches, and write nothing (a plan is kept where the job names a folder)."""
    started = time.monotonic()
    try:
        with open_slide(Path(job.path), job.options.reader) as slide:
            plan = plan_of(job, slide, keep=False)
            planned = time.monotonic()
            sizes = []
            for i in np.unique(np.linspace(0, plan.num_patches - 1, _TRIED_PATCHES).astype(int)).tolist():
                if plan.num_patches == 0:
                    break
                with contextlib.suppress(DamagedTileError):
                    length = _payload_bytes(job, slide, plan, i)
                    sizes.append(BLOCK + length + -length % BLOCK)
            per_patch = (time.monotonic() - planned) / max(1, len(sizes))
            return Estimate(
                slide_id=job.slide_id,
                reason="",
                mpp=None if plan.spacing is None else (plan.spacing.x_um + plan.spacing.y_um) / 2,
                mpp_source="unknown" if plan.spacing is None else plan.spacing.source,
                reader=slide.reader_name,
                patches=plan.num_patches,
                patches_copied=plan.num_patches if plan.copies else 0,
                bytes=round(plan.num_patches * float(np.mean(sizes))) if sizes else 0,
                seconds=planned - started + per_patch * plan.num_patches,
            )
    except Exception as error:  # as in stage_slide
        foreseen = isinstance(error, SlideError | OSError)
        reason = " ".join(str(error).split()) if foreseen else unexpected(error)
        return Estimate(job.slide_id, reason, seconds=time.monotonic() - started)


def _payload_bytes(job: SlideJob, slide: Slide, plan: SlidePlan, i: int) -> int:
    if plan.copies:
        tile = slide.copy_tile(plan.geometry.level, int(plan.rows["col"][i]), int(plan.rows["row"][i]))
        if tile is not None:
            return len(tile.stream)
    window_x, window_y = plan.windows()
    pixels = read_patch(slide, plan.geometry, float(window_x[i]), float(window_y[i]))
    return len(encode_patch(pixels, job.options.quality, optimize=job.options.optimize_huffman))
