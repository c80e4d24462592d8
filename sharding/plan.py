"""One slide's plan: which patches it gives and how each is read. Headers and one small level are all that is read.

A plan can be kept in a file. Its digest covers the slide, the keys of the recipe that planning depends on and the
library versions: a plan whose digest is another one's is not used.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from sharding.atomic import atomic_path
from sharding.grid import Cells, Geometry, choose_geometry, grid_cells
from sharding.hashing import splitmix64
from sharding.index import FLAG_OUTSIDE, FLAG_PARTIAL_REGION, canonical_digest
from sharding.rows import NO_REGION, RAW, ROW, Rows
from sharding.slide import ReaderName, Slide, SlideError, Spacing, environment_versions
from sharding.tissue import TissueMask, find_tissue

_PLANNING = (
    "mpp",
    "context_px",
    "stride_px",
    "min_tissue",
    "tissue",
    "min_object_um2",
    "max_hole_um2",
    "region_patches",
    "reader",
    "routes",
)
_PICTURE_QUALITY = 85


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOptions:
    """All that decides a dataset's bytes besides the slides: the content of a shard recipe.

    `mpp` is um/px, None = "native" (level 0 as it is); `min_tissue` and `max_bad_fraction` are shares in [0, 1];
    `quality` is JPEG's 1-100; `region_patches` is the side of a region in patches, None = no regions.
    """

    mpp: float | None
    context_px: int
    stride_px: int
    min_tissue: float
    tissue: Literal["otsu", "clam"]
    min_object_um2: float
    max_hole_um2: float
    region_patches: int | None
    quality: int
    optimize_huffman: bool
    reader: ReaderName
    routes: Literal["auto", "decode"]
    check_tiles: bool
    patch_flags: bool
    max_bad_fraction: float
    permute: Literal["group", "global", "slide"]
    group_slides: int
    patches_per_shard: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self)
        content["mpp"] = "native" if self.mpp is None else self.mpp
        return content


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """The patches of one slide in raster order; `rows` has their place on the slide, not yet that of their bytes.

    `copies`: grid and TIFF tiles coincide, so that a patch is its tile, copied (unless that very tile cannot be).
    """

    geometry: Geometry
    spacing: Spacing | None
    mask: TissueMask
    rows: Rows
    copies: bool

    @property
    def num_patches(self) -> int:
        return len(self.rows)

    def windows(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(x, y) of the top left of each stored window, in pixels of the level that is read; float64 [n]."""
        stride = self.geometry.stride_px * self.geometry.scale
        margin = (self.geometry.context_px * self.geometry.scale - stride) / 2
        return self.rows["col"] * stride - margin, self.rows["row"] * stride - margin


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
    mask = find_tissue(
        slide,
        None if spacing is None else (spacing.x_um + spacing.y_um) / 2,
        recipe=options.tissue,
        min_object_um2=options.min_object_um2,
        max_hole_um2=options.max_hole_um2,
    )
    stride = geometry.stride_px * geometry.scale
    fraction = mask.fractions(
        cells.col * stride * level.downsample_x,
        cells.row * stride * level.downsample_y,
        stride * level.downsample_x,
        stride * level.downsample_y,
    )
    region, partial, share = _regions(cells, fraction, fingerprint, geometry, options.region_patches)
    keep = share >= options.min_tissue
    rows = np.zeros(int(keep.sum()), ROW)
    rows["sample_id"] = sample_ids(fingerprint, cells.x0[keep], cells.y0[keep], geometry)
    for name in ("x0", "y0", "row", "col"):
        rows[name] = getattr(cells, name)[keep]
    rows["tissue_fraction"] = fraction[keep]
    rows["flags"] = np.where(cells.outside[keep], FLAG_OUTSIDE, 0) | np.where(partial[keep], FLAG_PARTIAL_REGION, 0)
    rows["region"] = region[keep]
    rows["head"] = RAW
    return SlidePlan(
        geometry=geometry,
        spacing=spacing,
        mask=mask,
        rows=rows,
        copies=options.routes == "auto"
        and geometry.scale == 1.0
        and geometry.context_px == geometry.stride_px
        and slide.copies_tiles(geometry.level, geometry.context_px),
    )


