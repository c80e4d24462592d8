"""The geometry of patches: which level to read, where the grid lies. Pure functions; no file is opened here.

The grid is anchored at (0, 0) of the slide: cell (row, col) starts at (col, row) * stride. What is stored is a window
of `context_px` centred on its cell, so neighbouring windows overlap where context_px > stride_px.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.slide import Level, Spacing, SpacingError

# Real slides say 0.2527, 0.263, 0.499: equality never holds (findings of every peer).
SPACING_TOLERANCE = 0.05
# Level pixels per stored pixel that need no resampling: as it is, and what libjpeg decodes to. Pyramids often go in
# steps of 4, so that 0.5 um/px lies between the levels of a slide of 0.25.
WHOLE_SCALES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one slide's patches are read.

    `scale` is level pixels per stored pixel: exactly 1.0 where the level is stored as it is, exactly 2.0, 4.0 or 8.0
    where it is halved, any other number above 1 where it is resampled. `mpp` is the spacing of the stored pixels, None
    where it is unknown.
    """

    level: int
    scale: float
    mpp: float | None
    context_px: int
    stride_px: int

    @property
    def read_px(self) -> int:
        """Side of the window in pixels of `level`, rounded to the nearest."""
        return round(self.context_px * self.scale)


def choose_geometry(
    levels: tuple[Level, ...], spacing: Spacing | None, *, mpp: float | None, context_px: int, stride_px: int
) -> Geometry:
    """Choose the level to read for patches at `mpp` um/px; `mpp=None` means level 0 as it is ("native").

    A level within SPACING_TOLERANCE is taken as it is (the nearest where several are). Else one that is within it when
    its spacing is doubled, the fewest times, at most thrice (the coarsest where several are); it is halved as often and
    keeps its own spacing. Else the window comes from the coarsest level that is finer and is resampled to `mpp`.
    Nothing is ever enlarged.

    Raises SpacingError where the slide states no spacing but one is asked for, or where it is too coarse.
    """
    if mpp is None:
        mpp0 = None if spacing is None else (spacing.x_um + spacing.y_um) / 2
        return Geometry(0, 1.0, mpp0, context_px, stride_px)
    if spacing is None:
        raise SpacingError(
            f"the slide states no spacing, and {mpp:g} um/px was asked for; state it in the column `mpp` of a slide "
            "list, or take level 0 as it is with mpp=native"
        )
    level_mpp = [(spacing.x_um * level.downsample_x + spacing.y_um * level.downsample_y) / 2 for level in levels]
    near = min(range(len(levels)), key=lambda i: abs(level_mpp[i] / mpp - 1))
    if abs(level_mpp[near] / mpp - 1) <= SPACING_TOLERANCE:
        return Geometry(near, 1.0, level_mpp[near], context_px, stride_px)
    for factor in WHOLE_SCALES[1:]:
        matching = [i for i in range(len(levels)) if abs(level_mpp[i] * factor / mpp - 1) <= SPACING_TOLERANCE]
        if matching:
            level = max(matching, key=lambda i: level_mpp[i])
            return Geometry(level, float(factor), level_mpp[level] * factor, context_px, stride_px)
    finer = [i for i in range(len(levels)) if level_mpp[i] < mpp]
    if not finer:
        raise SpacingError(
            f"the slide has {level_mpp[0]:g} um/px at its finest, {mpp:g} um/px was asked for; patches are never "
            "enlarged"
        )
    level = max(finer, key=lambda i: level_mpp[i])
    return Geometry(level, mpp / level_mpp[level], mpp, context_px, stride_px)


@dataclass(frozen=True, slots=True)
class Cells:
    """Grid cells in raster order. All arrays have one entry per cell.

    `window_x`, `window_y` (float64): top-left of the stored window, in pixels of the level that is read.
    `x0`, `y0` (int32): the same in level-0 pixels, rounded half up; negative where the window reaches outside.
    """

    row: npt.NDArray[np.int32]
    col: npt.NDArray[np.int32]
    window_x: npt.NDArray[np.float64]
    window_y: npt.NDArray[np.float64]
    x0: npt.NDArray[np.int32]
    y0: npt.NDArray[np.int32]
    outside: npt.NDArray[np.bool_]


def grid_cells(level: Level, geometry: Geometry) -> Cells:
    """Every cell that lies wholly inside the slide; its window may reach outside where context_px > stride_px."""
    stride = geometry.stride_px * geometry.scale
    side = geometry.context_px * geometry.scale
    margin = (side - stride) / 2
    # The epsilon keeps a cell that fits exactly but for the rounding of scale.
    rows = max(0, math.floor(level.height_px / stride + 1e-9))
    columns = max(0, math.floor(level.width_px / stride + 1e-9))
    row, col = (a.ravel() for a in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    x, y = col * stride - margin, row * stride - margin
    return Cells(
        row=row.astype(np.int32),
        col=col.astype(np.int32),
        window_x=x,
        window_y=y,
        x0=np.floor(x * level.downsample_x + 0.5).astype(np.int32),
        y0=np.floor(y * level.downsample_y + 0.5).astype(np.int32),
        outside=(x < -1e-6) | (y < -1e-6) | (x + side > level.width_px + 1e-6) | (y + side > level.height_px + 1e-6),
    )
