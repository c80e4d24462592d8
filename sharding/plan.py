"""One slide's plan: which patches it gives and how each is read. Headers and one small level are all that is read."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sharding.grid import Cells, Geometry, choose_geometry, grid_cells
from sharding.index import FLAG_OUTSIDE
from sharding.slide import ReaderName, Slide, SlideError, Spacing
from sharding.tissue import TissueMask, find_tissue


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOptions:
    """All that decides a dataset's bytes besides the slides: the content of a shard recipe.

    `mpp` is um/px, None = "native" (level 0 as it is); `min_tissue` and `max_bad_fraction` are shares in [0, 1];
    `quality` is JPEG's 1-100.
    """

    mpp: float | None
    context_px: int
    stride_px: int
    min_tissue: float
    quality: int
    reader: ReaderName
    routes: Literal["auto", "decode"]
    max_bad_fraction: float
    patches_per_shard: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self)
        content["mpp"] = "native" if self.mpp is None else self.mpp
        return content


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """The patches of one slide in raster order; arrays have one entry per patch.

    `copies`: grid and TIFF tiles coincide, so that a patch is its tile, copied (unless that very tile cannot be).
    """

    geometry: Geometry
    spacing: Spacing | None
    mask: TissueMask
    cells: Cells
    sample_id: npt.NDArray[np.uint64]
    tissue_fraction: npt.NDArray[np.float32]
    flags: npt.NDArray[np.uint32]
    copies: bool

    @property
    def num_patches(self) -> int:
        return len(self.sample_id)


def plan_slide(slide: Slide, fingerprint: str, options: ShardOptions, *, mpp_override: float | None) -> SlidePlan:
    """Plan one slide.

    Raises SlideError (a sentence without the slide's name) where it gives no patch for a reason of its own:
    spacing, or a size below one patch. A slide without tissue is no error; its plan is empty.
    """
    spacing = slide.spacing(mpp_override)
    geometry = choose_geometry(
        slide.levels, spacing, mpp=options.mpp, context_px=options.context_px, stride_px=options.stride_px
    )
    level = slide.levels[geometry.level]
    cells = grid_cells(level, geometry)
    if len(cells.row) == 0:
        raise SlideError(
            f"level {geometry.level} has {level.width_px}x{level.height_px} px, less than one patch of "
            f"{geometry.stride_px * geometry.scale:.0f} px"
        )
    mask = find_tissue(slide, None if spacing is None else (spacing.x_um + spacing.y_um) / 2)
    stride = geometry.stride_px * geometry.scale
    fraction = mask.fractions(
        cells.col * stride * level.downsample_x,
        cells.row * stride * level.downsample_y,
        stride * level.downsample_x,
        stride * level.downsample_y,
    )
    keep = fraction >= options.min_tissue
    kept = Cells(*(getattr(cells, name)[keep] for name in Cells.__dataclass_fields__))
    return SlidePlan(
        geometry=geometry,
        spacing=spacing,
        mask=mask,
        cells=kept,
        sample_id=sample_ids(fingerprint, kept, geometry),
        tissue_fraction=fraction[keep],
        flags=np.where(kept.outside, FLAG_OUTSIDE, 0).astype(np.uint32),
        copies=options.routes == "auto"
        and geometry.scale == 1.0
        and geometry.context_px == geometry.stride_px
        and slide.copies_tiles(geometry.level, geometry.context_px),
    )


def sample_ids(fingerprint: str, cells: Cells, geometry: Geometry) -> npt.NDArray[np.uint64]:
    """sample_id = the first 8 bytes, big-endian, of BLAKE2b over fingerprint, x0, y0, read_px, mpp; uint64 [n].

    FORMAT.md states the exact bytes. An unknown spacing counts as 0.0.
    """
    slide_hash = hashlib.blake2b(fingerprint.encode(), digest_size=8)
    tail = struct.pack("<Id", geometry.read_px, geometry.mpp or 0.0)
    ids = np.empty(len(cells.x0), np.uint64)
    for i, (x0, y0) in enumerate(zip(cells.x0.tolist(), cells.y0.tolist(), strict=True)):
        one = slide_hash.copy()
        one.update(struct.pack("<ii", x0, y0) + tail)
        ids[i] = int.from_bytes(one.digest(), "big")
    return ids
