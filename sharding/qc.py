"""The quality-control picture of a slide: what was taken for tissue, which patches are stored, which are damaged."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sharding.encode import encode_patch
from sharding.slide import Pixels
from sharding.tissue import BoolArray

# Told apart by shape as well, for those who cannot tell the colours: an outline, a lattice, a cross.
TISSUE_RGB = (0, 140, 90)
STORED_RGB = (40, 60, 150)
DAMAGED_RGB = (215, 0, 25)

_QUALITY = 80
_LATTICE_OPACITY = 0.55
_MIN_LATTICE_PX = 6  # narrower squares would be a solid colour; the outline of all of them is drawn instead
_MIN_CROSS_PX = 4  # from its centre to its end
_MAX_NAME_BYTES = 200
_SUFFIX = ".jpg"

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def qc_name(slide_id: str) -> str:
    """File name of a slide's picture: what is not [A-Za-z0-9._-] is percent-escaped, `.jpg` stands behind.

    Other ids have other names. A name has 1 to 200 bytes and no leading dot; a longer one ends in a hash of the id.
    """
    name = quote(slide_id, safe="").replace("~", "%7E") or "%"
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) + len(_SUFFIX) > _MAX_NAME_BYTES:
        # No escaped id holds a tilde.
        ending = "~" + hashlib.blake2b(slide_id.encode(), digest_size=16).hexdigest()
        name = name[: _MAX_NAME_BYTES - len(_SUFFIX) - len(ending)] + ending
    return name + _SUFFIX


def qc_picture(
    picture: Pixels,
    mask: BoolArray,
    x0: FloatArray,
    y0: FloatArray,
    *,
    cell_x_px0: float,
    cell_y_px0: float,
    width_px0: float,
    height_px0: float,
    damaged: BoolArray,
    max_px: int = 1024,
) -> bytes:
    """Draw a slide's tissue mask and patches on its picture; the same arguments give the same bytes.

    Args:
        picture: uint8 [rows, cols, 3], the slide at the mask's spacing.
        mask: bool [rows, cols], tissue; a cell covers `cell_x_px0` x `cell_y_px0` level-0 pixels.
        x0, y0: float64 [n], top left of each planned patch, level-0 pixels; its square is `width_px0` x `height_px0`.
        damaged: bool [n], patches that are not stored; they are crossed.
        max_px: the longer side at most; a picture of up to half of it is enlarged to twice its size.

    Returns: a baseline JPEG without metadata.
    """
    longer = max(mask.shape)
    down = -(-longer // max_px)
    up = 2 if 2 * longer <= max_px else 1
    image = Image.fromarray(picture).reduce(down)
    canvas = np.array(image.resize((image.width * up, image.height * up), Image.Resampling.BICUBIC))
    tissue = mask[::down, ::down].repeat(up, axis=0).repeat(up, axis=1)
    size_x_px0, size_y_px0 = cell_x_px0 * down / up, cell_y_px0 * down / up
    left, right = _pixels(x0 / size_x_px0, width_px0 / size_x_px0, canvas.shape[1])
    top, bottom = _pixels(y0 / size_y_px0, height_px0 / size_y_px0, canvas.shape[0])

    stored = ~damaged
    squares = (left[stored], top[stored], right[stored], bottom[stored])
    if min(width_px0 / size_x_px0, height_px0 / size_y_px0) >= _MIN_LATTICE_PX:
        lattice = _covered(canvas.shape[:2], *_sides(*squares))
    else:
        lattice = _outline(_covered(canvas.shape[:2], *squares))
    _paint(canvas, lattice, STORED_RGB, _LATTICE_OPACITY)
    _paint(canvas, _outline(tissue), TISSUE_RGB, 1.0)
    if damaged.any():
        canvas = _crossed(canvas, left[damaged], top[damaged], right[damaged], bottom[damaged])
    return encode_patch(canvas, _QUALITY)


def _pixels(start: FloatArray, length: float, size: int) -> tuple[IntArray, IntArray]:
    """First and last pixel of each interval. A neighbour's first pixel is the last of this one: they share a line."""
    first = np.clip(np.floor(start + 0.5), 0, size - 1).astype(np.int64)
    last = np.clip(np.floor(start + length + 0.5), 0, size - 1).astype(np.int64)
    return first, last


def _sides(
    left: IntArray, top: IntArray, right: IntArray, bottom: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """The four sides of each square, as rectangles one pixel wide."""
    return (
        np.concatenate([left, left, left, right]),
        np.concatenate([top, bottom, top, top]),
        np.concatenate([right, right, left, right]),
        np.concatenate([top, bottom, bottom, bottom]),
    )


def _covered(shape: tuple[int, ...], left: IntArray, top: IntArray, right: IntArray, bottom: IntArray) -> BoolArray:
    """Which pixels lie in any of the rectangles (last column and row included); their number costs next to nothing."""
    change = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
    np.add.at(change, (top, left), 1)
    np.add.at(change, (bottom + 1, right + 1), 1)
    np.add.at(change, (top, right + 1), -1)
    np.add.at(change, (bottom + 1, left), -1)
    for row in range(1, len(change)):  # numpy's cumsum along columns takes ten times as long
        change[row] += change[row - 1]
    covered: BoolArray = change.cumsum(axis=1, out=change)[:-1, :-1] > 0
    return covered


def _outline(mask: BoolArray) -> BoolArray:
    """The pixels of `mask` with one of the four neighbours outside it; the picture's edge is no outside."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline: BoolArray = mask & ~inside
    return outline


def _paint(canvas: Pixels, where: BoolArray, rgb: tuple[int, int, int], opacity: float) -> None:
    canvas[where] = (canvas[where] * (1 - opacity) + np.array(rgb) * opacity + 0.5).astype(np.uint8)


def _crossed(canvas: Pixels, left: IntArray, top: IntArray, right: IntArray, bottom: IntArray) -> Pixels:
    """`canvas` with a red square and cross on each rectangle, large enough to be seen."""
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in zip(left.tolist(), top.tolist(), right.tolist(), bottom.tolist(), strict=True):
        more_x, more_y = max(0, _MIN_CROSS_PX - (x2 - x1) // 2), max(0, _MIN_CROSS_PX - (y2 - y1) // 2)
        box = (x1 - more_x, y1 - more_y, x2 + more_x, y2 + more_y)
        draw.rectangle(box, outline=DAMAGED_RGB)
        draw.line(box, DAMAGED_RGB, 2)
        draw.line((box[0], box[3], box[2], box[1]), DAMAGED_RGB, 2)
    return np.asarray(image)
