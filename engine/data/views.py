"""What a model sees of a stored patch: the crop's window, its orientation, its augmentations and its number format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data.augment import AUGMENT_DRAWS, Augment, Changes, draw_changes
from engine.data.draws import uniforms
from engine.data.ect import Ect, Int32

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

CROP_DRAWS = 7
"""Uniform numbers that one window consumes, in this order: x, y, horizontal flip, vertical flip, rotation, and for ECT
scale and aspect. Those of the augmentations (`AUGMENT_DRAWS`) follow."""


@dataclass(frozen=True, slots=True)
class CropView:
    """A square crop of size_px, at the stored resolution or, with `ect`, resized from a window near that size.

    flips: mirror each crop along x and along y with probability 1/2 each. rotations: turn it by 0, 90, 180 or 270
    degrees with equal probability. centre: take the middle of the patch instead of a random window, for evaluation.
    ect: draw the window's size too, and resize it linearly (antialiased where it shrinks). augment: see `Augment`.
    output: "float32" and "float16" are (pixel / 255 - mean) / std per RGB channel; "uint8" hands over the pixels as
    they are, to be normalised where that is cheap. channels_last: the images' order in memory (their shape is always
    [B, 3, size_px, size_px]); by default uint8 is channels-last, the others contiguous. draws_of: take the random
    numbers of that view number instead of one's own: with equal settings the two are then equal. region: a sample is
    not a patch but a region of n x n patches, all cut and changed alike; partial regions are refused ("whole") or
    filled up with zeros ("padded", see `PatchBatch.present`). Flips and rotations turn each patch, not the region.
    """

    size_px: int
    flips: bool = True
    centre: bool = False
    output: Literal["uint8", "float16", "float32"] = "float32"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    rotations: bool = False
    ect: Ect | None = None
    augment: Augment | None = None
    channels_last: bool | None = None
    draws_of: int | None = None
    region: Literal["whole", "padded"] | None = None

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}; a crop is at least 1 px wide")
        if self.output not in ("uint8", "float16", "float32"):
            raise ValueError(f"output is {self.output!r}; it has to be 'uint8', 'float16' or 'float32'")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std hold one number per RGB channel, std above 0: {self.mean}, {self.std}")
        if self.centre and self.ect is not None:
            raise ValueError("a view is either centred or drawn by ECT: leave out centre or ect")
        if self.augment is not None and self.augment.blur and self.size_px <= self.augment.blur_radius_px:
            raise ValueError(
                f"a blur reaches {self.augment.blur_radius_px} px, too far for crops of {self.size_px} px: "
                "lower blur_sigma_px"
            )
        if self.region not in (None, "whole", "padded"):
            raise ValueError(f"region is {self.region!r}; it has to be None, 'whole' or 'padded'")
        if self.draws_of is not None and self.draws_of < 0:
            raise ValueError(f"draws_of is {self.draws_of}; it is the number of a view, from 0 on")

    @property
    def is_channels_last(self) -> bool:
        """Whether the images are channels-last in memory."""
        return self.output == "uint8" if self.channels_last is None else self.channels_last

    @property
    def is_plain(self) -> bool:
        """Whether this is a flipped, normalised crop in its default format, which a decoder may do by itself."""
        extras = (self.ect, self.augment, self.channels_last)
        return not self.rotations and self.output != "float16" and all(extra is None for extra in extras)

    def check_fits(self, width_px: int, height_px: int) -> None:
        """Raise ValueError where some window does not lie inside a stored patch: nothing is ever padded."""
        if self.ect is not None:
            widest_px, highest_px = self.ect.largest_px(self.size_px, width_px, height_px)
            if widest_px > width_px or highest_px > height_px:
                raise ValueError(
                    f"windows of up to {widest_px} x {highest_px} px (ECT of {self.size_px} px with scale "
                    f"{self.ect.scale} by {self.ect.scale_is}, aspect {self.ect.aspect}) do not fit into stored "
                    f"patches of {width_px} x {height_px} px: lower the crop's size or the scale, or "
                    "shard with a larger context_px"
                )
        elif self.size_px > min(width_px, height_px):
            raise ValueError(
                f"a crop of {self.size_px} px does not fit into stored patches of {width_px} x {height_px} px: "
                f"take {min(width_px, height_px)} px at most, or shard with a larger context_px"
            )

    def as_dict(self) -> dict[str, object]:
        """Return the view as plain numbers, strings and lists, the same before and after a trip through JSON."""
        plain: dict[str, object] = json.loads(json.dumps(asdict(self), default=float))
        return plain


class CropWindows(NamedTuple):
    """Where the crops of a batch lie in their patches; each field int32[n].

    A crop is cut out, resized to the view's size, transposed, then mirrored.
    """

    x0: Int32  # left edge, px at the stored resolution
    y0: Int32  # upper edge
    flip_x: Int32  # 1: mirror left and right
    flip_y: Int32  # 1: mirror top and bottom
    width: Int32  # px at the stored resolution, before any resizing
    height: Int32
    transpose: Int32  # 1: exchange x and y


def crop_windows(view: CropView, draws: npt.NDArray[np.float64], width_px: int, height_px: int) -> CropWindows:
    """Compute crop windows that lie inside a width_px x height_px patch, flips and rotations included.

    draws: float64[n, CROP_DRAWS or more] in [0, 1). Every place of a window has the same probability. Raises ValueError
    where the largest window is larger than the patch.
    """
    view.check_fits(width_px, height_px)
    if view.ect is not None:
        width, height = view.ect.window_sizes(draws[:, 5:7], view.size_px, width_px, height_px)
    else:
        width = height = np.full(len(draws), view.size_px, dtype=np.int32)
    free_x_px, free_y_px = width_px - width, height_px - height
    if view.centre:
        x0, y0 = free_x_px // 2, free_y_px // 2
    else:
        x0 = (draws[:, 0] * (free_x_px + 1)).astype(np.int32)
        y0 = (draws[:, 1] * (free_y_px + 1)).astype(np.int32)
    flips = (draws[:, 2:4] < 0.5) & view.flips
    # A quarter turn is a transposition and one mirror, a half turn is both mirrors.
    quarters = (draws[:, 4] * 4).astype(np.int32) * view.rotations
    flip_x = flips[:, 0] ^ (quarters >= 2)
    flip_y = flips[:, 1] ^ ((quarters == 1) | (quarters == 2))
    transpose = quarters % 2
    return CropWindows(x0, y0, flip_x.astype(np.int32), flip_y.astype(np.int32), width, height, transpose)


def draw_view(
    view: CropView, number: int, *, seed: int, positions: npt.NDArray[np.int64], patch_px: int
) -> tuple[CropWindows, Changes]:
    """Draw everything random about view number `number` of the samples at stream positions (int64[n]).

    Raises ValueError where the view does not fit into patches of patch_px x patch_px.
    """
    count = CROP_DRAWS + (AUGMENT_DRAWS if view.augment is not None else 0)
    draws = uniforms(seed, positions, number if view.draws_of is None else view.draws_of, count)
    changes = draw_changes(
        view.augment, draws[:, CROP_DRAWS:], normalise=view.output != "uint8", mean=view.mean, std=view.std
    )
    return crop_windows(view, draws, patch_px, patch_px), changes


def boxes(windows: Sequence[CropWindows]) -> tuple[Int32, Int32]:
    """Return per sample the box around all views' windows: upper left corner and size, int32[n, 2] each (x, y)."""
    starts = np.min([np.stack([each.x0, each.y0], axis=1) for each in windows], axis=0)
    ends = [np.stack([each.x0 + each.width, each.y0 + each.height], axis=1) for each in windows]
    return starts, np.max(ends, axis=0) - starts


