"""JPEG 2000, LZW and Deflate tiles: pixels and damage, against decoders that are not the ones used."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from sharding.slide import DamagedTileError, Pixels, UnreadableSlideError, open_slide
from sharding.tiff_tiles import TiffTiles
from sharding.tile_codecs import (
    TileDefectError,
    decode_deflate,
    decode_jpeg2000,
    decode_lzw,
    jpeg2000_components,
)

TILE = (256, 256)
# Name -> (TIFF compression, predictor, the decoder's name).
KINDS: dict[str, tuple[int, bool, str]] = {
    "aperio-ycbcr": (33003, False, "openjpeg"),
    "aperio-rgb": (33005, False, "openjpeg"),
    "jpeg2000": (34712, False, "openjpeg"),
    "lzw": (5, False, "lzw"),
    "lzw-differences": (5, True, "lzw"),
    "deflate": (8, False, "deflate"),
    "deflate-differences": (8, True, "deflate"),
    "old-deflate": (32946, False, "deflate"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def jpeg2000(pixels: Pixels, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=40, codecformat="J2K", reversible=False, **options))


def encoded_tile(kind: str, pixels: Pixels) -> bytes:
    compression, differences, codec = KINDS[kind]
    if compression == 33003:
        return jpeg2000(np.asarray(Image.fromarray(pixels).convert("YCbCr")), mct=False)
    if codec == "openjpeg":
        return jpeg2000(pixels, mct=True)
    if differences:
        pixels = imagecodecs.delta_encode(pixels, axis=1)
    return bytes(imagecodecs.lzw_encode(pixels.tobytes()) if codec == "lzw" else zlib.compress(pixels.tobytes()))


def lzw(data: bytes) -> bytes:
    """A plain LZW decoder after section 13 of TIFF 6.0; ValueError for any code that it does not foresee."""
    table: list[bytes] = []
    out, previous, width, bits, held = bytearray(), b"", 9, 0, 0
    for position, byte in enumerate(data):
        bits, held = bits << 8 | byte, held + 8
        if held < width:
            continue
        held -= width
        code, bits = bits >> held, bits & (1 << held) - 1
        if code == 256:
            table, previous, width = [bytes([i]) for i in range(256)] + [b"", b""], b"", 9
            continue
        if code == 257:
            break
        if not table or code > len(table) or (code == len(table) and not previous):
            raise ValueError(f"code {code} at byte {position}")
        entry = table[code] if code < len(table) else previous + previous[:1]
        if previous:
            table.append(previous + entry[:1])
        out += entry
        previous = entry
        width = 9 if len(table) < 511 else 10 if len(table) < 1023 else 11 if len(table) < 2047 else 12
    return bytes(out)


def independently(kind: str, data: bytes) -> np.ndarray:
    """The tile's pixels by Pillow, zlib or the decoder above; an exception where they reject it."""
    compression, differences, codec = KINDS[kind]
    if codec == "openjpeg":
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        if compression != 33003:
            return pixels
        y, cb, cr = (pixels[..., i].astype(float) - (128 if i else 0) for i in range(3))
        rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2)
        return np.clip(np.round(rgb), 0, 255)
    raw = zlib.decompress(data) if codec == "deflate" else lzw(data)
    pixels = np.frombuffer(raw, np.uint8).reshape(256, 256, 3)
    return np.cumsum(pixels, axis=1, dtype=np.uint8) if differences else pixels


def tolerance(kind: str) -> int:
    """Builds of OpenJPEG round its wavelets' floats each in their own way, by one grey level at most."""
    return 1 if KINDS[kind][2] == "openjpeg" else 0


