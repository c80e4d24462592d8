"""Hashed numbers and smooth noise: pure functions of a key and of coordinates.

Only IEEE-exact operations (+ - * / floor sqrt) make fields, never sin, exp or a floating-point sum over an array:
numpy picks another kernel for those on every CPU generation, and painted slides must be byte-identical on all of them.
The few sines and powers elsewhere (stamp directions, ink, the colour table) are rounded far above their last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.hashing import splitmix64

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_STEP_X, _STEP_Y = 0xD6E8FEB86659FD93, 0xCA5A826395121157


def seed_key(*parts: int) -> int:
    """Hash integers, in order, into one 64-bit key (splitmix64 over the sequence)."""
    state = 0
    for part in parts:
        z = (state ^ (part & _MASK)) + _GOLDEN & _MASK
        z = (z ^ z >> 30) * _MUL1 & _MASK
        z = (z ^ z >> 27) * _MUL2 & _MASK
        state = z ^ z >> 31
    return state


def uniform(key: int, *parts: int) -> float:
    """A number in [0, 1) that depends on `key` and `parts` alone."""
    return (seed_key(key, *parts) >> 11) / (1 << 53)


def hash_grid(key: int, ix: NDArray[np.int64], iy: NDArray[np.int64]) -> Words:
    """Hash every point of an integer grid: (len(iy), len(ix)) uint64 from two int64 axes."""
    hx = splitmix64(ix.astype(np.uint64) * np.uint64(_STEP_X) + np.uint64(key))
    return splitmix64(hx[None, :] ^ (iy.astype(np.uint64) * np.uint64(_STEP_Y))[:, None])


def _fade(t: Floats) -> Floats:
    """Quintic easing: first and second derivative are continuous over lattice lines, so none shows."""
    return t * t * t * (t * (t * 6.0 - 15.0) + 10.0)


def _interpolate(lattice: Floats, ix: NDArray[np.int64], iy: NDArray[np.int64], wx: Floats, wy: Floats) -> Floats:
    rows = lattice[:, ix] * (1.0 - wx) + lattice[:, ix + 1] * wx
    return rows[iy] * (1.0 - wy)[:, None] + rows[iy + 1] * wy[:, None]


def _signed(words: Words) -> Floats:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def value_noise(key: int, xs: Floats, ys: Floats, cell_px: float) -> Floats:
    """Smooth noise in [-1, 1] of wavelength about 2 `cell_px` at the grid points xs x ys: (len(ys), len(xs))."""
    fx, fy = xs / cell_px, ys / cell_px
    ix, iy = np.floor(fx).astype(np.int64), np.floor(fy).astype(np.int64)
    lattice_x = np.arange(ix.min(), ix.max() + 2)
    lattice_y = np.arange(iy.min(), iy.max() + 2)
    lattice = _signed(hash_grid(key, lattice_x, lattice_y))
    return _interpolate(lattice, ix - lattice_x[0], iy - lattice_y[0], _fade(fx - ix), _fade(fy - iy))


def fractal_noise(key: int, xs: Floats, ys: Floats, cell_px: float, smallest_px: float, *, gain: float = 0.5) -> Floats:
    """Octaves of `value_noise` from `cell_px` down to `smallest_px`, each `gain` times as strong."""
    total = np.zeros((len(ys), len(xs)))
    octave, weight = 0, 1.0
    while octave == 0 or cell_px >= smallest_px:
        # Every octave has its own origin, or all their lattice lines would meet at (0, 0).
        shift = 1000.0 * uniform(key, octave)
        total += weight * value_noise(seed_key(key, octave), xs + shift * cell_px, ys + shift * cell_px, cell_px)
        octave, weight, cell_px = octave + 1, weight * gain, cell_px / 2.03
    return total


def torus_noise(key: int, height: int, width: int, cell_y: float, cell_x: float) -> Floats:
    """Smooth noise in [-1, 1] that continues over its own edges: (height, width) float64."""
    ny, nx = max(2, round(height / cell_y)), max(2, round(width / cell_x))
    lattice = _signed(hash_grid(key, np.arange(nx), np.arange(ny)))
    lattice = np.pad(lattice, ((0, 1), (0, 1)), mode="wrap")
    fx, fy = np.arange(width) * (nx / width), np.arange(height) * (ny / height)
    ix, iy = np.floor(fx).astype(np.int64), np.floor(fy).astype(np.int64)
    return _interpolate(lattice, ix, iy, _fade(fx - ix), _fade(fy - iy))


class Torus:
    """A square table that repeats in both directions; reading a window is one slice.

    Tables of different prime periods laid over each other repeat only after the product of the periods: on no slide.
    """

    def __init__(self, table: NDArray[np.uint8], window_px: int) -> None:
        self.period = len(table)
        self._padded: NDArray[np.uint8] = np.pad(table, ((0, window_px), (0, window_px)), mode="wrap")
        self._window_px = window_px

    def window(self, x0: int, y0: int) -> NDArray[np.uint8]:
        """(window_px, window_px) uint8 view whose first element is table[y0 mod period, x0 mod period]."""
        x, y = x0 % self.period, y0 % self.period
        return self._padded[y : y + self._window_px, x : x + self._window_px]


def to_bytes(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Round to uint8 after clipping to [low, high] (both within 0 to 255); same shape."""
    return np.floor(np.clip(values, low, high) + 0.5).astype(np.uint8)
