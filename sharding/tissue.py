"""Where the tissue is: a threshold after Otsu on HSV saturation, at about 8 um/px, with ink, speck and hole rules.

The mask is a boolean array whose cells are squares of the slide; fractions of a patch come from an integral image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.filters import threshold_otsu

from sharding.slide import DamagedTileError, Pixels, Slide

TARGET_UM = 8.0
# Where the spacing is unknown (mpp=native on a slide that states none) the mask is this much coarser than level 0.
_TARGET_DOWNSAMPLE = 16.0
# Otsu splits any histogram in two, a blank slide's too; below this saturation (of 255) it is glass in any case.
_MIN_SATURATION = 15
# Otsu's threshold lies midway between glass and the mean of all tissue, so the rim of pale tissue falls below it: on
# painted slides the mask is 1.4 % too small. Three quarters of the way from glass it is 0.6 % too large, and fits
# better.
_OTSU_SHARE = 0.75
_MIN_OBJECT_UM2 = 1000.0
_MAX_HOLE_UM2 = 4000.0
_STRIP_PX = 4096
_DAMAGE_PX = 64

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TissueMask:
    """`mask` bool [rows, cols]; cell (row, col) covers `cell_x_px0` x `cell_y_px0` level-0 pixels from the origin."""

    mask: BoolArray
    cell_x_px0: float
    cell_y_px0: float
    threshold: int

    def fractions(
        self,
        x0: npt.NDArray[np.float64],
        y0: npt.NDArray[np.float64],
        width_px0: float,
        height_px0: float,
    ) -> npt.NDArray[np.float32]:
        """Share of tissue in each rectangle [x0, x0 + width) x [y0, y0 + height), level-0 pixels; float32 [n].

        Exact for the piecewise constant mask: the integral image is interpolated at the rectangle's corners.
        """
        integral = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1))
        np.cumsum(np.cumsum(self.mask, axis=0, dtype=np.float64), axis=1, out=integral[1:, 1:])
        left, right = x0 / self.cell_x_px0, (x0 + width_px0) / self.cell_x_px0
        top, bottom = y0 / self.cell_y_px0, (y0 + height_px0) / self.cell_y_px0
        area = _at(integral, bottom, right) - _at(integral, top, right)
        area -= _at(integral, bottom, left) - _at(integral, top, left)
        cells = (width_px0 / self.cell_x_px0) * (height_px0 / self.cell_y_px0)
        return np.clip(area / cells, 0.0, 1.0).astype(np.float32)


def _at(
    integral: npt.NDArray[np.float64], row: npt.NDArray[np.float64], column: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """`integral` at fractional (row, column), clamped to its border; float64 [n]."""
    row = np.clip(row, 0, integral.shape[0] - 1)
    column = np.clip(column, 0, integral.shape[1] - 1)
    i = np.minimum(row.astype(np.intp), integral.shape[0] - 2)
    j = np.minimum(column.astype(np.intp), integral.shape[1] - 2)
    u, v = row - i, column - j
    upper = integral[i, j] * (1 - v) + integral[i, j + 1] * v
    lower = integral[i + 1, j] * (1 - v) + integral[i + 1, j + 1] * v
    return upper * (1 - u) + lower * u


def saturation(rgb: Pixels) -> Pixels:
    """HSV saturation of uint8 [h, w, 3], as uint8 [h, w] (255 = fully saturated)."""
    high = rgb.max(axis=2).astype(np.int32)
    low = rgb.min(axis=2).astype(np.int32)
    return ((high - low) * 255 // np.maximum(high, 1)).astype(np.uint8)


def is_ink(rgb: Pixels) -> BoolArray:
    """Pixels that no H&E stain gives: green or blue ink (red below green), black ink or shadow (dark, colourless)."""
    red, green = rgb[:, :, 0].astype(np.int16), rgb[:, :, 1].astype(np.int16)
    high, low = rgb.max(axis=2).astype(np.int16), rgb.min(axis=2).astype(np.int16)
    return (red < green - 5) | ((high < 100) & (high - low < 25))


def tissue_of(rgb: Pixels, *, cell_um2: float | None) -> tuple[BoolArray, int]:
    """Tissue mask of a picture at about TARGET_UM, and the saturation threshold that was used.

    Args:
        rgb: uint8 [h, w, 3].
        cell_um2: area of one pixel, for the speck and hole rules; None skips them.
    """
    value, ink = saturation(rgb), is_ink(rgb)
    usable = value[~ink]
    threshold = _MIN_SATURATION
    if usable.size and usable.min() < usable.max():
        otsu = int(threshold_otsu(usable))
        glass = float(np.median(usable[usable <= otsu]))
        threshold = max(threshold, int(glass + _OTSU_SHARE * (otsu - glass)))
    mask = (value > threshold) & ~ink
    if cell_um2 is not None:
        mask = _without_small(mask, _MIN_OBJECT_UM2 / cell_um2)
        mask = ~_without_small(~mask, _MAX_HOLE_UM2 / cell_um2)
    return mask, threshold


def _without_small(mask: BoolArray, min_cells: float) -> BoolArray:
    """`mask` less its 4-connected components of fewer than `min_cells` cells."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    small = np.bincount(labels.ravel()) < min_cells
    small[0] = True
    return ~small[labels]


