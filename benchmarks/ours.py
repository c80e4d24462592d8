"""Our engine as a contender: the one module here that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.recipes import ShardRecipe
from sharding.plan import ShardOptions, SlidePlan, plan_slide
from sharding.slide import fingerprint, open_slide
from sharding.slide_job import WORK, SlideJob, run_slide


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
    """Slides to committed shards by our engine. A value that can be sent to another process.

    `checked`: copied tiles are decoded strictly. The engine of today always does.
    """

    slides: tuple[Path, ...]
    fingerprints: tuple[str, ...]
    options: ShardOptions
    checked: bool

    @classmethod
    def prepare(cls, slides: Sequence[Path], *, checked: bool = True, **keys: Any) -> Ours:
        """All that is not timed. `keys` are those of a shard recipe."""
        options = ShardRecipe(slides="painted", out=Path("out"), **keys).options()
        return cls(tuple(slides), tuple(fingerprint(slide) for slide in slides), options, checked)

    def patches(self) -> list[Patch]:
        """What `run` stores, slide by slide in raster order: the work that a peer is given too."""
        found = []
        for path, mark in zip(self.slides, self.fingerprints, strict=True):
            plan = self._plan(path, mark)
            assert plan.geometry.level == 0
            size, scale = plan.geometry.read_px, round(plan.geometry.scale)
            found += [
                Patch(path, x0, y0, size, scale)
                for x0, y0 in zip(plan.cells.x0.tolist(), plan.cells.y0.tolist(), strict=True)
            ]
        return found

    def plan(self) -> int:
        """Open and plan every slide; returns how many."""
        for path, mark in zip(self.slides, self.fingerprints, strict=True):
            self._plan(path, mark)
        return len(self.slides)

    def run(self, out: Path) -> int:
        """Store every patch in committed shards below `out`; returns how many. RuntimeError where one is missing."""
        for folder in ("shards", WORK):
            (out / folder).mkdir(parents=True, exist_ok=True)
        patches = 0
        for number, (path, mark) in enumerate(zip(self.slides, self.fingerprints, strict=True)):
            record = run_slide(SlideJob(f"slide-{number}", str(path), mark, None, str(out), self.options))
            if record.reason:
                raise RuntimeError(f"{path}: {record.reason}; a painted slide has no damage, so nothing was measured")
            patches += record.patches
        return patches

    def _plan(self, path: Path, mark: str) -> SlidePlan:
        with open_slide(path, self.options.reader) as slide:
            return plan_slide(slide, mark, self.options, mpp_override=None)
