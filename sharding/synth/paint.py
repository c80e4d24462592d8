"""One slide from its spec: level 0 painted row of tiles by row of tiles, the upper levels and the truth on the way.

Memory holds one row of tiles of each level, the upper levels' encoded tiles (about a fifteenth of the file) and the
truth at 1/16; it grows with the slide's width, and with its height only through the latter two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sharding.synth.aperio import BIGTIFF_ABOVE_BYTES, Level, TileEncoder, write_pyramid
from sharding.synth.layout import FAR_PX, NODE_PX, Layout, Nodes
from sharding.synth.spec import PAINT_VERSION, TRUTH_DOWNSAMPLE, SlideSpec
from sharding.synth.texture import Painter

CLASSES = {"background": 0, "stroma": 1, "tumour": 2, "pen": 3}
Progress = Callable[[int], None]


def paint_slide(spec: SlideSpec, out_dir: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Paint one slide and its truth below `out_dir` and return the truth's JSON.

    Writes `SLIDE.svs`, `truth/SLIDE_tissue.png` (0 or 255: tissue, under ink too), `truth/SLIDE_class.png` (see
    `CLASSES`; ink wins) and last `truth/SLIDE.json`; each appears complete or not at all. A truth pixel speaks for the
    middle of its 16 x 16 block of level-0 pixels, and the pictures are ceil(size / 16) large. `tissue_share` is of
    the slide, `tumour_share` of the tissue (ink ignored). `progress` is called with the number of level-0 pixels done.
    """
    truth_dir = out_dir / "truth"
    truth_dir.mkdir(parents=True, exist_ok=True)
    canvas = _Canvas(spec, progress)
    levels = [Level(spec.width_px, spec.height_px, canvas.tiles()), *canvas.upper_levels]
    bigtiff = spec.bigtiff if spec.bigtiff is not None else canvas.expected_bytes() > BIGTIFF_ABOVE_BYTES
    slide_path = out_dir / f"{spec.slide_id}.svs"
    _publish(slide_path, lambda tmp: write_pyramid(tmp, spec, levels, tables=canvas.encoder.tables, bigtiff=bigtiff))

    tissue, classes = canvas.truth_tissue, canvas.truth_class
    tissue_blocks, tumour_blocks = int(np.count_nonzero(tissue)), canvas.tumour_blocks
    truth = {
        "slide_id": spec.slide_id,
        "width_px0": spec.width_px,
        "height_px0": spec.height_px,
        "mpp": spec.mpp,
        "downsample": TRUTH_DOWNSAMPLE,
        "tumour_share": round(tumour_blocks / max(tissue_blocks, 1), 6),
        "tissue_share": round(tissue_blocks / tissue.size, 6),
        "classes": CLASSES,
        "seed": spec.seed,
        "paint_version": PAINT_VERSION,
        "spec": spec.as_dict(),
    }
    _publish(truth_dir / f"{spec.slide_id}_tissue.png", lambda tmp: _save_png(tmp, tissue))
    _publish(truth_dir / f"{spec.slide_id}_class.png", lambda tmp: _save_png(tmp, classes))
    _publish(truth_dir / f"{spec.slide_id}.json", lambda tmp: tmp.write_text(json.dumps(truth, indent=2) + "\n"))
    return truth


