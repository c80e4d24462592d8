"""The JPEG tiles of a TIFF slide as they lie in the file: proven, decoded, or copied.

cuCIM hands out stale pixels, even another slide's, for a tile that does not decode. So each tile is decoded strictly
here (libjpeg-turbo, warnings are errors), which is check and pixels in one. What still decodes after damage (a flipped
bit inside the entropy-coded data often does) cannot be seen this way.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from sharding.jpeg import NotCopyableError, Parts, TileHeader, split, tile_header

Pixels = npt.NDArray[np.uint8]

# Decoded tiles that are kept: three rows of tiles of a slide of 130,000 px. A patch larger than a tile can lie on three
# rows, and the next row of patches meets the last two of them again.
_CACHE_BYTES = 300 << 20
_MAX_PAGES = 1000
_SOI = b"\xff\xd8"
_JPEG_COMPRESSION = 7
_PHOTOMETRIC_RGB, _PHOTOMETRIC_YCBCR = 2, 6
_SCALED_DECODES = (2, 4, 8)  # of those that libjpeg has, the ones that are means of whole pixels
_UNIT_UM = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre


class TileDefectError(ValueError):
    """A strict decoder rejects the tile; the message says what was found."""


@dataclass(frozen=True, slots=True)
class _Page:
    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    tables: bytes  # JPEGTables without its EOI, b"" where tiles are whole streams
    header: TileHeader | str  # of standalone tiles, or why they cannot stand alone
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def columns(self) -> int:
        return -(-self.width_px // self.tile_width_px)


@dataclass(frozen=True, slots=True)
class TileCopy:
    """A tile as a JPEG stream: `head`, then `length` bytes of the file at `offset`. `pixels` are its proof."""

    head: bytes
    offset: int
    length: int
    stream: bytes
    pixels: Pixels


class JpegTiles:
    """Raw access to the JPEG tiles of every level of one TIFF file."""

    def __init__(self, path: Path, pages: list[_Page], description: str, resolution_um: tuple[float, float] | None):
        self.description = description
        self._may_be_sparse = not description.startswith("Aperio")
        self.resolution_um = resolution_um
        self._pages = pages
        self._levels: list[_Page] = pages
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._defects: dict[tuple[int, int, int], str] = {}
        self._decoded: OrderedDict[tuple[int, int, int, int], Pixels] = OrderedDict()
        self._decoded_bytes = 0

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

    def is_absent(self, level: int, column: int, row: int) -> bool:
        """Whether the writer left this tile out: background, in every format but Aperio's, which leaves nothing out."""
        page = self._levels[level]
        index = row * page.columns + column
        known = index < len(page.offsets) and index < len(page.lengths)
        return known and self._may_be_sparse and page.offsets[index] == page.lengths[index] == 0

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) in pixels of the level's tiles."""
        page = self._levels[level]
        return page.tile_width_px, page.tile_height_px

    def defect(self, level: int, column: int, row: int) -> str:
        """Why a strict decoder rejects this tile; empty where it accepts it. Remembered per tile."""
        key = (level, column, row)
        if self.is_absent(level, column, row):
            return ""
        if key not in self._defects:
            try:
                self._prove(self._levels[level], self._raw(level, column, row))
                self._defects[key] = ""
            except TileDefectError as error:
                self._defects[key] = str(error)
        return self._defects[key]

    def copy(self, level: int, column: int, row: int) -> TileCopy:
        """Where the tile's scan lies, and its pixels: it stands alone losslessly and is proven to decode.

        Raises TileDefectError where it does not decode, NotCopyableError where it does but cannot stand alone.
        """
        if self.is_absent(level, column, row):
            raise NotCopyableError("the tile is absent")
        page = self._levels[level]
        data = self._raw(level, column, row)
        parts = self._split(page, data)
        offset = page.offsets[row * page.columns + column] + parts.start
        stream = parts.head + data[parts.start : parts.end]
        return TileCopy(parts.head, offset, parts.end - parts.start, stream, _strictly(stream))

    def ranges(self, level: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """(offset, length) in bytes of each tile of a level in raster order, as the file's tile table says; uint64."""
        page = self._levels[level]
        return np.array(page.offsets, np.uint64), np.array(page.lengths, np.uint64)

    def header(self, level: int) -> TileHeader | None:
        """What precedes the level's tiles as standalone streams; None where they cannot stand alone."""
        header = self._levels[level].header
        return None if isinstance(header, str) else header

    def scales(self, level: int, factor: int) -> bool:
        """Whether the level's tiles can be decoded at 1/factor of their size."""
        page = self._levels[level]
        return factor in _SCALED_DECODES and page.tile_width_px % factor == page.tile_height_px % factor == 0

    def read(self, level: int, x1: int, y1: int, x2: int, y2: int, *, factor: int = 1) -> Pixels:
        """Pixels of the half-open rectangle, inside the level: uint8 [(y2 - y1) // factor, (x2 - x1) // factor, 3].

        A factor above 1 needs `scales`, and edges that are multiples of it.

        Raises TileDefectError, which names the tile, where one does not decode, and NotCopyableError where one cannot
        be decoded by itself.
        """
        page = self._levels[level]
        width, height = page.tile_width_px // factor, page.tile_height_px // factor
        x1, y1, x2, y2 = x1 // factor, y1 // factor, x2 // factor, y2 // factor
        columns, rows = range(x1 // width, -(-x2 // width)), range(y1 // height, -(-y2 // height))
        if (x2 - x1, y2 - y1, len(columns), len(rows)) == (width, height, 1, 1):
            # One whole tile: neither copied nor kept, for a grid that asks for whole tiles asks for each of them once.
            return self._decode(level, columns[0], rows[0], factor)
        pixels = np.empty((y2 - y1, x2 - x1, 3), np.uint8)
        for row in rows:
            top = row * height
            ya, yb = max(y1, top), min(y2, top + height)
            for column in columns:
                left = column * width
                xa, xb = max(x1, left), min(x2, left + width)
                tile = self._tile(level, column, row, factor)
                pixels[ya - y1 : yb - y1, xa - x1 : xb - x1] = tile[ya - top : yb - top, xa - left : xb - left]
        return pixels

    def _tile(self, level: int, column: int, row: int, factor: int) -> Pixels:
        """A tile at 1/factor of its size, from the cache where it is there. Not to be written to."""
        key = (level, column, row, factor)
        pixels = self._decoded.get(key)
        if pixels is not None:
            self._decoded.move_to_end(key)
            return pixels
        pixels = self._decoded[key] = self._decode(level, column, row, factor)
        self._decoded_bytes += pixels.nbytes
        while self._decoded_bytes > _CACHE_BYTES:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return pixels

    def _decode(self, level: int, column: int, row: int, factor: int) -> Pixels:
        page = self._levels[level]
        if self.is_absent(level, column, row):
            return np.full((page.tile_height_px // factor, page.tile_width_px // factor, 3), 255, np.uint8)
        reason = self._defects.get((level, column, row))
        if not reason:
            try:
                stream = self._standalone(page, self._raw(level, column, row))
                return _strictly(stream, (page.tile_width_px // factor, page.tile_height_px // factor))
            except TileDefectError as error:
                reason = self._defects[level, column, row] = str(error)
        raise TileDefectError(f"TIFF tile ({column}, {row}) of level {level} {reason}")

    def _raw(self, level: int, column: int, row: int) -> bytes:
        """The tile's bytes in the file."""
        page = self._levels[level]
        index = row * page.columns + column
        if index >= len(page.offsets) or index >= len(page.lengths):
            raise TileDefectError(f"is missing from the file's tile table ({len(page.offsets)} entries)")
        offset, length = page.offsets[index], page.lengths[index]
        if length < 4:
            raise TileDefectError(f"is empty ({length} bytes)")
        try:
            # A damaged table can ask for more than the memory, or for a place beyond 2^63.
            inside = max(0, os.fstat(self._descriptor).st_size - offset)
            data = os.pread(self._descriptor, length, offset) if length <= inside else b""
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        if len(data) < length:
            raise TileDefectError(f"is cut off: {inside} of {length} bytes are in the file")
        if data[:2] != _SOI:
            raise TileDefectError(f"is no JPEG: it starts with {data[:2].hex()}")
        return data

    def _standalone(self, page: _Page, data: bytes) -> bytes:
        parts = self._split(page, data)
        return parts.head + data[parts.start : parts.end]

    def _split(self, page: _Page, data: bytes) -> Parts:
        if isinstance(page.header, str):
            raise NotCopyableError(page.header)
        try:
            return split(data, page.header, width_px=page.tile_width_px, height_px=page.tile_height_px)
        except NotCopyableError:
            self._prove(page, data)  # what cannot stand alone may be damaged: that is the finding then
            raise

    @staticmethod
    def _prove(page: _Page, data: bytes) -> None:
        stream = page.tables + data[2:] if page.tables else data
        expected = (page.tile_width_px, page.tile_height_px)
        try:
            # The size first: a damaged header can ask for 12 GB.
            height_px, width_px = simplejpeg.decode_jpeg_header(stream)[:2]
        except ValueError as error:
            raise TileDefectError(f"does not decode: {' '.join(str(error).split())}") from None
        if (width_px, height_px) != expected:
            raise TileDefectError(f"decodes to {width_px}x{height_px} px where {expected[0]}x{expected[1]} is expected")
        _strictly(stream)

    def close(self) -> None:
        os.close(self._descriptor)


def _strictly(stream: bytes, size_px: tuple[int, int] = (0, 0)) -> Pixels:
    """The pixels, uint8 [H, W, 3], at the smallest of libjpeg's scales that gives `size_px` (0: its own size)."""
    try:
        # `min_factor` by itself scales nothing: it bounds what `min_width` and `min_height` ask for.
        return simplejpeg.decode_jpeg(stream, "RGB", min_width=size_px[0], min_height=size_px[1], strict=True)
    except ValueError as error:
        raise TileDefectError(f"does not decode: {' '.join(str(error).split())}") from None


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
    header: TileHeader | str = f"its photometric interpretation is {page.photometric}"
    if int(page.photometric) in (_PHOTOMETRIC_RGB, _PHOTOMETRIC_YCBCR):
        try:
            header = tile_header(tables, rgb=int(page.photometric) == _PHOTOMETRIC_RGB)
        except NotCopyableError as error:
            header = f"its JPEGTables: {error}"
    return _Page(
        width_px=page.imagewidth,
        height_px=page.imagelength,
        tile_width_px=page.tilewidth,
        tile_height_px=page.tilelength,
        tables=tables[:-2] if tables else b"",
        header=header,
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
