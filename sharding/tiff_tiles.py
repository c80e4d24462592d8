"""The tiles of a TIFF slide as they lie in the file: proven, decoded, or copied.

cuCIM hands out stale pixels, even another slide's, for a tile that does not decode, and OpenSlide decodes leniently. So
each tile is decoded strictly here (tile_codecs.py), which is check and pixels in one.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import tifffile

from sharding.jpeg import NotCopyableError, Parts, TileHeader, end_of_scan, split, tile_header
from sharding.tile_codecs import (
    THREE_WHOLE_8_BIT,
    TileDefectError,
    check_jpeg_size,
    decode_deflate,
    decode_jpeg,
    decode_jpeg2000,
    decode_lzw,
    jpeg2000_components,
)

# It warns about damaged files on stderr, paths included; what is wrong with a slide is told by its reason.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

Pixels = npt.NDArray[np.uint8]
Codec = Literal["libjpeg", "openjpeg", "lzw", "deflate"]

# Decoded tiles that are kept at most: four rows of tiles of a slide of 100,000 px.
_CACHE_BYTES = 300 << 20
_MAX_PAGES = 1000
_MOST_KNOWN = 4
_PROOF_SCALE = 8
_MAX_TILE_PX = 1 << 26  # 8192 x 8192; beyond it a hostile header asks for more memory than there is
_SOI = b"\xff\xd8"
# By TIFF compression; 33003 and 33005 are Aperio's JPEG 2000 of YCbCr and RGB.
_CODECS: dict[int, Codec] = {
    5: "lzw",
    7: "libjpeg",
    8: "deflate",
    32946: "deflate",
    33003: "openjpeg",
    33005: "openjpeg",
    34712: "openjpeg",
}
_APERIO_YCBCR = 33003
_APERIO_JPEG_2000 = (33003, 33005)
_HEAD_BYTES = 8192
_NO_PREDICTOR, _DIFFERENCES = 1, 2
_PHOTOMETRIC_RGB, _PHOTOMETRIC_YCBCR = 2, 6
_SCALED_DECODES = (2, 4, 8)  # of those that libjpeg has, the ones that are means of whole pixels
_UNIT_UM = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre


@dataclass(frozen=True, slots=True)
class _Page:
    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    codec: Codec
    ycbcr: bool  # JPEG 2000: the components are Y, Cb, Cr
    differences: bool  # LZW and Deflate: predictor 2
    tables: bytes  # JPEGTables without its EOI, b"" where tiles are whole streams
    header: TileHeader | str  # of standalone JPEG tiles, or why there are none
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    known: list[tuple[bytes, bytes]]  # how JPEG tiles begin, up to the scan, and the standalone head of such a tile

    @property
    def tile_size_px(self) -> tuple[int, int]:
        return self.tile_width_px, self.tile_height_px

    @property
    def columns(self) -> int:
        return -(-self.width_px // self.tile_width_px)


@dataclass(frozen=True, slots=True)
class TileCopy:
    """A tile as a JPEG stream, proven to decode: `head`, then `length` bytes of the file at `offset`."""

    head: bytes
    offset: int
    length: int
    stream: bytes
    pixels: Pixels | None


class TiffTiles:
    """Access to the tiles of every level of one TIFF file.

    `compression` is the first page's; `predicted` are the compressions of pages, tiled or not, with the tag Predictor.
    """

    def __init__(
        self,
        path: Path,
        pages: list[_Page],
        description: str,
        resolution_um: tuple[float, float] | None,
        compression: int,
        predicted: frozenset[int],
    ):
        self.compression = compression
        self.predicted = predicted
        self.description = description
        self._may_be_sparse = not description.startswith("Aperio")
        self.resolution_um = resolution_um
        self._pages = pages
        self._levels: list[_Page] = pages
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._size_bytes = os.fstat(self._descriptor).st_size
        self._defects: dict[tuple[int, int, int], str] = {}
        self._decoded: OrderedDict[tuple[int, int, int, int], Pixels] = OrderedDict()
        self._decoded_bytes = 0

    @classmethod
    def open(cls, path: Path) -> TiffTiles | str:
        """The tiles of `path`, or the reason, as text, why they cannot be proven."""
        try:
            with tifffile.TiffFile(path) as tiff:
                chain = list(_chain(tiff))
                pages = [_page(page) for page in chain]
                first = chain[0]
                description, resolution = first.description or "", _resolution_um(first)
                predicted = frozenset(int(page.compression) for page in chain if "Predictor" in page.tags)
                compression = int(first.compression)
        except Exception as error:  # tifffile raises many kinds on hostile files; all mean "not readable here"
            return f"not a readable TIFF ({' '.join(str(error).split()) or type(error).__name__})"
        if isinstance(pages[0], str):
            return pages[0]
        provable = [page for page in pages if not isinstance(page, str)]
        return cls(path, provable, description, resolution, compression, predicted)

    def match_levels(self, sizes_px: list[tuple[int, int]]) -> bool:
        """Put the pages in the order of a reader's levels; False where a level has none whose tiles can be proven."""
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
        if not self._may_be_sparse:
            return False
        page = self._levels[level]
        index = row * page.columns + column
        known = index < len(page.offsets) and index < len(page.lengths)
        return known and page.offsets[index] == page.lengths[index] == 0

    def codec(self, level: int) -> Codec:
        """Who decodes the level's tiles."""
        return self._levels[level].codec

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) in pixels of the level's tiles."""
        return self._levels[level].tile_size_px

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

    def copy(self, level: int, column: int, row: int, *, pixels: bool) -> TileCopy:
        """Where the tile's scan lies: it stands alone losslessly and is proven to decode; with its pixels if asked.

        Raises TileDefectError where it does not decode, NotCopyableError where it does but cannot stand alone.
        """
        if self.is_absent(level, column, row):
            raise NotCopyableError("the tile is absent")
        page = self._levels[level]
        data = self._raw(level, column, row)
        parts = self._split(page, data)
        offset = page.offsets[row * page.columns + column] + parts.start
        stream = parts.head + data[parts.start : parts.end]
        # At an eighth of its size every Huffman code is read all the same, and nothing else is worked out.
        side = 1 if pixels else _PROOF_SCALE
        decoded = decode_jpeg(stream, (page.tile_width_px // side, page.tile_height_px // side))
        return TileCopy(parts.head, offset, parts.end - parts.start, stream, decoded if pixels else None)

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
        whole = page.tile_width_px % factor == page.tile_height_px % factor == 0
        return whole and page.codec == "libjpeg" and factor in _SCALED_DECODES

    def read(
        self, level: int, x1: int, y1: int, x2: int, y2: int, *, factor: int = 1, overlapping: bool = True
    ) -> Pixels:
        """Pixels of the half-open rectangle, inside the level: uint8 [(y2 - y1) // factor, (x2 - x1) // factor, 3].

        A factor above 1 needs `scales`, and edges that are multiples of it. Without `overlapping` the caller's
        rectangles are disjoint: a tile inside one is not met again.

        Raises TileDefectError, which names the tile, where one does not decode, and NotCopyableError where one cannot
        be decoded by itself.
        """
        page = self._levels[level]
        width, height = page.tile_width_px // factor, page.tile_height_px // factor
        x1, y1, x2, y2 = x1 // factor, y1 // factor, x2 // factor, y2 // factor
        columns, rows = range(x1 // width, -(-x2 // width)), range(y1 // height, -(-y2 // height))
        whole = not (x1 % width or y1 % height or x2 % width or y2 % height)
        if whole and len(columns) == len(rows) == 1:
            return self._decode(level, columns[0], rows[0], factor)
        pixels = np.empty((y2 - y1, x2 - x1, 3), np.uint8)
        if whole and not overlapping:
            for top, row in zip(range(0, y2 - y1, height), rows, strict=True):
                for left, column in zip(range(0, x2 - x1, width), columns, strict=True):
                    pixels[top : top + height, left : left + width] = self._decode(level, column, row, factor)
            return pixels
        # The next row of windows meets all but the first of these rows of tiles again. No more is kept than that and
        # the row that is being filled: memory that goes round is faster than new memory.
        keep_bytes = min(_CACHE_BYTES, (len(rows) + 1) * page.columns * width * height * 3)
        for row in rows:
            top = row * height
            ya, yb = max(y1, top), min(y2, top + height)
            for column in columns:
                left = column * width
                xa, xb = max(x1, left), min(x2, left + width)
                tile = self._tile(level, column, row, factor, keep_bytes)
                pixels[ya - y1 : yb - y1, xa - x1 : xb - x1] = tile[ya - top : yb - top, xa - left : xb - left]
        return pixels

    def _tile(self, level: int, column: int, row: int, factor: int, keep_bytes: int) -> Pixels:
        """A tile at 1/factor of its size, from the cache where it is there. Not to be written to."""
        key = (level, column, row, factor)
        pixels = self._decoded.get(key)
        if pixels is not None:
            self._decoded.move_to_end(key)
            return pixels
        pixels = self._decoded[key] = self._decode(level, column, row, factor)
        self._decoded_bytes += pixels.nbytes
        while self._decoded_bytes > keep_bytes:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return pixels

    def _decode(self, level: int, column: int, row: int, factor: int) -> Pixels:
        page = self._levels[level]
        if self.is_absent(level, column, row):
            return np.full((page.tile_height_px // factor, page.tile_width_px // factor, 3), 255, np.uint8)
        reason = self._defects.get((level, column, row))
        if not reason:
            try:
                data = self._raw(level, column, row)
                if page.codec != "libjpeg":
                    return _decode_other(page, data)
                size_px = (page.tile_width_px // factor, page.tile_height_px // factor)
                return decode_jpeg(self._standalone(page, data), size_px)
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
            inside = max(0, self._size_bytes - offset)
            data = os.pread(self._descriptor, length, offset) if length <= inside else b""
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        if len(data) < length:
            raise TileDefectError(f"is cut off: {min(inside, len(data) or inside)} of {length} bytes are in the file")
        if page.codec == "libjpeg" and data[:2] != _SOI:
            raise TileDefectError(f"is no JPEG: it starts with {data[:2].hex()}")
        return data

    def _standalone(self, page: _Page, data: bytes) -> bytes:
        """The tile as a stream to be decoded."""
        for beginning, head in page.known:
            if data.startswith(beginning):
                return b"".join((head, memoryview(data)[len(beginning) :]))
        parts = self._split(page, data)
        return parts.head + data[parts.start : parts.end]

    def _split(self, page: _Page, data: bytes) -> Parts:
        if isinstance(page.header, str):
            raise NotCopyableError(page.header)
        try:
            # Almost all tiles begin alike: that is parsed once.
            for beginning, head in page.known:
                if data.startswith(beginning):
                    return Parts(head, len(beginning), end_of_scan(data, len(beginning)))
            parts = split(data, page.header, width_px=page.tile_width_px, height_px=page.tile_height_px)
        except NotCopyableError:
            self._prove(page, data)  # what cannot stand alone may be damaged: that is the finding then
            raise
        if len(page.known) < _MOST_KNOWN:
            page.known.append((data[: parts.start], parts.head))
        return parts

    @staticmethod
    def _prove(page: _Page, data: bytes) -> None:
        if page.codec != "libjpeg":
            _decode_other(page, data)
            return
        stream = page.tables + data[2:] if page.tables else data
        check_jpeg_size(stream, page.tile_size_px)
        decode_jpeg(stream)

    def close(self) -> None:
        os.close(self._descriptor)


def _decode_other(page: _Page, data: bytes) -> Pixels:
    if page.codec == "openjpeg":
        return decode_jpeg2000(data, page.tile_size_px, ycbcr=page.ycbcr)
    decode = decode_lzw if page.codec == "lzw" else decode_deflate
    return decode(data, page.tile_size_px, differences=page.differences)


def _chain(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """The pages of a file; an error where a hostile chain has no end: tifffile would follow it for ever."""
    seen: set[int] = set()
    for page in tiff.pages:
        if page.offset in seen or len(seen) == _MAX_PAGES:
            raise ValueError("its chain of pages runs in a circle or is endless")
        seen.add(page.offset)
        yield page


def _page(page: tifffile.TiffPage) -> _Page | str:
    """What is to be known of a page to decode its tiles, or why they cannot be decoded here."""
    if not page.is_tiled:
        return "the TIFF is not tiled"
    if not 0 < page.tilewidth * page.tilelength <= _MAX_TILE_PX:
        return f"its TIFF tiles are {page.tilewidth}x{page.tilelength} px"
    compression, photometric = int(page.compression), int(page.photometric)
    codec = _CODECS.get(compression)
    if codec is None:
        return f"there is no strict decoder for its tiles (TIFF compression {compression})"
    tables = b""
    header: TileHeader | str = f"its compression is {compression}"
    if codec == "libjpeg":
        tables = page.jpegtables or b""
        header = _jpeg_header(tables, photometric)
    else:
        reason = _other_kind(page, compression, photometric)
        if reason:
            return reason
    return _Page(
        width_px=page.imagewidth,
        height_px=page.imagelength,
        tile_width_px=page.tilewidth,
        tile_height_px=page.tilelength,
        codec=codec,
        ycbcr=compression == _APERIO_YCBCR,
        differences=page.predictor == _DIFFERENCES,
        tables=tables[:-2],
        header=header,
        offsets=tuple(page.dataoffsets),
        lengths=tuple(page.databytecounts),
        known=[],
    )


def _jpeg_header(tables: bytes, photometric: int) -> TileHeader | str:
    if photometric not in (_PHOTOMETRIC_RGB, _PHOTOMETRIC_YCBCR):
        return f"its photometric interpretation is {photometric}"
    try:
        return tile_header(tables, rgb=photometric == _PHOTOMETRIC_RGB)
    except NotCopyableError as error:
        return f"its JPEGTables: {error}"


def _other_kind(page: tifffile.TiffPage, compression: int, photometric: int) -> str:
    """Why the tiles of a page that is not JPEG cannot be decoded here; empty where they can."""
    if (page.samplesperpixel, page.bitspersample, int(page.planarconfig), int(page.sampleformat)) != (3, 8, 1, 1):
        return "its pixels are not three interleaved samples of 8 bits"
    # Aperio's compressions say by themselves which colours they hold.
    if photometric != _PHOTOMETRIC_RGB and compression not in _APERIO_JPEG_2000:
        return f"its photometric interpretation is {photometric}"
    if _CODECS[compression] == "openjpeg":
        return _first_jpeg2000(page)
    if page.predictor not in (_NO_PREDICTOR, _DIFFERENCES) or int(page.fillorder) != 1:
        return f"its predictor is {int(page.predictor)}, its fill order {int(page.fillorder)}"
    return ""


def _first_jpeg2000(page: tifffile.TiffPage) -> str:
    """Why JPEG 2000 tiles like this page's first cannot be decoded; empty where they can, or where it is damaged."""
    offset, length = next(filter(all, zip(page.dataoffsets, page.databytecounts, strict=False)), (0, 0))
    file = page.parent.filehandle
    file.seek(offset)
    try:
        _, components = jpeg2000_components(file.read(min(length, _HEAD_BYTES)))
    except TileDefectError:
        return ""
    # Aperio's 33003 may have chroma of half the width; OpenSlide knows how to enlarge it.
    return "" if components == THREE_WHOLE_8_BIT else f"its JPEG 2000 components are {components}"


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