def write_slide(path: Path, kind: str, pictures: list[Pixels]) -> Path:
    """An Aperio-like pyramid; where its tiles are LZW or Deflate their pixels are those of `pictures`."""

    def tiles(picture: Pixels) -> Iterator[bytes]:
        for y in range(0, picture.shape[0], 256):
            for x in range(0, picture.shape[1], 256):
                tile = np.full((256, 256, 3), 240, np.uint8)
                part = picture[y : y + 256, x : x + 256]
                tile[: part.shape[0], : part.shape[1]] = part
                yield encoded_tile(kind, tile)

    with tifffile.TiffWriter(path) as writer:
        for picture in pictures:
            writer.write(
                tiles(picture),
                shape=picture.shape,
                dtype=np.uint8,
                tile=TILE,
                compression=KINDS[kind][0],
                predictor=KINDS[kind][1],
                photometric="rgb",
                description=f"Aperio Image Library v12\r\n{picture.shape[1]}x{picture.shape[0]} |AppMag = 20|MPP = 0.5",
                metadata=None,
            )
    return path


def raw_tile(path: Path, level: int, number: int) -> bytes:
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[level]
        tiff.filehandle.seek(page.dataoffsets[number])
        return tiff.filehandle.read(page.databytecounts[number])


@pytest.fixture(scope="module")
def kind_slides(tmp_path_factory: pytest.TempPathFactory, slides: Any, decoded: Any) -> dict[str, Path]:
    """A slide of each kind, all of the same pixels: 600 x 520 and 150 x 130."""
    root = tmp_path_factory.mktemp("kinds")
    level0, level1 = decoded(slides["plain"])
    pictures = [level0[256:776, 128:728], level1[64:194, 32:182]]
    return {kind: write_slide(root / f"{kind}.svs", kind, pictures) for kind in KINDS}


