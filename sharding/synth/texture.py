"""The pixels of one TIFF tile: two stains laid on glass, by stamps and lookups.

A pixel is first two numbers, how much haematoxylin and how much eosin (0 to 255 each); one table turns the pair into
a colour by Beer and Lambert's law. Tables with prime periods lie over each other and every cell is placed by a hash of
its own coordinates, so nothing repeats and a tile needs no neighbour.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sharding.synth.cells import ANGLE_VECTORS, LYMPHOCYTES, SPINDLES_PER_ANGLE, stroma_stamps, tumour_stamps
from sharding.synth.layout import FAR_PX, NODE_PX, Nodes
from sharding.synth.noise import Torus, hash_grid, seed_key, to_bytes, torus_noise, uniform
from sharding.synth.spec import SlideSpec

Pixels = NDArray[np.uint8]

GLASS_RGB = (241, 239, 242)
GLASS_VARIANTS = 16
TUMOUR_PITCH_UM, STROMA_PITCH_UM = 13.0, 23.0
# Half the tissue edge's width at level 0, and that of the blend between tumour and stroma.
_EDGE_PX, _BLEND_PX = 1.5, 20.0
_FIBRE_PERIOD_PX = 1024
# Fibre coordinates are shifted so that truncation to integer never crosses zero.
_POSITIVE = float(1 << 18)
_INKS = ((28, 122, 66), (36, 58, 150), (38, 38, 46))


class Painter:
    """Paints the tiles of one slide; holds its colours and the shared tables, a few MB."""

    def __init__(self, spec: SlideSpec) -> None:
        self._key, self._tile_px = spec.key, spec.tile_px
        self._size = (spec.width_px, spec.height_px)
        self._pitches_px = tuple(round(um * spec.px_per_um) for um in (TUMOUR_PITCH_UM, STROMA_PITCH_UM))
        self._tumour, self._stroma = tumour_stamps(spec.px_per_um), stroma_stamps(spec.px_per_um)
        self._fibres = _fibre_table(spec.px_per_um)
        self._body, self._mottle, self._grain = _isotropic_tables(spec.px_per_um, spec.tile_px)
        self._glass = _glass_tables(spec.tile_px)
        self._colours = _colour_table(spec)
        self._shift = [seed_key(spec.key, 70, i) % 4096 for i in range(6)]
        self._ink_rgb = np.array(_INKS[seed_key(spec.key, 71) % len(_INKS)], np.uint16)
        # A cell may lie half a stamp outside the tile, and its stamp reaches another half beyond that.
        self._band_px = max(self._tumour.size_px, self._stroma.size_px) + 2
        #: Nodes that `paint` needs beyond the tile on every side, for cells whose middle lies outside.
        self.margin_nodes = -(-self._band_px // NODE_PX) + 1

    def glass_kind(self, x0: int, y0: int) -> tuple[int, int]:
        """Which glass the tile at (x0, y0) shows: (noise variant, brightness step). Few kinds: their JPEGs are kept."""
        variant = seed_key(self._key, 80, x0, y0) % GLASS_VARIANTS
        (width, height), corner = self._size, seed_key(self._key, 81) % 4
        across, down = min(x0 / width, 1.0), min(y0 / height, 1.0)
        # A faint fall of the lamp's light towards one corner, in steps that the noise hides.
        toward = (across if corner & 1 else 1 - across) + (down if corner & 2 else 1 - down)
        return variant, -int(1.6 * toward)

    def glass(self, kind: tuple[int, int]) -> Pixels:
        """A tile of nothing but glass: (tile, tile, 3) uint8."""
        plain = np.empty((self._tile_px, self._tile_px, 3), np.uint8)
        plain[:] = np.array(self._colours[:1]).view(np.uint8)[:3]
        return plain + self._glass[kind[0]] + np.array(kind[1]).astype(np.uint8)

    def paint(self, x0: int, y0: int, nodes: Nodes) -> Pixels:
        """Paint the tile whose first pixel is level-0 (x0, y0): (tile, tile, 3) uint8.

        `nodes` reaches `margin_nodes` beyond the tile on all four sides; its first node lies at
        (x0, y0) - 16 * margin_nodes.
        """
        m, n = self.margin_nodes, self._tile_px // NODE_PX + 1
        tissue, stain, ink = (f[m : m + n, m : m + n] for f in (nodes.tissue, nodes.stain, nodes.ink))
        stains = self._ground(x0, y0, nodes)
        stains = np.maximum(stains, self._cells(x0, y0, nodes))
        stains += self._grain.window(x0 + self._shift[0], y0 + self._shift[1])
        # Strength of both stains in 1/128: none on glass, falling over a few px at the tissue's edge.
        strength = _upsample(118.0 + 9.0 * stain)
        if tissue.min() < _EDGE_PX:
            strength *= np.clip(_upsample(tissue) * (0.5 / _EDGE_PX) + 0.5, 0.0, 1.0)
        scaled = (stains * strength.astype(np.uint16)) >> np.uint16(7)
        pixels = self._colours.take((scaled[0] << np.uint16(8)) | scaled[1])
        rgb = np.ascontiguousarray(pixels.view(np.uint8).reshape(self._tile_px, self._tile_px, 4)[:, :, :3])
        if ink.max() > -FAR_PX:
            rgb = self._draw_ink(rgb, x0, y0, _upsample(ink))
        variant, step = self.glass_kind(x0, y0)
        # Sums are modulo 256 and the table stays clear of 0 and 255, so signed noise can be added as bytes.
        return rgb + self._glass[variant] + np.array(step).astype(np.uint8)

    def _ground(self, x0: int, y0: int, nodes: Nodes) -> NDArray[np.uint16]:
        """Everything but cells: (2, tile, tile) uint16, haematoxylin and eosin."""
        m, n = self.margin_nodes, self._tile_px // NODE_PX + 1
        tumour = nodes.tumour[m : m + n, m : m + n]
        t = self._tile_px
        ground = np.empty((2, t, t), np.uint16)
        mottle = self._mottle.window(x0 + self._shift[2], y0 + self._shift[3])
        if tumour.min() < _BLEND_PX:
            along = _upsample(nodes.fibre_along[m : m + n, m : m + n] + np.float32(_POSITIVE)).astype(np.int32)
            across = _upsample(nodes.fibre_across[m : m + n, m : m + n] + np.float32(_POSITIVE)).astype(np.int32)
            mask = _FIBRE_PERIOD_PX - 1
            fibres = self._fibres.take(((across & mask) * _FIBRE_PERIOD_PX) | (along & mask))
            ground[0] = 5 + (mottle >> 5)
            ground[1] = fibres - (mottle >> 3)
        if tumour.max() > -_BLEND_PX:
            body = self._body.window(x0 + self._shift[4], y0 + self._shift[5])
            own = np.stack([20 + (body >> 4) + (mottle >> 4), 64 + (body >> 3) - (mottle >> 4)]).astype(np.uint16)
            if tumour.min() >= _BLEND_PX:
                return own
            weight = np.clip(_upsample(tumour) * (64 / _BLEND_PX) + 64.0, 0.0, 128.0).astype(np.uint16)
            ground = (ground * (128 - weight) + own * weight) >> np.uint16(7)
        return ground

    def _cells(self, x0: int, y0: int, nodes: Nodes) -> NDArray[np.uint8]:
        """All cells that reach into the tile: (2, tile, tile) uint8."""
        m = self._band_px
        canvas = np.zeros((2, self._tile_px + 2 * m, self._tile_px + 2 * m), np.uint8)
        for is_stroma in (False, True):
            self._stamp(canvas, x0 - m, y0 - m, nodes, is_stroma=is_stroma)
        return canvas[:, m:-m, m:-m]

    def _stamp(self, canvas: Pixels, left: int, top: int, nodes: Nodes, *, is_stroma: bool) -> None:
        """Lay one kind of cell onto `canvas` (2, h, w), whose first pixel is level-0 (left, top).

        Cells sit on a grid of `pitch_px`, every second row shifted by half, each moved by its own hash.
        """
        stamps, pitch_px = (self._stroma if is_stroma else self._tumour), self._pitches_px[is_stroma]
        side, half = canvas.shape[1], stamps.size_px // 2
        columns = np.arange(left // pitch_px - 1, (left + side) // pitch_px + 2)
        rows = np.arange(top // pitch_px - 1, (top + side) // pitch_px + 2)
        words = hash_grid(seed_key(self._key, 90 + is_stroma), columns, rows)
        # Movement by up to 0.35 pitch (stroma: 0.5), from ten bits for each axis.
        move = np.array(pitch_px * (1000 if is_stroma else 700), np.int64)
        moved_x = ((words & np.uint64(1023)).astype(np.int64) - 512) * move // 1024000
        moved_y = (((words >> np.uint64(10)) & np.uint64(1023)).astype(np.int64) - 512) * move // 1024000
        cx = (columns * pitch_px)[None, :] + ((rows & 1) * (pitch_px // 2))[:, None] + moved_x - left
        cy = (rows * pitch_px)[:, None] + moved_y - top
        keep = (cx >= half) & (cx < side - half) & (cy >= half) & (cy < side - half)
        cx, cy, words = cx[keep], cy[keep], words[keep]
        # The class at a cell's middle decides for the whole cell: no nucleus is cut by the border.
        offset = self.margin_nodes * NODE_PX - self._band_px + NODE_PX // 2
        column, row = (cx + offset) // NODE_PX, (cy + offset) // NODE_PX
        tissue, tumour = nodes.tissue[row, column], nodes.tumour[row, column]
        pick = ((words >> np.uint64(20)) & np.uint64(0xFFFF)).astype(np.int64)
        present = ((words >> np.uint64(36)) & np.uint64(1023)).astype(np.int64)
        if is_stroma:
            keep = (tissue > half * 0.4) & (tumour < -0.3 * half) & (present < 700)
            angle = _fibre_angle(nodes, row, column)
            spindles = len(stamps.pictures) - LYMPHOCYTES
            pick = np.where(
                present < 60, spindles + pick % LYMPHOCYTES, angle * SPINDLES_PER_ANGLE + pick % SPINDLES_PER_ANGLE
            )
        else:
            keep = (tissue > half * 0.4) & (tumour > 0) & (present < 985)
            pick %= len(stamps.pictures)
        pictures, size = stamps.pictures, stamps.size_px
        for x, y, k in zip((cx - half)[keep].tolist(), (cy - half)[keep].tolist(), pick[keep].tolist(), strict=True):
            window = canvas[:, y : y + size, x : x + size]
            np.maximum(window, pictures[k], out=window)

    def _draw_ink(self, rgb: Pixels, x0: int, y0: int, ink: NDArray[np.float32]) -> Pixels:
        """Cover pixels where `ink` (distance into the stroke in px) is positive; ink is streaky, never opaque."""
        streaks = self._body.window(x0 + self._shift[5], y0 + self._shift[4]) >> 3
        cover = np.clip(ink * 0.5 + 0.5, 0.0, 1.0) * (212 + streaks)
        cover = cover.astype(np.uint16)[:, :, None]
        return ((rgb * (256 - cover) + self._ink_rgb * cover) >> np.uint16(8)).astype(np.uint8)


def _upsample(nodes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear from (n + 1, n + 1) nodes to (16 n, 16 n) pixels, at pixel middles; float32."""
    n = len(nodes) - 1
    t = ((np.arange(NODE_PX) + 0.5) / NODE_PX).astype(np.float32)
    down = nodes[:-1, None, :] + t[None, :, None] * (nodes[1:] - nodes[:-1])[:, None, :]
    down = down.reshape(n * NODE_PX, n + 1)
    return (down[:, :-1, None] + t * (down[:, 1:] - down[:, :-1])[:, :, None]).reshape(n * NODE_PX, n * NODE_PX)


