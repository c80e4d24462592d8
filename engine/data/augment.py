"""Augmentations of a crop's values: stain, colour, grey, blur and solarisation, drawn here as plain numbers per sample.

Everything linear is one 3 x 4 matrix per sample, the normalisation included: brightness, contrast, saturation, hue and
grey cost what normalising costs, and values are cut to the range of a pixel once, after all of them.
`engine.data.finish` applies what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

AUGMENT_DRAWS = 16
"""Uniform numbers that the augmentations of one crop consume, in this order: whether to jitter, brightness, contrast,
saturation, hue; whether to turn grey; whether to stain, then scale and shift of haematoxylin, eosin and DAB;
whether to blur, sigma; whether to solarise."""

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_GREY = np.tile(_LUMA, (3, 1))
# RGB to YIQ (FCC NTSC 1953). Turning the plane of I and Q turns the hue and leaves the luma.
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
# Optical density in R, G, B of haematoxylin, eosin and DAB: Ruifrok and Johnston 2001, "Quantification of
# histochemical staining by color deconvolution".
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@dataclass(frozen=True, slots=True)
class Augment:
    """Which augmentations a view gets. The first five are probabilities per crop; 0, the default, is off.

    jitter: brightness, contrast and saturation times 1 - x to 1 + x, hue turned by up to x of a full turn; contrast
    is about the grey of the view's `mean`, not of each crop. grey: luma in all channels. stain: the amounts of
    haematoxylin, eosin and DAB times 1 - stain_sigma to 1 + stain_sigma, plus up to stain_sigma either way, in optical
    density (natural logarithm; Tellez et al. 2018). That is a matrix too, but of logarithms: it cannot be part of
    the colour's, and comes before it. blur: Gaussian, sigma in px uniform between the two numbers of blur_sigma_px, cut
    off at twice the larger one. solarise: the upper half of the values is inverted. Applied in the order stain, jitter,
    grey, blur, solarise.
    """

    jitter: float = 0.0
    grey: float = 0.0
    stain: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    stain_sigma: float = 0.05
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "stain", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment {name} is {getattr(self, name)}; it has to be between 0 and 1")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("stain_sigma", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"augment {name} is {getattr(self, name)}; it has to be between 0 and {most}")
        if len(self.blur_sigma_px) != 2 or not 0 < self.blur_sigma_px[0] <= self.blur_sigma_px[1] < math.inf:
            raise ValueError(f"blur_sigma_px is {self.blur_sigma_px}; it has to be two numbers above 0, smaller first")

    @property
    def blur_radius_px(self) -> int:
        """Pixels to either side that a blurred pixel depends on."""
        return math.ceil(2 * self.blur_sigma_px[1])


class Changes(NamedTuple):
    """What becomes of a batch's crops, n of them: from uint8 pixels to a view's values. None: not in this view."""

    matrix: Float32 | None
    """[n, 3, 4]: channel c of the result is matrix[c, :3] @ (R, G, B in 0..255) + matrix[c, 3]."""
    stain: Float32 | None
    """[n, 3, 4]: the same of optical densities -ln((pixel + 1) / 256), before `matrix`; NaN where it is left out."""
    blur: Float32 | None
    """[n, radius + 1]: weight of the pixel itself and of those at 1, 2, ... px; (1, 0, 0, ...) changes nothing."""
    solarise: npt.NDArray[np.bool_] | None
    """[n]: whether to."""
    low: tuple[float, float, float]
    """Per channel what pixel 0 comes to; augmented values are cut to low..high."""
    high: tuple[float, float, float]
    """Per channel what pixel 255 comes to."""
    augmented: bool


def draw_changes(
    augment: Augment | None,
    draws: Float64,
    *,
    normalise: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Changes:
    """Turn draws, float64[n, AUGMENT_DRAWS] in [0, 1), into numbers for `engine.data.finish`.

    normalise: to (pixel / 255 - mean) / std; otherwise values stay in 0..255.
    """
    scale = 1 / (255 * np.array(std)) if normalise else np.ones(3)
    shift = -np.array(mean) / np.array(std) if normalise else np.zeros(3)
    low, high = _triple(shift), _triple(shift + 255 * scale)
    if augment is None:
        plain = np.column_stack([np.diag(scale), shift]).astype(np.float32)
        matrix = np.tile(plain, (len(draws), 1, 1)) if normalise else None
        return Changes(matrix, None, None, None, low, high, False)
    colours = _colours(augment, draws[:, :6], 255 * float(_LUMA @ np.array(mean))) * scale[:, None]
    colours[:, :, 3] += shift
    return Changes(
        colours.astype(np.float32),
        _stains(augment, draws[:, 6:13]).astype(np.float32) if augment.stain else None,
        _blurs(augment, draws[:, 13:15]).astype(np.float32) if augment.blur else None,
        draws[:, 15] < augment.solarise if augment.solarise else None,
        low,
        high,
        True,
    )


def _colours(augment: Augment, draws: Float64, centre: float) -> Float64:
    """Return jitter and grey as float64[n, 3, 4], of values in 0..255; `centre` is the grey that contrast leaves."""
    matrices = np.tile(np.eye(3, 4), (len(draws), 1, 1))
    around = 2 * draws[:, 1:5] - 1
    brightness, contrast, saturation = (
        1 + around[:, :3] * (augment.brightness, augment.contrast, augment.saturation)
    ).T[:, :, None, None]
    turn = 2 * np.pi * augment.hue * np.ascontiguousarray(around[:, 3])
    turned = np.tile(np.eye(3), (len(draws), 1, 1))
    turned[:, 1, 1] = turned[:, 2, 2] = np.cos(turn)
    turned[:, 2, 1] = np.sin(turn)
    turned[:, 1, 2] = -turned[:, 2, 1]
    hue = np.linalg.inv(_YIQ) @ turned @ _YIQ
    saturated = saturation * np.eye(3) + (1 - saturation) * _GREY
    jitter = draws[:, 0] < augment.jitter
    matrices[jitter, :, :3] = (brightness * contrast * (hue @ saturated))[jitter]
    matrices[jitter, :, 3] = ((1 - contrast[:, :, 0]) * centre)[jitter]
    grey = draws[:, 5] < augment.grey
    matrices[grey] = _GREY @ matrices[grey]
    return matrices


def _stains(augment: Augment, draws: Float64) -> Float64:
    """Return float64[n, 3, 4] of optical densities, NaN where a crop keeps its stain."""
    factors = 1 + augment.stain_sigma * (2 * draws[:, 1::2] - 1)
    amounts = augment.stain_sigma * (2 * draws[:, 2::2] - 1)
    matrices = np.empty((len(draws), 3, 4))
    # A density is a row of amounts times _STAINS, so the matrix that acts on columns is the transpose.
    matrices[:, :, :3] = _STAINS.T @ (factors[:, :, None] * np.linalg.inv(_STAINS).T)
    matrices[:, :, 3] = amounts @ _STAINS
    matrices[draws[:, 0] >= augment.stain] = np.nan
    return matrices


def _blurs(augment: Augment, draws: Float64) -> Float64:
    """Return float64[n, radius + 1]: the right half of each kernel, which sums to 1 as a whole."""
    low, high = augment.blur_sigma_px
    sigma = low + draws[:, 1] * (high - low)
    distance = np.arange(augment.blur_radius_px + 1)
    weights = np.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights /= 2 * weights.sum(axis=1, keepdims=True) - 1
    weights[draws[:, 0] >= augment.blur] = distance == 0
    return weights


def _triple(values: Float64) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue
