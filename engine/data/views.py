"""What a model sees of a stored patch: the crop's size, its position, its flips and its number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

CROP_DRAWS = 4
"""Uniform numbers that one crop consumes, in this order: x, y, horizontal flip, vertical flip."""


@dataclass(frozen=True, slots=True)
class CropView:
    """A square crop at the stored resolution.

    size_px: side of the crop. flips: mirror each crop along x and along y with probability 1/2 each. centre: take the
    middle of the patch instead of a random window. output: "float32" is (pixel / 255 - mean) / std per RGB channel;
    "uint8" hands over the pixels as they are, to be normalised where that is cheap.
    """

    size_px: int
    flips: bool = True
    centre: bool = False
    output: Literal["uint8", "float32"] = "float32"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}; a crop is at least 1 px wide")
        if self.output not in ("uint8", "float32"):
            raise ValueError(f"output is {self.output!r}; it has to be 'uint8' or 'float32'")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std hold one number per RGB channel, std above 0: {self.mean}, {self.std}")

    def check_fits(self, width_px: int, height_px: int) -> None:
        """Raise ValueError where the crop does not lie inside a stored patch: nothing is ever padded."""
        if self.size_px > min(width_px, height_px):
            raise ValueError(
                f"a crop of {self.size_px} px does not fit into stored patches of {width_px} x {height_px} px: "
                f"use size_px <= {min(width_px, height_px)}, or shard with a larger context_px"
            )

    def as_dict(self) -> dict[str, object]:
        """Return the view as plain numbers, strings and lists, the same before and after a trip through JSON."""
        return {
            "size_px": self.size_px,
            "flips": self.flips,
            "centre": self.centre,
            "output": self.output,
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
        }


class CropWindows(NamedTuple):
    """Where the crops of a batch lie in their patches; each field int32[n]."""

    x0: Int32  # left edge, px at the stored resolution
    y0: Int32  # upper edge
    flip_x: Int32  # 1: mirror left and right
    flip_y: Int32  # 1: mirror top and bottom


def crop_windows(view: CropView, draws: npt.NDArray[np.float64], width_px: int, height_px: int) -> CropWindows:
    """Compute crop windows that lie inside a width_px x height_px patch, flips included.

    draws: float64[n, CROP_DRAWS] in [0, 1). Every window has the same probability. Raises ValueError where the crop is
    larger than the patch.
    """
    view.check_fits(width_px, height_px)
    free_x_px, free_y_px = width_px - view.size_px, height_px - view.size_px
    if view.centre:
        x0 = np.full(len(draws), free_x_px // 2, dtype=np.int32)
        y0 = np.full(len(draws), free_y_px // 2, dtype=np.int32)
    else:
        x0 = (draws[:, 0] * (free_x_px + 1)).astype(np.int32)
        y0 = (draws[:, 1] * (free_y_px + 1)).astype(np.int32)
    flips = (draws[:, 2:4] < 0.5) & view.flips
    return CropWindows(x0, y0, flips[:, 0].astype(np.int32), flips[:, 1].astype(np.int32))