def whole(path: Path, kind: str) -> list[np.ndarray]:
    """Both levels, tile by tile, from the independent decoders."""
    pictures = []
    for level, (width, height) in enumerate(((600, 520), (150, 130))):
        columns, rows = -(-width // 256), -(-height // 256)
        tiles = [independently(kind, raw_tile(path, level, i)) for i in range(columns * rows)]
        joined = np.vstack([np.hstack(tiles[row * columns : (row + 1) * columns]) for row in range(rows)])
        pictures.append(joined[:height, :width])
    return pictures


@every_kind
def test_auto_decodes_the_tiles_itself_and_says_so(kind: str, kind_slides: dict[str, Path]) -> None:
    pictures = whole(kind_slides[kind], kind)
    with open_slide(kind_slides[kind]) as slide:
        assert slide.reader_name == KINDS[kind][2]
        assert [(level.width_px, level.height_px) for level in slide.levels] == [(600, 520), (150, 130)]
        assert not slide.copies_tiles(0, 256)
        spacing = slide.spacing()
        assert spacing is not None
        assert spacing.x_um == 0.5
        for level, x, y, w, h in (
            (0, 0, 0, 600, 520),
            (0, 256, 0, 256, 256),
            (0, 200, 250, 99, 33),
            (1, 3, 0, 147, 130),
        ):
            pixels = slide.read(level, x, y, w, h)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            assert np.abs(pixels - pictures[level][y : y + h, x : x + w].astype(int)).max() <= tolerance(kind)


@every_kind
@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_named_readers_agree_or_refuse(kind: str, reader: Any, kind_slides: dict[str, Path]) -> None:
    refusals = {
        ("cucim", "jpeg2000"): "it does not read TIFF compression 34712",
        ("cucim", "deflate-differences"): "it crashes on TIFF compression 8 with a predictor",
        ("openslide", "jpeg2000"): "Unsupported TIFF compression",
    }
    if (reader, kind) in refusals:
        with pytest.raises(UnreadableSlideError, match=refusals[reader, kind]):
            open_slide(kind_slides[kind], reader)
        return
    with open_slide(kind_slides[kind], reader) as slide, open_slide(kind_slides[kind]) as own:
        assert slide.reader_name == reader
        assert slide.levels == own.levels
        for x, y, w, h in ((0, 0, 600, 520), (77, 130, 256, 300)):
            difference = np.abs(slide.read(0, x, y, w, h).astype(int) - own.read(0, x, y, w, h))
            assert difference.max() <= (2 if KINDS[kind][2] == "openjpeg" else 0)


def test_cucim_is_not_started_on_a_file_one_of_whose_pages_would_crash_it(tmp_path: Path) -> None:
    """Such a page need not be a level: a label is enough."""
    picture = np.full((512, 512, 3), 200, np.uint8)
    path = tmp_path / "labelled.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(picture, tile=TILE, compression="jpeg", photometric="rgb", metadata=None)
        writer.write(picture[:64, :64], compression="adobe_deflate", predictor=True, photometric="rgb", metadata=None)
    with pytest.raises(UnreadableSlideError, match="cucim: it crashes on TIFF compression 8 with a predictor"):
        open_slide(path, "cucim")
    with open_slide(path) as slide:
        assert slide.reader_name == "libjpeg"
        assert np.abs(slide.read(0, 0, 0, 512, 512).astype(int) - 200).max() <= 1


@every_kind
@pytest.mark.parametrize("reader", ["auto", "cucim", "openslide"])
@pytest.mark.parametrize("how", ["zeroed", "random", "second half zeroed", "no bytes", "scrambled scan"])
def test_a_damaged_tile_is_an_error_and_its_neighbours_stay_readable(
    kind: str, reader: Any, how: str, kind_slides: dict[str, Path], damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    source = kind_slides[kind]
    path = damage_tile(source, tmp_path / "bad.svs", 0, 1, 1, how)
    with suppress(UnreadableSlideError), open_slide(path, reader) as slide, open_slide(source, reader) as sound:
        if how != "scrambled scan":
            with pytest.raises(DamagedTileError):
                slide.read(0, 256, 256, 256, 256)
        else:
            assert_right_or_damaged(lambda: slide.read(0, 256, 256, 256, 256), kind, raw_tile(path, 0, 4))
        for x, y, w, h in ((0, 0, 600, 256), (0, 256, 256, 264), (512, 0, 88, 520)):
            assert np.array_equal(slide.read(0, x, y, w, h), sound.read(0, x, y, w, h))


def assert_right_or_damaged(read: Callable[[], Pixels], kind: str, data: bytes) -> bool:
    """Whether `read` was an error; else its pixels have to be those of an independent strict decoder."""
    try:
        pixels = read()
    except (DamagedTileError, TileDefectError):
        return True
    assert np.abs(pixels - independently(kind, data).astype(int)).max() <= tolerance(kind)
    return False


def decode(kind: str, data: bytes) -> Pixels:
    compression, differences, codec = KINDS[kind]
    if codec == "openjpeg":
        return decode_jpeg2000(data, TILE, ycbcr=compression == 33003)
    return (decode_lzw if codec == "lzw" else decode_deflate)(data, TILE, differences=differences)


@every_kind
def test_flipped_bits_are_found_or_decode_as_elsewhere(kind: str, kind_slides: dict[str, Path]) -> None:
    data = raw_tile(kind_slides[kind], 0, 4)
    sound = decode(kind, data)
    rng = np.random.default_rng(7)
    found = 0
    for place in rng.integers(0, 8 * len(data), 40).tolist():
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        try:
            expected = independently(kind, bytes(flipped))
        except Exception:  # every decoder has errors of its own
            with suppress(TileDefectError):
                # What one decoder rejects another may repair, but not into other pixels than it had.
                assert np.array_equal(decode(kind, bytes(flipped)), sound), place
            found += 1
            continue
        try:
            pixels = decode(kind, bytes(flipped))
        except TileDefectError:
            found += 1
        else:
            assert np.abs(pixels - expected.astype(int)).max() <= tolerance(kind), place
    if KINDS[kind][2] == "deflate":
        assert found == 40


@every_kind
def test_a_tile_cut_short_is_an_error(kind: str, kind_slides: dict[str, Path]) -> None:
    data = raw_tile(kind_slides[kind], 0, 4)
    for kept in (1, 4, 30, 60, len(data) // 2, len(data) - 100, len(data) - 8):
        with pytest.raises(TileDefectError):
            decode(kind, data[:kept])
    # Padding after the end is not damage.
    assert np.array_equal(decode(kind, data + bytes(2)), decode(kind, data))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "20" not in kind and "aperio" not in kind])
def test_more_or_fewer_pixels_than_a_tile_has_are_an_error(kind: str) -> None:
    for shape, found in (((257, 256, 3), "more than|INSUFFICIENT_SPACE"), ((255, 256, 3), "195840 bytes where 196608")):
        with pytest.raises(TileDefectError, match=found):
            decode(kind, encoded_tile(kind, np.full(shape, 9, np.uint8)))


def test_a_jpeg_2000_tile_of_another_size_or_kind_is_an_error_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = jpeg2000(np.full((256, 256, 3), 90, np.uint8))
    giant, subsampled = bytearray(sound), bytearray(sound)
    giant[8:16] = b"\x00\x00\xff\x00\x00\x00\xff\x00"
    subsampled[46] = 2  # XRsiz of the second component
    assert decode_jpeg2000(sound, TILE, ycbcr=False).shape == (256, 256, 3)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(imagecodecs, "jpeg2k_decode", refuse)
    for data, reason in (
        (bytes(giant), "decodes to 65280x65280 px where 256x256"),
        (bytes(subsampled), r"components .*\(7, 2, 1\)"),
        (jpeg2000(np.full((128, 128, 3), 90, np.uint8)), "decodes to 128x128"),
        (jpeg2000(np.full((256, 256), 90, np.uint8)), "components"),
        (jpeg2000(np.full((256, 256, 3), 90, np.uint16)), "components"),
        (sound[:-2], "end-of-codestream"),
        (b"", "is no JPEG 2000"),
        (sound[:20], "cut off inside its header"),
    ):
        with pytest.raises(TileDefectError, match=reason):
            decode_jpeg2000(data, TILE, ycbcr=False)


def test_a_jp2_file_is_decoded_like_its_codestream() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    boxed = bytes(imagecodecs.jpeg2k_encode(picture, codecformat="JP2", reversible=True))
    assert boxed[4:8] == b"jP  "
    assert jpeg2000_components(boxed) == (TILE, [(7, 1, 1)] * 3)
    assert np.array_equal(decode_jpeg2000(boxed, TILE, ycbcr=False), picture)


def test_subsampled_chroma_is_left_to_openslide(kind_slides: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "subsampled.svs"
    data = bytearray(kind_slides["aperio-ycbcr"].read_bytes())
    with tifffile.TiffFile(kind_slides["aperio-ycbcr"]) as tiff:
        page: Any = tiff.pages[0]
        for offset in page.dataoffsets:
            data[offset + 46] = data[offset + 49] = 2
    path.write_bytes(data)
    assert TiffTiles.open(path) == "its JPEG 2000 components are [(7, 1, 1), (7, 2, 1), (7, 2, 1)]"
    with open_slide(path) as slide:
        assert slide.reader_name == "openslide"


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "reason"),
    [
        ((512, 512, 3), np.uint16, {"photometric": "rgb"}, "three interleaved samples of 8 bits"),
        ((512, 512), np.uint8, {"photometric": "minisblack"}, "three interleaved samples of 8 bits"),
        ((512, 512, 4), np.uint8, {"photometric": "rgb", "extrasamples": [1]}, "three interleaved samples of 8 bits"),
        ((3, 512, 512), np.uint8, {"photometric": "rgb", "planarconfig": "separate"}, "three interleaved samples"),
        ((512, 512, 3), np.uint8, {"photometric": "ycbcr"}, "its photometric interpretation is 6"),
    ],
)
def test_other_pixels_cannot_be_proven_and_the_reason_is_given(
    shape: tuple[int, ...], dtype: Any, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.tif"
    tifffile.imwrite(path, np.zeros(shape, dtype), tile=TILE, compression="lzw", metadata=None, **options)
    found = TiffTiles.open(path)
    assert isinstance(found, str)
    assert reason in found


def test_a_reduced_read_is_the_exact_mean(kind_slides: dict[str, Path]) -> None:
    with open_slide(kind_slides["lzw"]) as slide:
        full = slide.read(0, 64, 128, 256, 128).astype(int)
        reduced = slide.read(0, 64, 128, 256, 128, factor=4)
    expected = np.floor(full.reshape(32, 4, 64, 4, 3).mean(axis=(1, 3)) + 0.5)
    assert np.array_equal(reduced, expected)
