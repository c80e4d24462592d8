"""cuCIM, the fast reader of tiled TIFF (Aperio SVS and generic). The one module that imports it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np

# cuFile, which cuCIM loads, writes a log into the user's current folder otherwise.
os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)

from cucim.clara import CuImage

from sharding.slide import Level, Pixels, Spacing, UnreadableSlideError, make_levels

# cuCIM's own `spacing()` says 1.0 on Aperio files; the description holds the truth.
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.eE+-]+)")
# cuCIM 26.10 crashes the process where a page has the tag Predictor and a compression that its libtiff lacks (Deflate,
# Zstandard, ...), even if nobody asks for that page. With these it was seen to open the file.
_SAFE_WITH_PREDICTOR = frozenset({1, 5, 7, 32773, 33003, 33005, 34712})
_NOT_READ = 34712


def refusal(compression: int, predicted: frozenset[int], *, pixels: bool) -> str:
    """Why cuCIM must not open a TIFF, or with `pixels` cannot read its pixels; empty where it may.

    `compression` and `predicted` as in TiffTiles.
    """
    crashing = sorted(predicted - _SAFE_WITH_PREDICTOR)
    if crashing:
        return f"it crashes on TIFF compression {crashing[0]} with a predictor"
    if pixels and compression == _NOT_READ:
        return f"it does not read TIFF compression {compression}"
    return ""


class CucimReader:
    """Reads one slide. It does not notice a damaged tile: `Slide` proves tiles before it asks."""

    name = "cucim"

    def __init__(self, path: Path, *, description: str, resolution_um: tuple[float, float] | None) -> None:
        self._image = CuImage(str(path))
        resolutions = self._image.resolutions
        self.levels: tuple[Level, ...] = make_levels([(int(w), int(h)) for w, h in resolutions["level_dimensions"]])
        # cuCIM divides by the mean of both axes' downsamples, not by each axis' own.
        self._downsamples = [float(d) for d in resolutions["level_downsamples"]]
        self.spacing = _spacing(description, resolution_um)

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
        """uint8 [height_px, width_px, 3]. The rectangle must lie inside the level."""
        downsample = self._downsamples[level]
        # cuCIM wants level-0 coordinates and floors when it divides; ceil makes the floor land on x_px, y_px.
        location = (math.ceil(x_px * downsample), math.ceil(y_px * downsample))
        try:
            pixels = np.asarray(self._image.read_region(location=location, size=(width_px, height_px), level=level))
        except Exception as error:  # cuCIM's own errors have no common class
            raise UnreadableSlideError(f"cuCIM cannot read it: {' '.join(str(error).split())}") from None
        if pixels.shape[:2] != (height_px, width_px) or pixels.ndim != 3 or pixels.dtype != np.uint8:
            raise UnreadableSlideError(f"cuCIM gives {pixels.shape} {pixels.dtype} for {width_px}x{height_px} px")
        return np.ascontiguousarray(pixels[:, :, :3])

    def close(self) -> None:
        self._image.close()


def _spacing(description: str, resolution_um: tuple[float, float] | None) -> Spacing | None:
    if description.startswith("Aperio"):
        # The resolution tags of an SVS are a writer's default: without MPP the spacing is unknown.
        found = _APERIO_MPP.search(description)
        if not found:
            return None
        try:
            mpp = float(found.group(1))
        except ValueError:
            return None
        return Spacing(mpp, mpp, "aperio")
    if resolution_um is None:
        return None
    return Spacing(*resolution_um, "tiff-resolution")
