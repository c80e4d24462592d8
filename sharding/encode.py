"""Pixels of a patch: read, reduced to the stored spacing where needed, and encoded as JPEG."""

from __future__ import annotations

import math

import imagecodecs
import numpy as np
from PIL import Image

from sharding.grid import WHOLE_SCALES, Geometry
from sharding.slide import Pixels, Slide

# Pixels that Pillow's bicubic filter reaches to either side, in pixels of the result.
_BICUBIC_SUPPORT = 2


def read_patch(slide: Slide, geometry: Geometry, window_x: float, window_y: float) -> Pixels:
    """One patch, uint8 [context_px, context_px, 3]; `window_x`, `window_y` in pixels of the level that is read.

    At scale 1 these are the level's own pixels. At 2, 4 and 8 they are means of as many pixels squared, or libjpeg's
    scaled decode (see Slide.read). Any other scale gives an antialiased bicubic reduction, in which every pixel is
    filtered from its true neighbours, those beyond the window included. Outside the slide it is white.

    Raises DamagedTileError where the slide's data under the patch does not decode.
    """
    size_px = geometry.context_px
    side = size_px * geometry.scale
    if geometry.scale in WHOLE_SCALES:
        x_px, y_px, side_px = math.floor(window_x + 0.5), math.floor(window_y + 0.5), round(side)
        overlapping = geometry.context_px > geometry.stride_px
        return slide.read(
            geometry.level, x_px, y_px, side_px, side_px, factor=int(geometry.scale), overlapping=overlapping
        )
    margin = math.ceil(_BICUBIC_SUPPORT * geometry.scale) + 1
    left, top = math.floor(window_x) - margin, math.floor(window_y) - margin
    wide = math.ceil(side) + 1 + 2 * margin
    pixels = slide.read(geometry.level, left, top, wide, wide)
    box = (window_x - left, window_y - top, window_x - left + side, window_y - top + side)
    return np.asarray(Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BICUBIC, box=box))


def encode_patch(pixels: Pixels, quality: int, *, optimize: bool = False) -> bytes:
    """Baseline JPEG, 4:4:4: on H&E, 4:2:0 loses more than its saved bytes are worth. Deterministic.

    `optimize` makes Huffman tables of the patch's own: fewer bytes of the same pixels, for nearly twice the time.
    """
    # Not simplejpeg: its encoder takes libjpeg's fast, less accurate DCT below quality 96, whatever it is asked for.
    # YCbCr is libjpeg's own choice for RGB pixels; to name the colour spaces takes time and gives the same bytes.
    return bytes(imagecodecs.jpeg8_encode(pixels, level=quality, subsampling="444", optimize=optimize))
