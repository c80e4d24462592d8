"""A TIFF's JPEG tile as a JPEG file of its own, its compressed bytes untouched (route `copy`).

A tile in a TIFF lacks what the TIFF says elsewhere: the tables (tag JPEGTables) and the colour space (tag
PhotometricInterpretation). A standalone stream is SOI, an Adobe marker with transform 0 exactly if the TIFF says RGB,
the tables, and the tile after its SOI. Without that marker every decoder takes RGB for YCbCr. Comments and application
segments are left out: scanners write text there.

Source: ITU-T T.81 (JPEG), TIFF Technical Note 2, Adobe Technical Note 5116 (APP14).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_SOI, _EOI, _SOS, _DQT, _DHT, _DRI, _COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
_SOF0 = 0xC0  # baseline
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
_TABLES = frozenset({_DQT, _DHT, _DRI})
# Adobe, version 100, no flags, transform 0: the components are RGB as they are.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
# The first byte of entropy-coded data that is neither a stuffed FF nor a restart marker: where the scan ends.
_END_OF_SCAN = re.compile(rb"\xff(?=[^\x00\xd0-\xd7\xff])")


class NotCopyableError(ValueError):
    """The tile cannot stand alone losslessly; the message says why. It may decode all the same."""


@dataclass(frozen=True, slots=True)
class TileHeader:
    """What precedes a level's tiles: everything of the standalone stream that the TIFF, not the tile, states."""

    prefix: bytes
    rgb: bool


def tile_header(jpeg_tables: bytes, *, rgb: bool) -> TileHeader:
    """The common header of a level's tiles.

    Args:
        jpeg_tables: the tag's stream, SOI to EOI, or b"" where each tile has its tables.
        rgb: True where PhotometricInterpretation is RGB (2), False for YCbCr (6).

    Raises NotCopyableError where the tag is damaged.
    """
    tables = []
    if jpeg_tables:
        for marker, segment, _ in _segments(jpeg_tables, until=_EOI):
            if marker in _TABLES:
                tables.append(segment)
            elif marker == _APP14:
                _check_adobe(segment, rgb)
    return TileHeader(b"\xff\xd8" + (_ADOBE_RGB if rgb else b"") + b"".join(tables), rgb)


@dataclass(frozen=True, slots=True)
class Parts:
    """A standalone stream in two parts: `head`, then the tile's own bytes [start, end), scan data and EOI."""

    head: bytes
    start: int
    end: int


def split(tile: bytes, header: TileHeader, *, width_px: int, height_px: int) -> Parts:
    """Where the tile's scan lies, and what has to precede it in a stream of its own.

    Its quantised coefficients and Huffman codes are the tile's own bytes; only the tile's SOI, comments, application
    segments and whatever follows its EOI are left out.

    Raises NotCopyableError where it is not one baseline scan of three 8-bit components of width_px x height_px.
    """
    kept = [header.prefix]
    framed = False
    for marker, segment, end in _segments(tile, until=_SOS):
        if marker == _SOS:
            if not framed:
                raise NotCopyableError("its scan comes before its frame header")
            kept.append(segment)
            return Parts(b"".join(kept), end, end_of_scan(tile, end))
        if marker == _SOF0:
            _check_frame(segment, width_px, height_px)
            framed = True
            kept.append(segment)
        elif marker in _TABLES:
            kept.append(segment)
        elif marker == _APP14:
            _check_adobe(segment, header.rgb)
        elif marker != _COM and not _APP0 <= marker <= _APP15:
            raise NotCopyableError(f"its marker FF{marker:02X} is not one of a baseline stream")
    raise NotCopyableError("it has no scan")


def _segments(data: bytes, *, until: int) -> list[tuple[int, bytes, int]]:
    """(marker, the segment from its FF on, its end) of each segment after SOI, up to and including `until`."""
    if data[:2] != b"\xff\xd8":
        raise NotCopyableError(f"it starts with {data[:2].hex() or 'nothing'}, not with SOI")
    found: list[tuple[int, bytes, int]] = []
    position = 2
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 2 > len(data) or data[position] != 0xFF:
            raise NotCopyableError(f"there is no marker at byte {position}")
        marker = data[position + 1]
        if marker == _EOI:
            if until == _EOI:
                return found
            raise NotCopyableError("it ends before its scan")
        if position + 4 > len(data):
            raise NotCopyableError("it is cut off inside a marker")
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if end > len(data) or end < position + 4:
            raise NotCopyableError(f"the segment FF{marker:02X} reaches beyond the end")
        found.append((marker, data[position:end], end))
        if marker == until:
            return found
        position = end


def end_of_scan(tile: bytes, start: int) -> int:
    """Where the EOI after the scan that begins at `start` ends. Raises NotCopyableError where there is none."""
    end = _END_OF_SCAN.search(tile, start)
    if end is None:
        raise NotCopyableError("its scan has no end")
    if tile[end.start() + 1] != _EOI:
        raise NotCopyableError("it has more than one scan")
    return end.start() + 2


def _check_frame(segment: bytes, width_px: int, height_px: int) -> None:
    if len(segment) < 10:
        raise NotCopyableError("its frame header is cut off")
    precision, height, width, components = struct.unpack_from(">BHHB", segment, 4)
    if precision != 8 or components != 3:
        raise NotCopyableError(f"it has {components} components of {precision} bits; 3 of 8 bits are expected")
    if (width, height) != (width_px, height_px):
        raise NotCopyableError(f"its frame is {width}x{height} px, the TIFF says {width_px}x{height_px}")


def _check_adobe(segment: bytes, rgb: bool) -> None:
    # A reader believes the TIFF, a JPEG decoder the marker: where they differ a copy would change its colours.
    if segment[4:9] == b"Adobe" and len(segment) >= 16 and segment[15] != (0 if rgb else 1):
        raise NotCopyableError(f"its Adobe marker says transform {segment[15]}, the TIFF {'RGB' if rgb else 'YCbCr'}")
