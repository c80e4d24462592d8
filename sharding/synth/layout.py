"""Where tissue, tumour, hole and ink lie: smooth fields known at nodes every 16 level-0 px.

Between nodes fields are bilinear, at pixels and at truth pixels alike, so a slide's pixels and its truth come from the
same numbers, and a row of tiles needs only its own nodes: memory does not grow with the slide's height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.synth.noise import Floats, fractal_noise, seed_key, uniform, value_noise
from sharding.synth.spec import SlideSpec

NODE_PX = 16
# Signed distances are cut here: nothing that is painted looks further.
FAR_PX = 64.0
_COARSE = 192


@dataclass(frozen=True, slots=True)
class Nodes:
    """Fields at a grid of nodes, each (rows, columns) float32.

    Attributes:
        tissue: signed distance to the tissue's edge in px, positive inside, cut to +-64.
        tumour: the same for the tumour's border (defined outside tissue too).
        ink: the same for pen strokes.
        stain: slow variation of the stain's strength, about -1 to 1.
        fibre_along: px along the stroma's fibres.
        fibre_across: px across them; its gradient is the direction across.
    """

    tissue: NDArray[np.float32]
    tumour: NDArray[np.float32]
    ink: NDArray[np.float32]
    stain: NDArray[np.float32]
    fibre_along: NDArray[np.float32]
    fibre_across: NDArray[np.float32]

    def columns(self, start: int, stop: int) -> Nodes:
        return Nodes(*(getattr(self, name)[:, start:stop] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Ellipse:
    """An ellipse by centre, semi-axes in px and its first axis' direction (cos, sin)."""

    cx: float
    cy: float
    a_px: float
    b_px: float
    cos: float = 1.0
    sin: float = 0.0

    def radius(self, xs: Floats, ys: Floats) -> Floats:
        """0 at the centre, 1 on the outline: (len(ys), len(xs)) float64."""
        dx, dy = (xs - self.cx)[None, :], (ys - self.cy)[:, None]
        u, v = (dx * self.cos + dy * self.sin) / self.a_px, (dy * self.cos - dx * self.sin) / self.b_px
        return np.sqrt(u * u + v * v)


class Layout:
    """The plan of one slide; every method is a pure function of the spec and of coordinates."""

    def __init__(self, spec: SlideSpec) -> None:
        self.spec = spec
        self._key = spec.key
        self._um = spec.px_per_um
        self._islands = _place_islands(spec)
        largest = max(self._islands, key=lambda island: island.a_px * island.b_px)
        self._scale_px = min(largest.a_px, largest.b_px)
        self._hole = _place_hole(spec, largest) if spec.hole else None
        # x/y direction of the stroma's fibres at large, by the rational parametrisation of the circle.
        t = 2.0 * uniform(self._key, 20) - 1.0
        self._fibre_dir = ((1 - t * t) / (1 + t * t), 2 * t / (1 + t * t))
        xs = (np.arange(_COARSE) + 0.5) * (spec.width_px / _COARSE)
        ys = (np.arange(_COARSE) + 0.5) * (spec.height_px / _COARSE)
        tissue = self._tissue(xs, ys) > 0
        self._tumour_level = self._find_tumour_level(xs, ys, tissue)
        self._strokes = _place_strokes(spec, largest, tissue) if spec.pen else []

    def nodes(self, x0: int, y0: int, columns: int, rows: int) -> Nodes:
        """Fields at `columns` x `rows` nodes from level-0 (x0, y0), both multiples of 16 and maybe negative."""
        assert x0 % NODE_PX == 0, x0
        assert y0 % NODE_PX == 0, y0
        # One node more on each side for the gradients.
        xs = x0 + NODE_PX * np.arange(-1, columns + 1, dtype=np.float64)
        ys = y0 + NODE_PX * np.arange(-1, rows + 1, dtype=np.float64)
        inner_x, inner_y = xs[1:-1], ys[1:-1]
        tissue = _distance_px(self._tissue(xs, ys))
        if self._tumour_level is None:
            tumour = np.full((rows, columns), -FAR_PX)
        else:
            tumour = _distance_px(self._tumour(xs, ys) - self._tumour_level)
        along, across = self._fibres(inner_x, inner_y)
        stain = value_noise(seed_key(self._key, 30), inner_x, inner_y, 300 * self._um)
        fields = (tissue, tumour, self._ink(inner_x, inner_y), stain, along, across)
        return Nodes(*(field.astype(np.float32) for field in fields))

    def _tissue(self, xs: Floats, ys: Floats) -> Floats:
        """Positive inside tissue; the outline is an ellipse disturbed by fractal noise down to about 30 um."""
        field = np.full((len(ys), len(xs)), -np.inf)
        for island in self._islands:
            field = np.maximum(field, 1.0 - island.radius(xs, ys))
        smallest_px = max(30 * self._um, 1.5 * NODE_PX)
        field += 0.22 * fractal_noise(seed_key(self._key, 10), xs, ys, 0.8 * self._scale_px, smallest_px, gain=0.55)
        if self._hole is not None:
            edge = 0.15 * fractal_noise(seed_key(self._key, 11), xs, ys, 0.2 * self._scale_px, smallest_px)
            # Times the hole's relative size, so that both terms measure in the same units.
            relative = self._hole.a_px / self._scale_px
            field = np.minimum(field, (self._hole.radius(xs, ys) - 1.0 + edge) * relative)
        return field

    def _tumour(self, xs: Floats, ys: Floats) -> Floats:
        smallest_px = max(60 * self._um, 2 * NODE_PX)
        return fractal_noise(seed_key(self._key, 12), xs, ys, 0.55 * self._scale_px, smallest_px, gain=0.45)

    def _find_tumour_level(self, xs: Floats, ys: Floats, tissue: NDArray[np.bool_]) -> float | None:
        wanted = self.spec.tumour_share_wanted
        if wanted == 0:
            return None
        values = np.sort(self._tumour(xs, ys)[tissue])
        return float(values[min(len(values) - 1, int((1.0 - wanted) * len(values)))])

    def _fibres(self, xs: Floats, ys: Floats) -> tuple[Floats, Floats]:
        um, (cos, sin) = self._um, self._fibre_dir
        x, y = xs[None, :], ys[:, None]
        waves = value_noise(seed_key(self._key, 21), xs, ys, 450 * um) * (230 * um)
        ripples = value_noise(seed_key(self._key, 22), xs, ys, 90 * um) * (26 * um)
        drift = value_noise(seed_key(self._key, 23), xs, ys, 350 * um) * (90 * um)
        return x * cos + y * sin + drift, y * cos - x * sin + waves + ripples

    def _ink(self, xs: Floats, ys: Floats) -> Floats:
        distance = np.full((len(ys), len(xs)), -FAR_PX)
        for stroke in self._strokes:
            for (ax, ay), (bx, by) in zip(stroke.points, stroke.points[1:], strict=False):
                reach = stroke.radius_px + FAR_PX
                if min(ay, by) - reach > ys[-1] or max(ay, by) + reach < ys[0]:
                    continue
                dx, dy = (xs - ax)[None, :], (ys - ay)[:, None]
                ex, ey = bx - ax, by - ay
                t = np.clip((dx * ex + dy * ey) / max(ex * ex + ey * ey, 1.0), 0.0, 1.0)
                dx, dy = dx - t * ex, dy - t * ey
                distance = np.maximum(distance, stroke.radius_px - np.sqrt(dx * dx + dy * dy))
        return np.clip(distance, -FAR_PX, FAR_PX)