def _regions(
    cells: Cells, fraction: npt.NDArray[np.float32], fingerprint: str, geometry: Geometry, side: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Of each cell: its region's id, whether that region is partial, and the tissue share that decides on the cell.

    A region is `side` x `side` cells from the slide's origin; it is partial where the slide ends inside it. It is kept
    or left as a whole, by the share of tissue in the cells it has.
    """
    count = len(cells.row)
    if side is None:
        return np.full(count, NO_REGION, np.int64), np.zeros(count, bool), fraction
    down, across = cells.row // side, cells.col // side
    _, number, size = np.unique(down.astype(np.int64) << 32 | across, return_inverse=True, return_counts=True)
    share = np.bincount(number, fraction) / size
    ids = sample_ids(f"region {side} {fingerprint}", across, down, geometry) >> np.uint64(1)
    return ids.astype(np.int64), (size < side * side)[number], share[number].astype(np.float32)


def sample_ids(
    fingerprint: str, x0: npt.NDArray[np.int32], y0: npt.NDArray[np.int32], geometry: Geometry
) -> npt.NDArray[np.uint64]:
    """splitmix64(base XOR place): distinct within a slide, random between slides; uint64 [n].

    base is the first 8 bytes, little-endian, of BLAKE2b over fingerprint, read_px and mpp; place is x0, y0 as the upper
    and lower 32 bits. FORMAT.md states the exact bytes. An unknown spacing counts as 0.0.
    """
    tail = struct.pack("<Id", geometry.read_px, geometry.mpp or 0.0)
    digest = hashlib.blake2b(fingerprint.encode() + tail, digest_size=8).digest()
    place = x0.astype(np.uint32).astype(np.uint64) << np.uint64(32) | y0.astype(np.uint32).astype(np.uint64)
    return splitmix64(place ^ np.uint64(int.from_bytes(digest, "little")))


def plan_digest(fingerprint: str, mpp_override: float | None, options: ShardOptions) -> str:
    """What a kept plan is good for: SHA-256 of the slide, the keys that planning depends on, and the versions."""
    content = options.as_dict()
    return canonical_digest(
        {
            "slide": fingerprint,
            "mpp_override": mpp_override,
            "recipe": {key: content[key] for key in _PLANNING},
            "versions": environment_versions(),
        }
    )


def save_plan(path: Path, plan: SlidePlan, digest: str) -> None:
    """Keep a plan in one file, atomically."""
    meta = {
        "digest": digest,
        "geometry": asdict(plan.geometry),
        "spacing": None if plan.spacing is None else asdict(plan.spacing),
        "copies": plan.copies,
        "mask": {"shape": plan.mask.mask.shape, "cell_x_px0": plan.mask.cell_x_px0, "cell_y_px0": plan.mask.cell_y_px0},
        "threshold": plan.mask.threshold,
    }
    picture = simplejpeg.encode_jpeg(np.ascontiguousarray(plan.mask.picture), _PICTURE_QUALITY, "RGB", "444")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            rows=plan.rows,
            mask=np.packbits(plan.mask.mask),
            picture=np.frombuffer(picture, np.uint8),
        )


def load_plan(path: Path, digest: str) -> SlidePlan | None:
    """The plan that is kept in `path`; None where there is none, it is another slide's or recipe's, or it is damaged.

    Its mask's picture has been through JPEG.
    """
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            meta = json.loads(kept["meta"].tobytes())
            if meta["digest"] != digest:
                return None
            rows, bits = kept["rows"], kept["mask"]
            picture = simplejpeg.decode_jpeg(kept["picture"].tobytes(), "RGB")
    except Exception:  # zipfile and numpy raise many kinds on a damaged file
        return None
    shape = tuple(meta["mask"].pop("shape"))
    mask = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
    return SlidePlan(
        geometry=Geometry(**meta["geometry"]),
        spacing=None if meta["spacing"] is None else Spacing(**meta["spacing"]),
        mask=TissueMask(mask, **meta["mask"], threshold=meta["threshold"], picture=picture),
        rows=rows,
        copies=meta["copies"],
    )
