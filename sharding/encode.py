"""Pixels of a patch: read, reduced to the stored spacing where needed, and encoded as JPEG."""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
from PIL import Image

from sharding.grid import Geometry
from sharding.slide import Pixels, Slide


def read_patch(slide: Slide, geometry: Geometry, window_x: float, window_y: float) -> Pixels:
    """One patch, uint8 [context_px, context_px, 3]; `window_x`, `window_y` in pixels of the level that is read.

    At scale 1 these are the level's own pixels. An integer scale gives their exact mean, any other an antialiased
    bicubic reduction over the exact window. Outside the slide it is white.

    Raises DamagedTileError where the slide's data under the patch does not decode.
    """
    size_px = geometry.context_px
    side = size_px * geometry.scale
    if geometry.scale == 1.0:
        return slide.read(geometry.level, math.floor(window_x + 0.5), math.floor(window_y + 0.5), size_px, size_px)
    left, top = math.floor(window_x), math.floor(window_y)
    right, bottom = math.ceil(window_x + side - 1e-6), math.ceil(window_y + side - 1e-6)
    pixels = slide.read(geometry.level, left, top, right - left, bottom - top)
    whole = abs(geometry.scale - round(geometry.scale)) < 1e-6
    x, y = window_x - left, window_y - top
    box = (x, y, min(x + side, right - left), min(y + side, bottom - top))
    resampling = Image.Resampling.BOX if whole else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((size_px, size_px), resampling, box=box))


def encode_patch(pixels: Pixels, quality: int) -> bytes:
    """Baseline JPEG, 4:4:4: on H&E, 4:2:0 loses more than its saved bytes are worth. Deterministic."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444")
