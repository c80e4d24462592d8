"""Where the tissue is: HSV saturation above a threshold, at about 8 um/px, with speck and hole rules.

Two recipes: `otsu` (a threshold after Otsu, ink left out) and `clam` (the fixed threshold of CLAM). The mask is a
boolean array whose cells are squares of the slide; fractions of a patch come from an integral image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
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
# CLAM's fixed threshold: saturation above 8 after a median over 7 x 7, then closed with a square of 4.
_CLAM_SATURATION = 8
_CLAM_MEDIAN = 7
_CLAM_CLOSE = 4
# Squares of this side stay in the processor's cache, which takes a quarter off the time of the mask at 4096.
_SQUARE_PX = 1024
_DAMAGE_PX = 64

BoolArray = npt.NDArray[np.bool_]
TissueRecipe = Literal["otsu", "clam"]


@dataclass(frozen=True, slots=True)
class TissueMask:
    """`mask` bool [rows, cols]; cell (row, col) covers `cell_x_px0` x `cell_y_px0` level-0 pixels from the origin.

    `picture` uint8 [rows, cols, 3] is what it was made of, white where it could not be read; `threshold` is the
    saturation above which a cell is tissue.
    """

    mask: BoolArray
    cell_x_px0: float
    cell_y_px0: float
    threshold: int
    picture: Pixels

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
        left, right = (_corner(x / self.cell_x_px0, self.mask.shape[1]) for x in (x0, x0 + width_px0))
        top, bottom = (_corner(y / self.cell_y_px0, self.mask.shape[0]) for y in (y0, y0 + height_px0))
        # Of the integral image only the rows are made in which corners lie, and those after them.
        edges = np.unique(np.concatenate([top[0], top[0] + 1, bottom[0], bottom[0] + 1]))
        integral = np.zeros((len(edges), self.mask.shape[1] + 1), np.int32)
        starts = np.append(0, edges)
        strips = np.add.reduceat(self.mask[: edges[-1]].view(np.uint8), starts[:-1], axis=0, dtype=np.int32)
        strips[starts[1:] == starts[:-1]] = 0  # reduceat gives the row itself where there is none
        np.cumsum(np.cumsum(strips, axis=0), axis=1, out=integral[:, 1:])
        (i1, u1), (i2, u2) = top, bottom
        upper, lower = (np.searchsorted(edges, i1), u1), (np.searchsorted(edges, i2), u2)
        area = _at(integral, lower, right) - _at(integral, upper, right)
        area -= _at(integral, lower, left) - _at(integral, upper, left)
        cells = (width_px0 / self.cell_x_px0) * (height_px0 / self.cell_y_px0)
        return np.clip(area / cells, 0.0, 1.0).astype(np.float32)


_Corner = tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]


def _corner(position: npt.NDArray[np.float64], count: int) -> _Corner:
    """Positions along an axis of `count` cells, clamped to it: the edge before each, and how far it lies behind it."""
    position = np.clip(position, 0, count)
    edge = np.minimum(position.astype(np.intp), count - 1)
    return edge, position - edge


def _at(integral: npt.NDArray[np.int32], row: _Corner, column: _Corner) -> npt.NDArray[np.float64]:
    """`integral` interpolated at (row, column); float64 [n]."""
    (i, u), (j, v) = row, column
    flat, width = integral.ravel(), integral.shape[1]
    first = i * width + j
    upper = flat[first] * (1 - v) + flat[first + 1] * v
    first += width
    lower = flat[first] * (1 - v) + flat[first + 1] * v
    return upper * (1 - u) + lower * u


def saturation(rgb: Pixels) -> Pixels:
    """HSV saturation of uint8 [h, w, 3], as uint8 [h, w] (255 = fully saturated), rounded down."""
    high, low = _extremes(rgb)
    # In float32 the quotient is exact enough to round down: it is a whole number, or 1/255 away from one.
    return ((high - low) * np.float32(255) / np.maximum(high, 1)).astype(np.uint8)


def is_ink(rgb: Pixels) -> BoolArray:
    """Pixels that no H&E stain gives: green or blue ink (red below green), black ink or shadow (dark, colourless)."""
    red, green = rgb[:, :, 0], rgb[:, :, 1]
    high, low = _extremes(rgb)
    return (np.maximum(green, red) - red > 5) | ((high < 100) & (high - low < 25))


def _extremes(rgb: Pixels) -> tuple[Pixels, Pixels]:
    """The largest and the smallest channel; planes that are contiguous in memory make it ten times faster."""
    red, green, blue = np.moveaxis(rgb, 2, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def tissue_of(
    rgb: Pixels,
    *,
    cell_um2: float | None,
    recipe: TissueRecipe = "otsu",
    min_object_um2: float = 1000.0,
    max_hole_um2: float = 4000.0,
) -> tuple[BoolArray, int]:
    """Tissue mask of a picture at about TARGET_UM, bool [h, w], and the saturation threshold that was used.

    `otsu`: a pixel is tissue where it is no ink and its saturation is above max(15, glass + 0.75 * (otsu - glass)),
    with Otsu's threshold of all that is no ink, and `glass` the median saturation up to it.

    `clam`: where the median saturation of 7 x 7 pixels is above 8; then closed with a square of 4 x 4 (the border is
    repeated). Parts hang together by corners too, as contours do. CLAM states its areas in squares of 512 level-0
    pixels: a_t = 16 and a_h = 4, its lowest values for large sections, are min_object_um2 = 262144 and max_hole_um2 =
    65536 at 0.25 um/px (4096 and 1024 pixels of 8 um), and four times that at 0.5. Its limit on the number of holes is
    left out.

    In both, parts below `min_object_um2` are dropped, then holes below `max_hole_um2` are filled.

    Args:
        rgb: uint8 [h, w, 3].
        cell_um2: area of one pixel, for the speck and hole rules; None skips them.
    """
    if recipe == "otsu":
        mask, threshold = _otsu(rgb)
        neighbours = None
    else:
        mask, threshold = _clam(rgb)
        neighbours = np.ones((3, 3), bool)
    if cell_um2 is not None:
        mask = _without_small(mask, min_object_um2 / cell_um2, neighbours)
        mask = ~_without_small(~mask, max_hole_um2 / cell_um2)
    return mask, threshold


def _otsu(rgb: Pixels) -> tuple[BoolArray, int]:
    value, usable = saturation(rgb), ~is_ink(rgb)
    # Pillow's histogram is several times as fast as numpy's.
    counts = np.array(Image.fromarray(value).histogram(Image.fromarray(usable.view(np.uint8) * 255)))
    present = np.flatnonzero(counts)
    threshold = _MIN_SATURATION
    if len(present) > 1:
        values = np.arange(present[0], present[-1] + 1)
        otsu = int(threshold_otsu(hist=(counts[values], values)))
        glass = _median(counts[: otsu + 1])
        threshold = max(threshold, int(glass + _OTSU_SHARE * (otsu - glass)))
    return (value > threshold) & usable, threshold


def _median(counts: npt.NDArray[np.int64]) -> float:
    """The median of values 0, 1, 2, ... of which there are so many each."""
    below = np.cumsum(counts)
    middle = np.searchsorted(below, [(below[-1] + 1) // 2, below[-1] // 2 + 1])
    return float(middle.mean())


def _clam(rgb: Pixels) -> tuple[BoolArray, int]:
    above = (saturation(rgb) > _CLAM_SATURATION).astype(np.uint8)
    # The median is above a threshold where most of its pixels are: a count, in place of a sorting filter.
    for axis in (0, 1):
        above = ndimage.correlate1d(above, np.ones(_CLAM_MEDIAN), axis, mode="nearest")
    mask = np.pad(above > _CLAM_MEDIAN**2 // 2, _CLAM_CLOSE, mode="edge").view(np.uint8)
    closed = ndimage.grey_closing(mask, size=(_CLAM_CLOSE, _CLAM_CLOSE))
    return closed[_CLAM_CLOSE:-_CLAM_CLOSE, _CLAM_CLOSE:-_CLAM_CLOSE].astype(bool), _CLAM_SATURATION


def _without_small(mask: BoolArray, min_cells: float, neighbours: BoolArray | None = None) -> BoolArray:
    """`mask` less its components of fewer than `min_cells` cells; cells that share a side, or `neighbours`, connect."""
    labels, count = ndimage.label(mask, neighbours, np.intp)
    if count == 0:
        return mask
    large = np.bincount(labels.ravel()) >= min_cells
    large[0] = False
    return large.take(labels)


def find_tissue(
    slide: Slide,
    mpp0: float | None,
    *,
    recipe: TissueRecipe = "otsu",
    min_object_um2: float = 1000.0,
    max_hole_um2: float = 4000.0,
) -> TissueMask:
    """The tissue mask of a slide by a recipe of `tissue_of`, from the coarsest level that is as fine as TARGET_UM.

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
    mask, threshold = tissue_of(
        picture, cell_um2=cell_um2, recipe=recipe, min_object_um2=min_object_um2, max_hole_um2=max_hole_um2
    )
    return TissueMask(mask | damaged, cell_x, cell_y, threshold, picture)