def _distance_px(field: Floats) -> Floats:
    """Turn any field into a signed distance near its zero: the value over its gradient; one node less on every side."""
    gx = (field[1:-1, 2:] - field[1:-1, :-2]) / (2 * NODE_PX)
    gy = (field[2:, 1:-1] - field[:-2, 1:-1]) / (2 * NODE_PX)
    return np.clip(field[1:-1, 1:-1] / np.maximum(np.sqrt(gx * gx + gy * gy), 1e-9), -FAR_PX, FAR_PX)


def _place_islands(spec: SlideSpec) -> list[Ellipse]:
    """One to three ellipses in slots along the slide's longer side."""
    key, width, height = spec.key, spec.width_px, spec.height_px
    count = 1 if min(width, height) < 1500 else 1 + seed_key(key, 40) % 3
    islands = []
    for i in range(count):
        u = [uniform(key, 41, i, j) for j in range(5)]
        long_px, short_px = max(width, height) / count, min(width, height)
        long_c, short_c = long_px * (i + 0.47 + 0.06 * u[0]), short_px * (0.46 + 0.08 * u[1])
        long_a, short_a = long_px * (0.33 + 0.04 * u[2]), short_px * (0.30 + 0.07 * u[3])
        t = 0.2 * (2 * u[4] - 1)
        turn = ((1 - t * t) / (1 + t * t), 2 * t / (1 + t * t))
        if width >= height:
            islands.append(Ellipse(long_c, short_c, long_a, short_a, *turn))
        else:
            islands.append(Ellipse(short_c, long_c, short_a, long_a, *turn))
    return islands


def _place_hole(spec: SlideSpec, island: Ellipse) -> Ellipse:
    u = [uniform(spec.key, 50, j) for j in range(4)]
    size = min(island.a_px, island.b_px)
    cx, cy = island.cx + 0.12 * size * (2 * u[0] - 1), island.cy + 0.12 * size * (2 * u[1] - 1)
    return Ellipse(cx, cy, size * (0.24 + 0.06 * u[2]), size * (0.24 + 0.06 * u[3]))


@dataclass(frozen=True, slots=True)
class Stroke:
    """A pen stroke: a line through level-0 points, `radius_px` thick on both sides."""

    points: list[tuple[int, int]]
    radius_px: float


def _place_strokes(spec: SlideSpec, island: Ellipse, tissue: NDArray[np.bool_]) -> list[Stroke]:
    """Arcs around an island, chosen among candidates for touching the least tissue; `tissue` is (192, 192)."""
    radius_px = max(8.0, min(0.012 * min(spec.width_px, spec.height_px), 400 * spec.px_per_um))
    border = radius_px + 0.01 * min(spec.width_px, spec.height_px)
    candidates = []
    for k in range(16):
        start, length = 2 * math.pi * uniform(spec.key, 60, k), 1.2 + 1.4 * uniform(spec.key, 61, k)
        away = 1.3 + 0.2 * uniform(spec.key, 62, k)
        points = []
        for s in range(19):
            angle, wobble = start + length * s / 18, away * (1 + 0.04 * math.sin(5.0 * s / 18 + start))
            x = island.cx + wobble * island.a_px * math.cos(angle)
            y = island.cy + wobble * island.b_px * math.sin(angle)
            # Whole pixels: the last bit of a sine may differ between machines.
            x, y = min(max(x, border), spec.width_px - border), min(max(y, border), spec.height_px - border)
            points.append((round(x), round(y)))
        touched = sum(bool(tissue[y * _COARSE // spec.height_px, x * _COARSE // spec.width_px]) for x, y in points)
        candidates.append((touched, k, points))
    best = sorted(candidates)[: 1 + seed_key(spec.key, 63) % 2]
    return [Stroke(points, radius_px) for _, _, points in best]
