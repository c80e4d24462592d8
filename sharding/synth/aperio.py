"""JPEG tiles as Aperio writes them, and the pyramidal TIFF around them.

A tile is an abbreviated JPEG stream: its quantisation and Huffman tables stand once per level in the JPEGTables tag,
and it carries neither a JFIF nor an Adobe marker, so only the TIFF's photometric tag tells YCbCr from RGB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from sharding.synth.spec import Photometric, SlideSpec, Subsampling

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _DHT, _SOS, _DQT = 0xC0, 0xC4, 0xDA, 0xDB
# Pyramids above this are written as BigTIFF; classic TIFF ends at 4.29e9 bytes.
BIGTIFF_ABOVE_BYTES = 3_500_000_000


class TileEncoder:
    """Encodes equal-sized RGB tiles to abbreviated JPEG streams that share `tables`."""

    def __init__(self, tile_px: int, *, subsampling: Subsampling, photometric: Photometric, quality: int) -> None:
        self._quality = quality
        self._stored_as = "RGB" if photometric == "rgb" else "YCBCR"
        self._subsampling = "444" if subsampling == "4:4:4" else "420"
        complete = self._complete(np.zeros((tile_px, tile_px, 3), np.uint8))
        self._complete_header, tables, frame = _split_header(complete)
        #: The level's JPEGTables: SOI, DQT and DHT segments, EOI.
        self.tables: bytes = _SOI + tables + _EOI
        self._header = _SOI + frame

    def encode(self, rgb: NDArray[np.uint8]) -> bytes:
        """One tile's abbreviated stream from (tile, tile, 3) uint8."""
        data = self._complete(rgb)
        # Without Huffman optimisation everything before the scan is the same for every tile.
        assert data.startswith(self._complete_header)
        return self._header + data[len(self._complete_header) :]

    def _complete(self, rgb: NDArray[np.uint8]) -> bytes:
        """A self-contained JPEG, markers and all."""
        return bytes(
            imagecodecs.jpeg8_encode(
                rgb,
                level=self._quality,
                colorspace="RGB",
                outcolorspace=self._stored_as,
                subsampling=self._subsampling,
                optimize=False,
            )
        )


def _split_header(jpeg: bytes) -> tuple[bytes, bytes, bytes]:
    """Split a complete JPEG's header: (all of it up to the scan's data, its DQT and DHT segments, its SOF and SOS)."""
    tables, frame, at = b"", b"", 2
    while True:
        marker, length = jpeg[at + 1], struct.unpack_from(">H", jpeg, at + 2)[0]
        segment = jpeg[at : at + 2 + length]
        at += 2 + length
        if marker in (_DQT, _DHT):
            tables += segment
        elif marker == _SOF0:
            frame += _renumber(segment, first=10, step=3)
        elif marker == _SOS:
            return jpeg[:at], tables, frame + _renumber(segment, first=5, step=2)


def _renumber(segment: bytes, *, first: int, step: int) -> bytes:
    """Name the three components 0, 1, 2 as libtiff does for RGB; YCbCr keeps 1, 2, 3.

    libjpeg calls them 'R', 'G', 'B', from which a decoder could guess the colour space that Aperio's tiles do not tell.
    """
    if segment[first] != ord("R"):
        return segment
    changed = bytearray(segment)
    for component in range(3):
        changed[first + step * component] = component
    return bytes(changed)


@dataclass(frozen=True, slots=True)
class Level:
    """One level to write: its size and its tiles' streams, row by row from the top left."""

    width_px: int
    height_px: int
    tiles: Iterable[bytes]


def description(spec: SlideSpec, level: Level | None = None) -> str:
    """The ImageDescription of an upper level or (None) of level 0, with magnification and spacing if there are any."""
    size, tile = f"{spec.width_px}x{spec.height_px}", f"{spec.tile_px}x{spec.tile_px}"
    codec = f"JPEG/{'RGB' if spec.photometric == 'rgb' else 'YCC'} Q={spec.quality}"
    target = "" if level is None else f"-> {level.width_px}x{level.height_px} "
    head = f"Aperio Image Library v12.0.15\r\n{size} [0,0 {size}] ({tile}) {target}{codec}"
    if spec.mpp is None:
        return f"{head}|ScanScope ID = synth"
    return f"{head}|AppMag = {max(1, round(10 / spec.mpp))}|MPP = {spec.mpp:.6g}|ScanScope ID = synth"


def write_pyramid(path: Path, spec: SlideSpec, levels: Sequence[Level], *, tables: bytes, bigtiff: bool) -> None:
    """Write all levels into one TIFF; a level's tiles are drawn while it is written, one at a time.

    Upper levels may therefore fill up while level 0 is consumed.
    """
    # tifffile appends its own name and JSON unless told not to; nothing here depends on time or host.
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for number, level in enumerate(levels):
            scale = spec.width_px / level.width_px
            per_cm = None if spec.mpp is None else 1e4 / (spec.mpp * scale)
            writer.write(
                _bytes_only(level.tiles),
                shape=(level.height_px, level.width_px, 3),
                dtype=np.uint8,
                tile=(spec.tile_px, spec.tile_px),
                photometric="rgb",
                compression="jpeg",
                # Only the tags: the tiles are encoded already.
                compressionargs={"outcolorspace": "rgb" if spec.photometric == "rgb" else "ycbcr"},
                subsampling=(1, 1) if spec.subsampling == "4:4:4" else (2, 2),
                jpegtables=tables,
                description=description(spec, level if number else None),
                resolution=None if per_cm is None else (per_cm, per_cm),
                resolutionunit=None if per_cm is None else "CENTIMETER",
                software=False,
                metadata=None,
            )


def _bytes_only(tiles: Iterable[bytes]) -> Iterator[bytes]:
    """tifffile tells encoded tiles from arrays by asking for an iterator of bytes."""
    yield from tiles