def _fibre_angle(nodes: Nodes, row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    """The direction (index into ANGLE_VECTORS) along the fibres at some nodes: (n,) int64."""
    f = nodes.fibre_across
    row, column = np.clip(row, 0, f.shape[0] - 2), np.clip(column, 0, f.shape[1] - 2)
    here = f[row, column]
    gx, gy = f[row, column + 1] - here, f[row + 1, column] - here
    # Along is across the gradient.
    fit = np.abs(ANGLE_VECTORS[:, :1] * -gy + ANGLE_VECTORS[:, 1:] * gx)
    return np.argmax(fit, axis=0)


@lru_cache(maxsize=4)
def _fibre_table(px_per_um: float) -> NDArray[np.uint16]:
    """Eosin by (across, along), flat (1024 * 1024,) uint16: long thin strands with pale clefts between bundles."""
    n, um = _FIBRE_PERIOD_PX, px_per_um
    bundle = torus_noise(7101, n, n, 9 * um, 120 * um)
    strand = torus_noise(7102, n, n, 2.6 * um, 60 * um)
    thread = torus_noise(7103, n, n, 1.1 * um, 24 * um)
    cleft = np.clip(1.0 - np.abs(torus_noise(7104, n, n, 7 * um, 70 * um)) * 9.0, 0.0, 1.0)
    values = 106 + 24 * bundle + 22 * strand + 18 * thread - 42 * cleft
    return to_bytes(values, 70, 175).astype(np.uint16).ravel()


@lru_cache(maxsize=4)
def _isotropic_tables(px_per_um: float, tile_px: int) -> tuple[Torus, Torus, Torus]:
    """Cytoplasm, slow mottle and fine grain, each 0 to 255, with prime periods."""
    um = px_per_um

    def blend(key: int, period: int, coarse: tuple[float, float], fine: tuple[float, float]) -> NDArray[np.float64]:
        """Two octaves, each (strength, cell in px), around 128."""
        layers = [s * torus_noise(key + i, period, period, c, c) for i, (s, c) in enumerate((coarse, fine))]
        return 128 + layers[0] + layers[1]

    body = blend(7201, 769, (70, 3 * um), (50, 1.2 * um))
    mottle = blend(7203, 1021, (80, 25 * um), (45, 6 * um))
    grain = blend(7205, 887, (60, 3.1), (64, 1.3))
    # Grain adds 0 to 15 to both stains.
    tables = (body, mottle, np.clip(grain, 0, 255) / 17)
    first, second, third = (Torus(to_bytes(table, 0, 255), tile_px) for table in tables)
    return first, second, third


@lru_cache(maxsize=2)
def _glass_tables(tile_px: int) -> Pixels:
    """Sensor noise, sigma about 1.2 grey levels: (variants, tile, tile, 3) uint8, negatives modulo 256."""
    rows = np.arange(GLASS_VARIANTS * tile_px)
    tables = np.zeros((GLASS_VARIANTS * tile_px, tile_px, 3), np.int16)
    for channel in range(3):
        words = hash_grid(7301 + channel, np.arange(tile_px), rows)
        total = sum(((words >> np.uint64(8 * i)) & np.uint64(0xFF)).astype(np.int16) for i in range(4))
        # Four bytes sum to 510 +- 148.
        tables[:, :, channel] = (total - 510 + 60) // 120
    return tables.astype(np.uint8).reshape(GLASS_VARIANTS, tile_px, tile_px, 3)


def _colour_table(spec: SlideSpec) -> NDArray[np.uint32]:
    """RGB, packed in the low three bytes, by haematoxylin * 256 + eosin: (65536,) uint32; slides differ a bit."""
    u = [2 * uniform(spec.key, 75, j) - 1 for j in range(6)]
    haematoxylin = np.array([0.68 + 0.03 * u[0], 0.70, 0.32 + 0.03 * u[1]]) * (0.96 + 0.08 * u[2])
    eosin = np.array([0.08 + 0.02 * u[3], 0.64, 0.36 + 0.04 * u[4]]) * (0.98 + 0.08 * u[5])
    amount = np.arange(256) / 255
    density = amount[:, None, None] * 1.25 * haematoxylin + amount[None, :, None] * 0.75 * eosin
    rgb = to_bytes(np.array(GLASS_RGB) * 10.0**-density, 12, 243).reshape(-1, 3).astype(np.uint32)
    return rgb[:, 0] | rgb[:, 1] << np.uint32(8) | rgb[:, 2] << np.uint32(16)
