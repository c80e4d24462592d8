"""Our engine as a contender: the one module here that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.recipes import ShardRecipe
from sharding.atomic import write_json
from sharding.gather import GatherJob
from sharding.permute import Member, PermuteJob
from sharding.plan import SlidePlan, plan_slide
from sharding.slide import fingerprint, open_slide
from sharding.stage import SlideJob, Staged, stage_rows
from sharding.tissue import TissueMask


@dataclass(frozen=True, slots=True)
class Patch:
    """A window of level 0: top-left corner and side in level-0 pixels, and level-0 pixels per stored pixel."""

    path: Path
    x0: int
    y0: int
    read_px: int
    scale: int


@dataclass(frozen=True, slots=True)
class Ours:
    """Slides to committed shards by our engine, from their plans on. A value that can be sent to another process."""

    jobs: tuple[SlideJob, ...]
    plans: tuple[SlidePlan, ...]

    @classmethod
    def prepare(cls, slides: Sequence[Path], **keys: Any) -> Ours:
        """All that is not timed: the slides' plans. `keys` are those of a shard recipe."""
        options = ShardRecipe(slides="painted", out=Path("out"), **keys).options()
        jobs = tuple(
            SlideJob(f"slide-{number}", str(path), fingerprint(path), None, "", options)
            for number, path in enumerate(slides)
        )
        # The mask has done its work, and would be sent along to every process.
        empty = TissueMask(np.zeros((1, 1), bool), 1.0, 1.0, 0, np.zeros((1, 1, 3), np.uint8))
        return cls(jobs, tuple(replace(_plan(job), mask=empty) for job in jobs))

    def patches(self) -> list[Patch]:
        """What `run` stores, slide by slide in raster order: the work that a peer is given too."""
        found = []
        for job, plan in zip(self.jobs, self.plans, strict=True):
            assert plan.geometry.level == 0
            size, scale = plan.geometry.read_px, round(plan.geometry.scale)
            places = zip(plan.rows["x0"].tolist(), plan.rows["y0"].tolist(), strict=True)
            found += [Patch(Path(job.path), x0, y0, size, scale) for x0, y0 in places]
        return found

    def plan(self) -> int:
        """Open and plan every slide; returns how many."""
        for job in self.jobs:
            _plan(job)
        return len(self.jobs)

    def run(self, out: Path) -> int:
        """Store every patch in committed shards below `out`; returns how many. RuntimeError where one is missing.

        Each slide is opened anew: an open one keeps tiles that it has decoded.
        """
        if not self.jobs:
            return 0
        members = []
        for prepared, plan in zip(self.jobs, self.plans, strict=True):
            job = replace(prepared, dataset=str(out))
            for folder in job.work.folders:
                folder.mkdir(parents=True, exist_ok=True)
            status = Path(job.path).stat()
            with open_slide(Path(job.path), job.options.reader) as slide:
                staged = stage_rows(job, slide, plan, (status.st_size, status.st_mtime_ns))
            _no_damage(job.path, staged)
            write_json(job.work.sources(job.name), [asdict(source) for source in staged.sources])
            np.save(job.work.rows(job.name), staged.rows)
            members.append(Member(job.name, job.path, len(staged.rows)))
        options = self.jobs[0].options
        permuted = PermuteJob(str(out), "group", tuple(members), options.seed, options.patches_per_shard).run()
        stored = first = 0
        for number, count in enumerate(permuted.counts):
            shard = GatherJob(str(out), "group", permuted.digest, number, first, count).run().shard
            stored += 0 if shard is None else shard.samples
            first += count
        if stored != sum(plan.num_patches for plan in self.plans):
            raise RuntimeError("a painted slide has no damage, and patches are missing: nothing was measured")
        return stored


def _no_damage(path: str, staged: Staged) -> None:
    if staged.damaged:
        reason = next(iter(staged.damaged.values()))
        raise RuntimeError(f"{path}: {reason}; a painted slide has no damage, so nothing was measured")


def _plan(job: SlideJob) -> SlidePlan:
    with open_slide(Path(job.path), job.options.reader) as slide:
        return plan_slide(slide, job.fingerprint, job.options, mpp_override=None)
