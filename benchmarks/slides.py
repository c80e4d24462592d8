"""The painted slides that cases run on, kept in the work folder: an archive's sizes, spacings and bytes per tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Setting, every_core
from engine.config import apply_overrides, build, read_recipe
from engine.recipes import ShardRecipe
from engine.shard import run as shard
from engine.synth import run as synth

SlideSet = Literal["chroma_420", "chroma_444", "tile_240", "large"]

# Bytes per tissue tile: 14 KB for 4:2:0 and 25 KB for RGB 4:4:4, which is what Aperio scanners write.
_SETS: dict[SlideSet, dict[str, Any]] = {
    "chroma_420": {"slides": 3, "size": 16384, "quality": 85},
    "chroma_444": {"slides": 3, "size": 16384, "quality": 75, "subsampling": "4:4:4", "photometric": "rgb"},
    "tile_240": {"slides": 1, "size": 16384, "quality": 85, "tile": 240},
    "large": {"slides": 1, "size": 30720, "mpp": 0.25},
}
_QUICK = {"slides": 1, "size": 2048}


def painted(setting: Setting, name: SlideSet) -> list[Path]:
    """The slides of a set, painted where they are not there yet; small ones for a quick run."""
    folder = setting.work / ("slides-quick" if setting.quick else "slides") / name
    if not (folder / "labels.csv").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with every_core(setting):
            synth(folder, seed=1, **(_SETS[name] | (_QUICK if setting.quick else {})))
    return sorted(folder.glob("*.svs"))


def sharded(setting: Setting, name: str, slides: SlideSet = "chroma_420") -> Path:
    """The dataset that `shard/NAME` makes of a set, made where it is not there yet."""
    folder = setting.work / ("datasets-quick" if setting.quick else "datasets") / f"{slides}-{name}"
    keys = [f"slides={painted(setting, slides)[0].parent}", f"out={folder}"]
    recipe = build(ShardRecipe, apply_overrides(read_recipe("shard", f"shard/{name}"), keys))
    if not (folder / "dataset.json").exists():
        with every_core(setting):
            shard(recipe, local=True)
    return folder