def _read_mean(slide: Slide, level: int, factor: int) -> tuple[Pixels, BoolArray]:
    """A whole level reduced by `factor` (mean of factor x factor pixels), and where it could not be read.

    It is read in squares, so that memory stays bounded; a cell at the border is the mean of the pixels it has.
    """
    size = slide.levels[level]
    rows, columns = -(-size.height_px // factor), -(-size.width_px // factor)
    picture = np.full((3, rows, columns), 255, np.uint8).transpose(1, 2, 0)
    damaged = np.zeros((rows, columns), bool)
    step = max(1, _SQUARE_PX // factor)
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
    """uint8 [h, w, 3] reduced to the means of factor x factor pixels, rounded half up; planes lie apart in memory."""
    if factor == 1:
        return pixels
    height, width = pixels.shape[:2]
    rows, columns = -(-height // factor), -(-width // factor)
    # 16 bits hold the sums of up to 257 rows, and of 16 x 16 pixels.
    tall: npt.NDArray[Any] = np.zeros((rows, width, 3), np.uint16 if factor <= 256 else np.uint32)
    for k in range(min(factor, height)):
        part = pixels[k::factor]
        tall[: len(part)] += part
    sums: npt.NDArray[Any] = np.zeros((3, rows, columns), np.uint16 if factor <= 16 else np.uint32)
    for channel in range(3):
        for k in range(min(factor, width)):
            part = tall[:, k::factor, channel]
            sums[channel, :, : part.shape[1]] += part
    # Dividing by one number is several times faster than by an array.
    count = np.array(factor * factor, sums.dtype)
    if height % factor or width % factor:
        heights = np.diff(np.append(np.arange(0, height, factor), height)).astype(sums.dtype)
        widths = np.diff(np.append(np.arange(0, width, factor), width)).astype(sums.dtype)
        count = heights[:, None] * widths
    sums += count // 2
    sums //= count
    return sums.astype(np.uint8).transpose(1, 2, 0)
