"""The JPEG tiles of a TIFF slide as they lie in the file, and the proof that a strict decoder accepts them.

cuCIM hands out stale pixels, even another slide's, for a tile that does not decode. So each tile is decoded strictly
here (libjpeg-turbo, warnings are errors) before a reader may use it. What still decodes after damage (a flipped bit
inside the entropy-coded data often does) cannot be seen this way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import simplejpeg
import tifffile

_MAX_PAGES = 1000
_SOI = b"\xff\xd8"
_JPEG_COMPRESSION = 7
_UNIT_UM = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre


@dataclass(frozen=True, slots=True)
class _Page:
    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    tables: bytes  # JPEGTables without its EOI, b"" where tiles are whole streams
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def columns(self) -> int:
        return -(-self.width_px // self.tile_width_px)


class JpegTiles:
    """Raw access to the JPEG tiles of every level of one TIFF file."""

    def __init__(self, path: Path, pages: list[_Page], description: str, resolution_um: tuple[float, float] | None):
        self.description = description
        self.resolution_um = resolution_um
        self._pages = pages
        self._levels: list[_Page] = pages
        self._descriptor = os.open(path, os.O_RDONLY)
        self._defects: dict[tuple[int, int, int], str] = {}

    @classmethod
    def open(cls, path: Path) -> JpegTiles | str:
        """The tiles of `path`, or the reason, as text, why it is no JPEG-tiled TIFF."""
        try:
            with tifffile.TiffFile(path) as tiff:
                first = tiff.pages[0]
                pages = [
                    _page(page) for page in _chain(tiff) if page.is_tiled and page.compression == _JPEG_COMPRESSION
                ]
                description, resolution = first.description or "", _resolution_um(first)
                tiled, compression = first.is_tiled, first.compression
        except Exception as error:  # tifffile raises many kinds on hostile files; all mean "not readable here"
            return f"not a readable TIFF ({' '.join(str(error).split()) or type(error).__name__})"
        if not tiled:
            return "the TIFF is not tiled"
        if compression != _JPEG_COMPRESSION:
            return f"its tiles are not baseline JPEG (TIFF compression {int(compression)})"
        return cls(path, pages, description, resolution)

    def match_levels(self, sizes_px: list[tuple[int, int]]) -> bool:
        """Put the pages in the order of a reader's levels; False where a level has no JPEG-tiled page."""
        by_size = {(page.width_px, page.height_px): page for page in reversed(self._pages)}
        if not all(size in by_size for size in sizes_px):
            return False
        self._levels = [by_size[size] for size in sizes_px]
        return True

    def covering(self, level: int, x1: int, y1: int, x2: int, y2: int) -> Iterator[tuple[int, int]]:
        """(column, row) of every tile under the half-open rectangle, in pixels of `level`."""
        page = self._levels[level]
        for row in range(y1 // page.tile_height_px, -(-y2 // page.tile_height_px)):
            for column in range(x1 // page.tile_width_px, -(-x2 // page.tile_width_px)):
                yield column, row

    def defect(self, level: int, column: int, row: int) -> str:
        """Why a strict decoder rejects this tile; empty where it accepts it. Remembered per tile."""
        key = (level, column, row)
        if key not in self._defects:
            self._defects[key] = self._find_defect(self._levels[level], column, row)
        return self._defects[key]

    def _find_defect(self, page: _Page, column: int, row: int) -> str:
        index = row * page.columns + column
        if index >= len(page.offsets) or index >= len(page.lengths):
            return f"is missing from the file's tile table ({len(page.offsets)} entries)"
        length = page.lengths[index]
        if length < 4:
            return f"is empty ({length} bytes)"
        data = os.pread(self._descriptor, length, page.offsets[index])
        if len(data) < length:
            return f"is cut off: {len(data)} of {length} bytes are in the file"
        if data[:2] != _SOI:
            return f"is no JPEG: it starts with {data[:2].hex()}"
        stream = page.tables + data[2:] if page.tables else data
        try:
            # The size first: a damaged header can ask for 12 GB.
            height_px, width_px = simplejpeg.decode_jpeg_header(stream)[:2]
            if (width_px, height_px) != (page.tile_width_px, page.tile_height_px):
                expected = f"{page.tile_width_px}x{page.tile_height_px}"
                return f"decodes to {width_px}x{height_px} px where {expected} is expected"
            simplejpeg.decode_jpeg(stream, strict=True)
        except ValueError as error:
            return f"does not decode: {' '.join(str(error).split())}"
        return ""

    def close(self) -> None:
        os.close(self._descriptor)


def _chain(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """The pages of a file; an error where a hostile chain has no end: tifffile would follow it for ever."""
    seen: set[int] = set()
    for page in tiff.pages:
        if page.offset in seen or len(seen) == _MAX_PAGES:
            raise ValueError("its chain of pages runs in a circle or is endless")
        seen.add(page.offset)
        yield page


def _page(page: tifffile.TiffPage) -> _Page:
    tables = page.jpegtables or b""
    return _Page(
        width_px=page.imagewidth,
        height_px=page.imagelength,
        tile_width_px=page.tilewidth,
        tile_height_px=page.tilelength,
        tables=tables[:-2] if tables else b"",
        offsets=tuple(page.dataoffsets),
        lengths=tuple(page.databytecounts),
    )


def _resolution_um(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Spacing in um/px from the TIFF resolution tags, where they state a unit of length."""
    unit = page.tags.valueof("ResolutionUnit")
    per_unit = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    if int(unit or 0) not in _UNIT_UM or not all(per_unit):
        return None
    pixels = [numerator / denominator if denominator else 0.0 for numerator, denominator in per_unit]
    if not all(pixels):
        return None
    um = _UNIT_UM[int(unit)]
    return um / pixels[0], um / pixels[1]
