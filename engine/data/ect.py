"""Extended-context translation: crop windows that differ a little in size and shape, cut from a larger stored patch.

The window is resized to what the model sees, so little that cells keep their size and shape (Zimmermann et al. 2024,
"Virchow2"). The same drawing with the patch's area as its measure is the random resized crop of DINO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ect:
    """How a window's size is drawn.

    scale: uniform between its two numbers. scale_is: what the scale multiplies: "area", the area of size_px x size_px;
    "side", its side; "patch_area", the area of the whole stored patch. aspect: width / height, log-uniform between its
    two numbers; with "patch_area" it is held to what still fits into the patch.
    """

    scale: tuple[float, float] = (0.9, 1.1)
    aspect: tuple[float, float] = (0.95, 1.05)
    scale_is: Literal["area", "side", "patch_area"] = "area"

    def __post_init__(self) -> None:
        for name, bounds in (("scale", self.scale), ("aspect", self.aspect)):
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
                raise ValueError(f"ect {name} is {bounds}; it has to be two numbers above 0, the smaller one first")
        if self.scale_is not in ("area", "side", "patch_area"):
            raise ValueError(f"ect scale_is is {self.scale_is!r}; it has to be 'area', 'side' or 'patch_area'")
        if self.scale_is == "patch_area" and self.scale[1] > 1:
            raise ValueError(f"ect scale is {self.scale}; a window has at most 1 times the area of its patch")

    def largest_px(self, size_px: int, width_px: int, height_px: int) -> tuple[int, int]:
        """Return the largest width and the largest height in px that a window may have."""
        draws = np.array([[np.nextafter(1, 0), aspect] for aspect in (0.0, np.nextafter(1, 0))])
        widths, heights = self.window_sizes(draws, size_px, width_px, height_px)
        return int(widths.max()), int(heights.max())

    def window_sizes(self, draws: Float64, size_px: int, width_px: int, height_px: int) -> tuple[Int32, Int32]:
        """Compute widths and heights in px, int32[n] each, at least 1, from draws (float64[n, 2]: scale, aspect).

        width_px, height_px: of the patch. With "area" and "side" the result may exceed it: see `largest_px`.
        """
        scale = self.scale[0] + draws[:, 0] * (self.scale[1] - self.scale[0])
        aspect = self.aspect[0] * (self.aspect[1] / self.aspect[0]) ** draws[:, 1]
        if self.scale_is == "patch_area":
            area = scale * (width_px * height_px)
            aspect = np.clip(aspect, area / height_px**2, width_px**2 / area)
        else:
            area = size_px**2 * (scale if self.scale_is == "area" else scale**2)
        sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(np.int32)
        width, height = np.maximum(sides, 1)
        return width, height
