"""Strict decoders of the bytes of one TIFF tile: its pixels, or a TileDefectError that says what was found.

A decoder that is lenient, or is not told what size to expect, makes pixels of damage. So the size is checked before
anything is decoded (a damaged header can ask for 12 GB), warnings are errors, and a stream has to end where its format
says. Damage that decodes all the same cannot be seen here: most flipped bits of JPEG 2000 are of that kind, many of
JPEG and LZW; Deflate carries a checksum.

Source: ISO/IEC 15444-1 annex A (JPEG 2000 codestream), TIFF 6.0 sections 13 and 14 (LZW, predictor).
"""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]

# SOC and SIZ, which begin every codestream; a JP2 file has a few boxes before it.
_J2K_START = b"\xff\x4f\xff\x51"
_J2K_END = b"\xff\xd9"
_J2K_HEAD_BYTES = 4096
# What jpeg2000_components says of the pixels that are decoded here.
THREE_WHOLE_8_BIT = [(7, 1, 1)] * 3
# Of SIZ, from its length on: capability, then x and y each of the image's end, its origin, tiles' size and origin.
_SIZ = struct.Struct(">HH2I2I2I2IH")


class TileDefectError(ValueError):
    """A strict decoder rejects the tile; the message says what was found."""


def decode_jpeg(stream: bytes, size_px: tuple[int, int] = (0, 0)) -> Pixels:
    """A JPEG whose size is known to be sound, uint8 [H, W, 3]; of libjpeg's scales the smallest that gives `size_px`.

    `size_px` is (width, height); 0 asks for its own size.
    """
    try:
        # `min_factor` by itself scales nothing: it bounds what `min_width` and `min_height` ask for.
        return simplejpeg.decode_jpeg(stream, "RGB", min_width=size_px[0], min_height=size_px[1], strict=True)
    except ValueError as error:
        raise _rejected(error) from None


def check_jpeg_size(stream: bytes, size_px: tuple[int, int]) -> None:
    """Raise TileDefectError where a JPEG's header is damaged or states another (width, height)."""
    try:
        height_px, width_px = simplejpeg.decode_jpeg_header(stream)[:2]
    except ValueError as error:
        raise _rejected(error) from None
    if (width_px, height_px) != size_px:
        raise TileDefectError(f"decodes to {width_px}x{height_px} px where {size_px[0]}x{size_px[1]} is expected")


def jpeg2000_components(data: bytes) -> tuple[tuple[int, int], list[tuple[int, int, int]]]:
    """The (width, height) a JPEG 2000 image states, and of each component (bits - 1, x step, y step)."""
    start = data.find(_J2K_START, 0, _J2K_HEAD_BYTES) + len(_J2K_START)
    if start < len(_J2K_START):
        raise TileDefectError(f"is no JPEG 2000: it starts with {data[:4].hex()}")
    if len(data) < start + _SIZ.size:
        raise TileDefectError("is cut off inside its header")
    _, _, x_end, y_end, x_start, y_start, _, _, _, _, count = _SIZ.unpack_from(data, start)
    table = data[start + _SIZ.size : start + _SIZ.size + 3 * count]
    return (x_end - x_start, y_end - y_start), list(struct.iter_unpack("3B", table[: len(table) // 3 * 3]))


def decode_jpeg2000(data: bytes, size_px: tuple[int, int], *, ycbcr: bool) -> Pixels:
    """A JPEG 2000 codestream or JP2 file of three whole 8-bit components, uint8 [H, W, 3].

    `size_px` is (width, height). `ycbcr`: the components are Y, Cb, Cr without the codestream saying so (Aperio's
    compression 33003).
    """
    stated_px, components = jpeg2000_components(data)
    if stated_px != size_px:
        raise TileDefectError(
            f"decodes to {stated_px[0]}x{stated_px[1]} px where {size_px[0]}x{size_px[1]} is expected"
        )
    if components != THREE_WHOLE_8_BIT:
        raise TileDefectError(f"has components of another kind than three of 8 bits each: {components}")
    if not data.rstrip(b"\0").endswith(_J2K_END):
        raise TileDefectError("does not decode: its end-of-codestream marker is missing")
    try:
        pixels = imagecodecs.jpeg2k_decode(data)
    except imagecodecs.Jpeg2kError as error:
        raise _rejected(error) from None
    if pixels.shape != (size_px[1], size_px[0], 3) or pixels.dtype != np.uint8:
        raise TileDefectError(f"decodes to {pixels.shape} {pixels.dtype}")
    if ycbcr:
        return np.asarray(Image.frombuffer("YCbCr", size_px, pixels.tobytes(), "raw", "YCbCr", 0, 1).convert("RGB"))
    return pixels


def decode_lzw(data: bytes, size_px: tuple[int, int], *, differences: bool) -> Pixels:
    """LZW of RGB pixels, uint8 [H, W, 3]; `size_px` is (width, height). `differences`: TIFF's predictor 2."""
    num_bytes = size_px[0] * size_px[1] * 3
    try:
        # One byte more than expected, or a stream that goes on would look whole.
        raw = imagecodecs.lzw_decode(data, out=num_bytes + 1)
    except imagecodecs.LzwError as error:
        raise _rejected(error) from None
    return _pixels(raw, size_px, differences)


def decode_deflate(data: bytes, size_px: tuple[int, int], *, differences: bool) -> Pixels:
    """As decode_lzw, for a zlib stream; its checksum is verified."""
    num_bytes = size_px[0] * size_px[1] * 3
    try:
        raw = imagecodecs.deflate_decode(data, out=num_bytes)  # libdeflate refuses a stream that holds more
    except imagecodecs.DeflateError as error:
        raise _rejected(error) from None
    return _pixels(raw, size_px, differences)


def _pixels(raw: bytes | bytearray, size_px: tuple[int, int], differences: bool) -> Pixels:
    num_bytes = size_px[0] * size_px[1] * 3
    if len(raw) != num_bytes:
        found = f"{len(raw)}" if len(raw) < num_bytes else f"more than {num_bytes}"
        raise TileDefectError(f"decodes to {found} bytes where {num_bytes} are expected")
    pixels = np.frombuffer(raw, np.uint8).reshape(size_px[1], size_px[0], 3)
    return imagecodecs.delta_decode(pixels, axis=1) if differences else pixels


def _rejected(error: Exception) -> TileDefectError:
    return TileDefectError(f"does not decode: {' '.join(str(error).split())}")
