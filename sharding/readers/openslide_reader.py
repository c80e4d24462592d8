"""OpenSlide, the reader of every other format. The one module that imports it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openslide

from sharding.slide import DamagedTileError, Level, Pixels, Spacing, make_levels


class OpenSlideReader:
    """Reads one slide. It raises on a damaged tile, after which its handle is dead: it is reopened at once."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(str(path))
        self.levels: tuple[Level, ...] = make_levels([(int(w), int(h)) for w, h in self._slide.level_dimensions])
        properties = dict(self._slide.properties)
        self.spacing = _spacing(properties)
        # OpenSlide shows a tile of no bytes in an SVS (a writer's bug or damage) as transparent, on every level above
        # it too. An SVS leaves nothing out, so there it is damage; other formats have no pixels where none were taken.
        self._complete = properties.get(openslide.PROPERTY_NAME_VENDOR) == "aperio"

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
        """uint8 [height_px, width_px, 3]; what the scanner left out (transparent) is white."""
        size = self.levels[level]
        location = (math.ceil(x_px * size.downsample_x), math.ceil(y_px * size.downsample_y))
        try:
            rgba = np.asarray(self._slide.read_region(location, level, (width_px, height_px)))
        except openslide.OpenSlideError as error:
            self._slide.close()
            self._slide = openslide.OpenSlide(str(self._path))
            raise DamagedTileError(f"OpenSlide cannot read level {level} at ({x_px}, {y_px}): {error}") from None
        alpha = rgba[:, :, 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[:, :, :3])
        if self._complete and alpha.min() == 0:
            raise DamagedTileError(
                f"level {level} has an empty TIFF tile in {width_px}x{height_px} px at ({x_px}, {y_px})"
            )
        rgb = rgba[:, :, :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
        return ((rgb + 127) // 255).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


def _spacing(properties: dict[str, str]) -> Spacing | None:
    try:
        x_um = float(properties[openslide.PROPERTY_NAME_MPP_X])
        y_um = float(properties[openslide.PROPERTY_NAME_MPP_Y])
    except (KeyError, ValueError):
        return None
    return Spacing(x_um, y_um, "openslide")