class _Canvas:
    """Everything that fills up while level 0 is being painted."""

    def __init__(self, spec: SlideSpec, progress: Progress | None) -> None:
        self._spec, self._progress = spec, progress
        self._layout, self._painter = Layout(spec), Painter(spec)
        self.encoder = TileEncoder(
            spec.tile_px, subsampling=spec.subsampling, photometric=spec.photometric, quality=spec.quality
        )
        self._columns, self._rows = -(-spec.width_px // spec.tile_px), -(-spec.height_px // spec.tile_px)
        self._glass: dict[tuple[int, int], tuple[bytes, NDArray[np.uint16]]] = {}
        self._overviews = [
            _Overview(spec.width_px // scale, spec.height_px // scale, self.encoder, spec.tile_px)
            for scale in (4, 16)
            # A level smaller than one tile would only be a larger label.
            if max(spec.width_px, spec.height_px) // scale >= spec.tile_px
        ]
        shape = (-(-spec.height_px // TRUTH_DOWNSAMPLE), -(-spec.width_px // TRUTH_DOWNSAMPLE))
        self.truth_tissue = np.zeros(shape, np.uint8)
        self.truth_class = np.zeros(shape, np.uint8)
        self.tumour_blocks = 0

    @property
    def upper_levels(self) -> list[Level]:
        return [Level(o.width_px, o.height_px, o.tiles) for o in self._overviews]

    def expected_bytes(self) -> float:
        """An upper bound of the file's size: the whole slide as dense as its busiest texture, tumour."""
        spec, n = self._spec, self._spec.tile_px // NODE_PX + 1 + 2 * self._painter.margin_nodes
        inside, zero = np.full((n, n), FAR_PX, np.float32), np.zeros((n, n), np.float32)
        busy = self._painter.paint(0, 0, Nodes(inside, inside, -inside, zero, zero, zero))
        share = _tissue_share(self._layout, spec)
        area = self._columns * self._rows * (share * len(self.encoder.encode(busy)) + 4096)
        return area * (1 + 1 / 16 + 1 / 256) * 1.1

    def tiles(self) -> Iterator[bytes]:
        """Paint level 0; yields its encoded tiles in order and fills upper levels and truth as a side effect."""
        spec, painter, tile = self._spec, self._painter, self._spec.tile_px
        m, per_tile = painter.margin_nodes, tile // NODE_PX
        for row in range(self._rows):
            y0 = row * tile
            nodes = self._layout.nodes(
                -m * NODE_PX, y0 - m * NODE_PX, self._columns * per_tile + 1 + 2 * m, per_tile + 1 + 2 * m
            )
            self._record_truth(row * per_tile, nodes)
            sums = np.empty((tile // 4, self._columns * tile // 4, 3), np.uint16)
            streams = []
            for column in range(self._columns):
                window = nodes.columns(column * per_tile, (column + 1) * per_tile + 1 + 2 * m)
                stream, part = self._tile(column * tile, y0, window)
                sums[:, column * (tile // 4) : (column + 1) * (tile // 4)] = part
                streams.append(stream)
            for overview, scale in zip(self._overviews, (4, 16), strict=False):
                overview.add(sums if scale == 4 else _sum_blocks(sums), scale * scale)
            if row == self._rows - 1:
                for overview in self._overviews:
                    overview.finish()
            if self._progress is not None:
                self._progress(min(tile, spec.height_px - y0) * spec.width_px)
            # Last: the writer takes exactly the tiles it needs and never asks for what comes after them.
            yield from streams

    def _tile(self, x0: int, y0: int, nodes: Nodes) -> tuple[bytes, NDArray[np.uint16]]:
        """One tile's stream and its sums over 4 x 4 blocks, (tile / 4, tile / 4, 3) uint16."""
        painter, m = self._painter, self._painter.margin_nodes
        if nodes.tissue[m:-m, m:-m].max() > -2.0 or nodes.ink[m:-m, m:-m].max() > -2.0:
            rgb = painter.paint(x0, y0, nodes)
            return self.encoder.encode(rgb), _sum_blocks(rgb)
        kind = painter.glass_kind(x0, y0)
        if kind not in self._glass:
            rgb = painter.glass(kind)
            self._glass[kind] = self.encoder.encode(rgb), _sum_blocks(rgb)
        return self._glass[kind]

    def _record_truth(self, first_row: int, nodes: Nodes) -> None:
        m = self._painter.margin_nodes
        rows, columns = self.truth_tissue[first_row : first_row + self._spec.tile_px // NODE_PX].shape

        def at_middles(field: NDArray[np.float32]) -> NDArray[np.float32]:
            f = field[m : m + rows + 1, m : m + columns + 1]
            return f[:-1, :-1] + f[:-1, 1:] + f[1:, :-1] + f[1:, 1:]

        tissue, tumour, ink = (at_middles(f) > 0 for f in (nodes.tissue, nodes.tumour, nodes.ink))
        tumour &= tissue
        self.tumour_blocks += int(np.count_nonzero(tumour))
        self.truth_tissue[first_row : first_row + rows] = tissue * np.uint8(255)
        classes = np.where(ink, CLASSES["pen"], np.where(tumour, CLASSES["tumour"], tissue))
        self.truth_class[first_row : first_row + rows] = classes


class _Overview:
    """An upper level: box means come in row by row, encoded tiles pile up in `tiles`."""

    def __init__(self, width_px: int, height_px: int, encoder: TileEncoder, tile_px: int) -> None:
        self.width_px, self.height_px, self.tiles = width_px, height_px, list[bytes]()
        self._encoder, self._tile_px = encoder, tile_px
        self._band = np.zeros((tile_px, -(-width_px // tile_px) * tile_px, 3), np.uint8)
        self._filled = 0

    def add(self, sums: NDArray[np.uint16], count: int) -> None:
        """Take (rows, columns, 3) sums over `count` pixels each; the band's height is a multiple of the rows."""
        means = ((sums + np.uint16(count // 2)) // np.uint16(count)).astype(np.uint8)[:, : self._band.shape[1]]
        self._band[self._filled : self._filled + len(means), : means.shape[1]] = means
        # Beyond the slide's edge the last column goes on, which is cheap in JPEG and cannot ring into the picture.
        self._band[self._filled : self._filled + len(means), means.shape[1] :] = means[:, -1:]
        self._filled += len(means)
        if self._filled == self._tile_px:
            self._flush()

    def finish(self) -> None:
        if self._filled:
            self._band[self._filled :] = self._band[self._filled - 1]
            self._flush()
        # Rows of level 0 below the slide's edge may have begun a row of tiles that this level does not have.
        del self.tiles[self._band.shape[1] // self._tile_px * -(-self.height_px // self._tile_px) :]

    def _flush(self) -> None:
        for x in range(0, self._band.shape[1], self._tile_px):
            self.tiles.append(self._encoder.encode(np.ascontiguousarray(self._band[:, x : x + self._tile_px])))
        self._filled = 0


def _tissue_share(layout: Layout, spec: SlideSpec) -> float:
    """Share of tissue from one node in 64 x 64 or fewer, over single rows of nodes: (0 to 1)."""
    columns = -(-spec.width_px // NODE_PX)
    step = NODE_PX * max(1, spec.height_px // (64 * NODE_PX))
    rows = [layout.nodes(0, y0, columns, 1).tissue > 0 for y0 in range(0, spec.height_px, step)]
    return float(np.count_nonzero(rows)) / (len(rows) * columns)


def _sum_blocks(pixels: NDArray[Any]) -> NDArray[np.uint16]:
    """Sums over 4 x 4 blocks: (h, w, 3) uint8 or uint16 -> (h / 4, w / 4, 3) uint16 (16 * 16 * 255 still fits)."""
    down = pixels[0::4].astype(np.uint16)
    for i in (1, 2, 3):
        down += pixels[i::4]
    h, w, _ = down.shape
    quads = down.reshape(h, w // 4, 4, 3)
    total: NDArray[np.uint16] = quads[:, :, 0] + quads[:, :, 1] + quads[:, :, 2] + quads[:, :, 3]
    return total


def _save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    Image.fromarray(picture).save(path, format="PNG")


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, push it to the disk, and give it its name."""
    tmp = path.with_name(f".tmp-{path.name}")
    write(tmp)
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    tmp.replace(path)
