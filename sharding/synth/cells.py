"""Nuclei and cell bodies as small pictures (stamps), drawn once per resolution and laid down everywhere.

A stamp is uint8 (2, size, size): how much haematoxylin and how much eosin, 0 to 255. Stamps are combined by maximum,
which does not depend on their order: a cell on the edge of two tiles is the same on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sharding.synth.noise import Floats, seed_key, to_bytes, uniform, value_noise

TUMOUR_STAMPS = 192
ANGLES = 16
SPINDLES_PER_ANGLE = 10
LYMPHOCYTES = 24
# Unit vectors of ANGLES directions over half a turn, rounded so that every machine has the same.
ANGLE_VECTORS: NDArray[np.float64] = np.round(
    [[np.cos(np.pi * i / ANGLES), np.sin(np.pi * i / ANGLES)] for i in range(ANGLES)], 6
)


@dataclass(frozen=True, slots=True)
class Stamps:
    """A library of stamps: `pictures` is (n, 2, size_px, size_px) uint8."""

    pictures: NDArray[np.uint8]
    size_px: int


@lru_cache(maxsize=4)
def tumour_stamps(px_per_um: float) -> Stamps:
    """Large pleomorphic nuclei (10 to 14 um, some up to 17) in round cell bodies of about 18 um."""
    size = 2 * round(10.5 * px_per_um) + 2
    pictures = np.zeros((TUMOUR_STAMPS, 2, size, size), np.uint8)
    for k in range(TUMOUR_STAMPS):
        key = seed_key(7001, k)
        u = [uniform(key, j) for j in range(10)]
        long_um = 4.9 + 2.0 * u[0] + (1.6 if u[1] > 0.9 else 0.0)
        grain = _Grain(key, size, px_per_um)
        turn = 2 * u[3] - 1
        cos, sin = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
        radius = _radius(size, long_um * px_per_um, long_um * (0.68 + 0.3 * u[2]) * px_per_um, cos, sin)
        radius = radius + 0.16 * grain.at(5.0) + 0.06 * grain.at(2.0)
        inside = _soft(radius, long_um * px_per_um)
        # Vesicular nuclei are pale with a dark rim, hyperchromatic ones dark throughout.
        pale = 0.45 if u[4] > 0.45 else 0.12
        chromatin = 1.0 - pale + 0.30 * grain.at(1.1) + 0.16 * grain.at(2.2)
        chromatin = np.maximum(chromatin, np.clip((radius - 0.72) * 4.5, 0.0, 0.95))
        for spot in range(1 + int(2.2 * u[5]) if pale > 0.3 else 0):
            sx, sy = (0.7 * long_um * px_per_um * (uniform(key, 20, spot, axis) - 0.5) for axis in (0, 1))
            near = _radius(size, 1.25 * px_per_um, 1.1 * px_per_um, 1.0, 0.0, cx=sx, cy=sy)
            chromatin = np.maximum(chromatin, 1.15 * _soft(near, 1.25 * px_per_um))
        nucleus = inside * (128 + 46 * u[6]) * np.clip(chromatin, 0.25, 1.2)
        body = _radius(size, (7.6 + 1.6 * u[7]) * px_per_um, (6.9 + 1.4 * u[8]) * px_per_um, cos, sin)
        body = _soft(body + 0.14 * grain.at(4.0), 1.6 * px_per_um)
        pictures[k, 0] = to_bytes(np.maximum(nucleus, body * (34 + 14 * u[9] + 8 * grain.at(1.5))), 0, 235)
        pictures[k, 1] = to_bytes(body * (78 + 26 * u[6] + 14 * grain.at(1.8)), 0, 235)
    return Stamps(pictures, size)


@lru_cache(maxsize=4)
def stroma_stamps(px_per_um: float) -> Stamps:
    """Thin spindle nuclei (about 4 x 12 um) in 16 directions, then small round lymphocytes (6 to 7 um)."""
    size = 2 * round(9.0 * px_per_um) + 2
    pictures = np.zeros((ANGLES * SPINDLES_PER_ANGLE + LYMPHOCYTES, 2, size, size), np.uint8)
    for k in range(len(pictures)):
        key = seed_key(7002, k)
        u = [uniform(key, j) for j in range(5)]
        grain = _Grain(key, size, px_per_um)
        if k < ANGLES * SPINDLES_PER_ANGLE:
            cos, sin = ANGLE_VECTORS[k // SPINDLES_PER_ANGLE]
            half_um, width_um, dark = 4.6 + 2.6 * u[0], 1.5 + 0.9 * u[1], 120 + 45 * u[2]
            radius = _radius(size, half_um * px_per_um, width_um * px_per_um, cos, sin) + 0.14 * grain.at(3.0)
            inside = _soft(radius, width_um * px_per_um)
        else:
            half_um, dark = 2.9 + 0.6 * u[0], 165 + 30 * u[2]
            radius = _radius(size, half_um * px_per_um, half_um * (0.85 + 0.15 * u[1]) * px_per_um, 1.0, 0.0)
            inside = _soft(radius + 0.08 * grain.at(2.0), half_um * px_per_um)
        pictures[k, 0] = to_bytes(inside * dark * (0.9 + 0.22 * grain.at(1.0)), 0, 235)
    return Stamps(pictures, size)


class _Grain:
    """Smooth noise over one stamp at any scale."""

    def __init__(self, key: int, size: int, px_per_um: float) -> None:
        self._key, self._axis, self._px_per_um = key, np.arange(size, dtype=np.float64), px_per_um

    def at(self, cell_um: float) -> Floats:
        """(size, size) float64 in [-1, 1]; cells below 1.2 px would be white noise and are widened to that."""
        cell_px = max(cell_um * self._px_per_um, 1.2)
        return value_noise(seed_key(self._key, round(10 * cell_um)), self._axis + 0.37 * cell_px, self._axis, cell_px)


def _radius(size: int, a_px: float, b_px: float, cos: float, sin: float, *, cx: float = 0.0, cy: float = 0.0) -> Floats:
    """0 at (cx, cy) from the middle, 1 on the ellipse's outline: (size, size) float64."""
    axis = np.arange(size) - (size - 1) / 2
    dx, dy = (axis - cx)[None, :], (axis - cy)[:, None]
    u, v = (dx * cos + dy * sin) / max(a_px, 0.7), (dy * cos - dx * sin) / max(b_px, 0.7)
    return np.sqrt(u * u + v * v)


def _soft(radius: Floats, scale_px: float) -> Floats:
    """1 inside, 0 outside, falling over about 2 px at the outline, as a scanner's optics would show it."""
    return np.clip((1.0 - radius) * scale_px / 1.8 + 0.5, 0.0, 1.0)
