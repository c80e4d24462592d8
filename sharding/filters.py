"""What is wrong with the picture of a patch, told by its pixels: nearly all of it is white, or it is out of focus."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sharding.index import FLAG_BLURRED, FLAG_WHITE
from sharding.slide import Pixels

_ROW_STEP = 16
_NEAR_WHITE = 215
_WHITE_PERCENT = 90
_NOISE = 4
_BLUR_PERCENT = 13


def patch_flags(pixels: Pixels) -> int:
    """FLAG_WHITE, FLAG_BLURRED or 0 for uint8 RGB [h, w, 3], w >= 3: by every sixteenth row, from the first on.

    A pixel is near-white where its three channels are 215 or more. The first and the last pixel of a row do not count.

    FLAG_WHITE: at least 90 % of the pixels are near-white.

    FLAG_BLURRED: the patch is not white, and over the pixels that are not near-white, with a, b, c the green values
    left of, at and right of the pixel, mean((a - 2b + c)^2) < 4 + 0.13 * mean((c - a)^2). As a ratio it holds for pale
    and for dark stains; the 4 is for the noise of JPEG, all the fine detail that a very blurred patch has. The sums
    are whole numbers, so that no rounding decides.

    Measured on painted slides at 0.25, 0.5 and 1 um/px, CMU-1 (0.5 um/px) and MoNuSeg (40x): the ratio, the 4 taken
    off its numerator, is 0.171 or more for sharp tissue, and 0.102 or less for the same blurred by a Gaussian of 2 px
    or more and encoded anew at quality 85 or 70. A Gaussian of 1 px lies on both sides of the limit, and a smear along
    the columns alone is not seen.
    """
    red, green, blue = np.ascontiguousarray(pixels[::_ROW_STEP].transpose(2, 0, 1))
    tissue = np.minimum(np.minimum(red, green), blue)[:, 1:-1] < _NEAR_WHITE
    if 100 * np.count_nonzero(tissue) <= (100 - _WHITE_PERCENT) * tissue.size:
        return FLAG_WHITE
    green = green.astype(np.int16)
    left, middle, right = green[:, :-2], green[:, 1:-1], green[:, 2:]
    bend = _sum_of_squares((left - middle + right - middle) * tissue)
    slope = _sum_of_squares((right - left) * tissue)
    blurred = 100 * bend < 100 * _NOISE * np.count_nonzero(tissue) + _BLUR_PERCENT * slope
    return FLAG_BLURRED if blurred else 0


def _sum_of_squares(values: npt.NDArray[np.int16]) -> int:
    # In float64 every partial sum is a whole number below 2^53: exact in any order of addition.
    flat = values.ravel().astype(np.float64)
    return int(flat @ flat)