def find_tissue(slide: Slide, mpp0: float | None) -> TissueMask:
    """The tissue mask of a slide, from the coarsest level that is at least as fine as TARGET_UM.

    A level with a damaged tile is passed over for the next finer one. On level 0 the damaged part counts as tissue,
    so that its patches are planned, found damaged and reported instead of vanishing.
    """
    target = TARGET_UM / mpp0 if mpp0 else _TARGET_DOWNSAMPLE
    fit = [i for i, level in enumerate(slide.levels) if level.downsample_x <= target * 1.05] or [0]
    for level in sorted(fit, key=lambda i: slide.levels[i].downsample_x, reverse=True):
        factor = max(1, round(target / slide.levels[level].downsample_x))
        picture, damaged = _read_mean(slide, level, factor)
        if not damaged.any() or level == 0:
            break
    size = slide.levels[level]
    cell_x, cell_y = factor * size.downsample_x, factor * size.downsample_y
    cell_um2 = (cell_x * mpp0) * (cell_y * mpp0) if mpp0 else None
    mask, threshold = tissue_of(picture, cell_um2=cell_um2)
    return TissueMask(mask | damaged, cell_x, cell_y, threshold)


def _read_mean(slide: Slide, level: int, factor: int) -> tuple[Pixels, BoolArray]:
    """A whole level reduced by `factor` (mean of factor x factor pixels), and where it could not be read.

    It is read in squares, so that memory stays bounded; a cell at the border is the mean of the pixels it has.
    """
    size = slide.levels[level]
    rows, columns = -(-size.height_px // factor), -(-size.width_px // factor)
    picture = np.full((rows, columns, 3), 255, np.uint8)
    damaged = np.zeros((rows, columns), bool)
    step = max(1, _STRIP_PX // factor)
    for i in range(0, rows, step):
        for j in range(0, columns, step):
            cells = (slice(i, min(i + step, rows)), slice(j, min(j + step, columns)))
            _read_cells(slide, level, factor, cells, picture, damaged)
    return picture, damaged


def _read_cells(
    slide: Slide, level: int, factor: int, cells: tuple[slice, slice], picture: Pixels, damaged: BoolArray
) -> None:
    """Fill some cells of `picture`; around damage they are quartered, so that no more than the damage is lost."""
    size, (down, across) = slide.levels[level], cells
    y, x = down.start * factor, across.start * factor
    height, width = min(down.stop * factor, size.height_px) - y, min(across.stop * factor, size.width_px) - x
    try:
        picture[cells] = _block_mean(slide.read(level, x, y, width, height), factor)
    except DamagedTileError:
        if max(width, height) <= max(factor, _DAMAGE_PX):
            damaged[cells] = True
            return
        for rows in _halves(down):
            for columns in _halves(across):
                _read_cells(slide, level, factor, (rows, columns), picture, damaged)


def _halves(cells: slice) -> list[slice]:
    middle = (cells.start + cells.stop + 1) // 2
    return [part for part in (slice(cells.start, middle), slice(middle, cells.stop)) if part.start < part.stop]


def _block_mean(pixels: Pixels, factor: int) -> Pixels:
    if factor == 1:
        return pixels
    rows = np.arange(0, pixels.shape[0], factor)
    columns = np.arange(0, pixels.shape[1], factor)
    # uint32 is wide enough: factor^2 * 255 stays far below 2^32 for any factor that occurs (< 4096).
    sums = np.add.reduceat(np.add.reduceat(pixels, rows, axis=0, dtype=np.uint32), columns, axis=1)
    heights = np.diff(np.append(rows, pixels.shape[0]))
    widths = np.diff(np.append(columns, pixels.shape[1]))
    count = (heights[:, None] * widths[None, :])[:, :, None]
    return ((sums + count // 2) // count).astype(np.uint8)