def shown_share(views: Sequence[CropView], patch_px: int) -> float:
    """Return the mean share of a patch's area that the box around all views' windows has, of a few hundred draws."""
    positions = np.arange(256)
    drawn = [
        draw_view(view, number, seed=0, positions=positions, patch_px=patch_px) for number, view in enumerate(views)
    ]
    _, sizes = boxes([windows for windows, _ in drawn])
    return float(sizes.prod(axis=1).mean() / patch_px**2)


def dino_views(
    large_px: int = 224,
    small_px: int = 96,
    *,
    num_small: int = 8,
    large_scale: tuple[float, float] = (0.32, 1.0),
    small_scale: tuple[float, float] = (0.05, 0.32),
    ect: Ect | None = None,
    solarise: float = 0.2,
    output: Literal["uint8", "float16", "float32"] = "float32",
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> list[CropView]:
    """Return the two large and `num_small` small views of DINO (Caron et al. 2021; the values of DINOv2).

    Without `ect` the windows have shares of the patch's area between the two numbers of large_scale and small_scale
    (HIPT: 0.4 to 1 and 0.05 to 0.4) and aspects of 3/4 to 4/3. With one, as Virchow2 does: dino_views(224, 98,
    ect=Ect(), solarise=0.0), of patches of 392 px. solarise: the probability in the second large view.
    """
    aspect = (3 / 4, 4 / 3)
    large = ect or Ect(large_scale, aspect, "patch_area")
    small = ect or Ect(small_scale, aspect, "patch_area")
    views = []
    for size_px, window, blur, inverted in (
        (large_px, large, 1.0, 0.0),
        (large_px, large, 0.1, solarise),
        *[(small_px, small, 0.5, 0.0)] * num_small,
    ):
        augment = Augment(jitter=0.8, grey=0.2, blur=blur, solarise=inverted)
        views.append(CropView(size_px, output=output, mean=mean, std=std, rotations=True, ect=window, augment=augment))
    return views
