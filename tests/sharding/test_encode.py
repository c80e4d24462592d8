"""The pixels of a patch, and their JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from sharding.encode import encode_patch, read_patch
from sharding.grid import Geometry, choose_geometry
from sharding.slide import DamagedTileError, Level, Pixels, Slide, Spacing, make_levels, open_slide


def box_mean(picture: np.ndarray, factor: int) -> np.ndarray:
    height, width, _ = picture.shape
    return picture.reshape(height // factor, factor, width // factor, factor, 3).mean(axis=(1, 3))


class FakeReader:
    """One level given as an array."""

    name = "fake"
    spacing: Spacing | None = None

    def __init__(self, picture: Pixels) -> None:
        self._picture = picture
        self.levels: tuple[Level, ...] = make_levels([(picture.shape[1], picture.shape[0])])

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
        return self._picture[y_px : y_px + height_px, x_px : x_px + width_px]

    def close(self) -> None:
        pass


def fake(picture: np.ndarray) -> Slide:
    return Slide(Path("x"), FakeReader(picture.astype(np.uint8)), None)


NOISE = np.random.default_rng(0).integers(0, 256, (600, 600, 3))


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_at_scale_1_they_are_the_slides_own_pixels(reader: Any, slides: Any, decoded: Any) -> None:
    pictures = decoded(slides["plain"])
    with open_slide(slides["plain"], reader) as slide:
        for level, x, y in ((0, 256, 512), (0, 37, 641), (1, 64, 100)):
            pixels = read_patch(slide, Geometry(level, 1.0, 0.5, 128, 128), x, y)
            assert np.array_equal(pixels, pictures[level][y : y + 128, x : x + 128])


def test_at_scale_1_half_pixels_are_rounded_up() -> None:
    geometry = Geometry(0, 1.0, 0.5, 51, 50)
    assert np.array_equal(read_patch(fake(NOISE), geometry, 99.5, 49.5), NOISE[50:101, 100:151])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_halved_scale_is_the_exact_mean_rounded_half_up(factor: int) -> None:
    geometry = Geometry(0, float(factor), 0.5, 32, 32)
    for x, y in ((0, 0), (32 * factor, 32), (7, 11)):
        pixels = read_patch(fake(NOISE), geometry, x, y)
        side = 32 * factor
        assert np.array_equal(pixels, np.floor(box_mean(NOISE[y : y + side, x : x + side], factor) + 0.5))


@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_a_40x_slide_is_halved_to_half_a_micrometre(reader: Any, slides: Any, decoded: Any) -> None:
    picture = decoded(slides["fine"])[0]
    with open_slide(slides["fine"], reader) as slide:
        geometry = choose_geometry(slide.levels, slide.spacing(), mpp=0.5, context_px=128, stride_px=128)
        assert (geometry.level, geometry.scale, geometry.read_px) == (0, 2.0, 256)
        for x, y in ((256, 256), (512, 768), (768, 0)):
            expected = box_mean(picture[y : y + 256, x : x + 256], 2)
            assert np.array_equal(read_patch(slide, geometry, x, y), np.floor(expected + 0.5))


def scaled_by_pillow(path: Path, factor: int) -> np.ndarray:
    """Level 0 of a YCbCr slide from Pillow's own scaled decode of each of its TIFF tiles."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        tile, columns = page.tilewidth, -(-page.imagewidth // page.tilewidth)
        side = tile // factor
        picture = np.empty((-(-page.imagelength // tile) * side, columns * side, 3), np.uint8)
        for i, (offset, length) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            tiff.filehandle.seek(offset)
            image = Image.open(io.BytesIO(page.jpegtables[:-2] + tiff.filehandle.read(length)[2:]))
            image.draft("RGB", (side, side))
            y, x = i // columns * side, i % columns * side
            picture[y : y + side, x : x + side] = np.asarray(image)
    return picture


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("name", ["plain", "fine", "single"])
def test_jpeg_tiles_are_reduced_by_libjpegs_scaled_decode(factor: int, name: str, slides: Any, decoded: Any) -> None:
    """Equal to another program's use of it, and close to the exact mean."""
    picture, expected = decoded(slides[name])[0], scaled_by_pillow(slides[name], factor)
    geometry = Geometry(0, float(factor), 0.5, 48, 40)
    with open_slide(slides[name]) as slide:
        for x, y in ((0, 0), (24 * factor, 40 * factor), (8, 8), (5 * factor, 11 * factor)):
            pixels = read_patch(slide, geometry, x, y)
            column, row, side = x // factor, y // factor, 48 * factor
            assert np.array_equal(pixels, expected[row : row + 48, column : column + 48]), (x, y)
            mean = box_mean(picture[y : y + side, x : x + side], factor)
            assert 10 * np.log10(255**2 / np.square(pixels - mean).mean()) >= 40, (x, y)


def test_where_the_scaled_decode_cannot_serve_the_mean_is_exact(slides: Any, decoded: Any) -> None:
    """The 4099 px of "odd" end within a pair, 257 is not even, and 32 is no scale of libjpeg."""
    cases = [("odd", 2, 4003, 256), ("odd", 4, 4000, 0), ("plain", 2, 257, 300), ("plain", 4, 258, 256)]
    for name, factor, x, y in [*cases, ("rgb", 32, 64, 0)]:
        picture = decoded(slides[name])[0]
        side = 48 * factor if factor < 32 else 256
        white = np.full((side, side, 3), 255)
        part = picture[y : y + side, x : x + side]
        white[: part.shape[0], : part.shape[1]] = part
        with open_slide(slides[name]) as slide:
            pixels = slide.read(0, x, y, side, side, factor=factor)
        assert np.array_equal(pixels, np.floor(box_mean(white, factor) + 0.5)), (name, factor)


def test_a_reduced_window_that_leaves_the_slide_is_white_there(slides: Any) -> None:
    with open_slide(slides["fine"]) as slide:
        corner = read_patch(slide, Geometry(0, 2.0, 0.5, 64, 32), -32, -64)
        assert corner[:32].min() == corner[:, :16].min() == 255
        assert np.array_equal(corner[32:, 16:], slide.read(0, 0, 0, 96, 64, factor=2))
        assert read_patch(slide, Geometry(0, 4.0, 0.5, 16, 16), -64, 0).min() == 255


def test_a_resampled_pixel_does_not_depend_on_its_window() -> None:
    """Windows a whole number of stored pixels apart have pixels in common, up to the last bit of their filters."""
    scale = 0.5 / 0.2374
    first, second = (Geometry(0, scale, 0.5, size, size) for size in (100, 40))
    left, top = 17.3, 60.9
    whole = read_patch(fake(NOISE), first, left, top).astype(int)
    for column, row in ((0, 0), (30, 7), (59, 60), (1, 0)):
        part = read_patch(fake(NOISE), second, left + column * scale, top + row * scale)
        difference = np.abs(part - whole[row : row + 40, column : column + 40])
        assert difference.max() <= 1, (column, row)
        assert (difference > 0).mean() < 0.001, (column, row)
    # So do windows inside a slide that was resized at once.
    at_once = np.asarray(
        Image.fromarray(NOISE.astype(np.uint8)).resize(
            (250, 250), Image.Resampling.BICUBIC, box=(0, 0, 250 * scale, 250 * scale)
        )
    ).astype(int)
    part = read_patch(fake(NOISE), second, 100 * scale, 57 * scale)
    assert np.abs(part - at_once[57:97, 100:140]).max() <= 1


def test_a_fractional_scale_keeps_shapes_where_they_are() -> None:
    """A smooth ramp has a known value everywhere: the middle of every stored pixel has to fall on it."""
    y, x = np.mgrid[0:600, 0:600]
    ramp = np.stack([x * 0.4, y * 0.4, np.full_like(x, 77.0)], axis=2)
    scale = 0.5 / 0.2374
    geometry = Geometry(0, scale, 0.5, 100, 100)
    for left, top in ((0.0, 0.0), (100 * scale, 33.37)):
        pixels = read_patch(fake(np.round(ramp)), geometry, left, top)
        middles = (np.arange(100) + 0.5) * scale - 0.5
        inner = slice(2, -2)  # at the slide's border there is white among the neighbours
        assert np.abs(pixels[inner, inner, 0] - (left + middles[inner])[None, :] * 0.4).max() <= 1.5
        assert np.abs(pixels[inner, inner, 1] - (top + middles[inner])[:, None] * 0.4).max() <= 1.5
        assert np.abs(pixels[inner, inner, 2].astype(int) - 77).max() == 0


@pytest.mark.parametrize("scale", [1.0, 2.0, 1.7])
def test_beyond_the_slide_a_patch_is_white(scale: float) -> None:
    dark = np.zeros((600, 600, 3))
    pixels = read_patch(fake(dark), Geometry(0, scale, 0.5, 64, 32), -16 * scale, -16 * scale)
    # A cubic kernel reaches two pixels across the border.
    assert pixels[:13].min() >= 250
    assert pixels[:, :13].min() >= 250
    assert pixels[19:, 19:].max() <= 5


def test_the_jpeg_is_baseline_444_of_the_asked_quality_and_always_the_same() -> None:
    small = Image.fromarray(NOISE[:16, :16].astype(np.uint8))
    smooth = np.asarray(small.resize((128, 128), Image.Resampling.BICUBIC))
    data = encode_patch(smooth, 90)
    assert data == encode_patch(smooth.copy(), 90)
    assert len(encode_patch(smooth, 50)) < len(data)
    height, width, colourspace, subsampling = simplejpeg.decode_jpeg_header(data)
    assert (height, width, colourspace, subsampling) == (128, 128, "YCbCr", "444")
    assert b"\xff\xc0\x00\x11" in data
    assert np.abs(simplejpeg.decode_jpeg(data, strict=True).astype(int) - smooth).mean() < 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), simplejpeg.decode_jpeg(data, strict=True))


@pytest.mark.parametrize("quality", [50, 80, 90, 97])
def test_optimised_huffman_tables_save_bytes_and_change_no_pixel(quality: int, slides: Any, decoded: Any) -> None:
    patch = decoded(slides["plain"])[0][256:512, 256:512]
    plain, optimised = encode_patch(patch, quality), encode_patch(patch, quality, optimize=True)
    assert len(optimised) < len(plain)
    assert optimised == encode_patch(patch, quality, optimize=True)
    pixels = simplejpeg.decode_jpeg(plain, strict=True)
    assert np.array_equal(simplejpeg.decode_jpeg(optimised, strict=True), pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(optimised))), pixels)
    assert simplejpeg.decode_jpeg_header(optimised) == (256, 256, "YCbCr", "444")
    assert b"\xff\xc0\x00\x11" in optimised
    # Pillow's encoder is another use of libjpeg's accurate DCT.
    with io.BytesIO() as file:
        Image.fromarray(patch).save(file, "JPEG", quality=quality, subsampling=0)
        assert np.array_equal(np.asarray(Image.open(file)), pixels)


def test_a_view_that_is_not_contiguous_encodes_like_its_copy() -> None:
    picture = NOISE.astype(np.uint8)
    assert encode_patch(picture[10:74, 20:84], 80) == encode_patch(picture[10:74, 20:84].copy(), 80)


def test_a_damaged_tile_gives_no_patch(slides: Any, damage_tile: Callable[..., Path], tmp_path: Path) -> None:
    path = damage_tile(slides["fine"], tmp_path / "bad.svs", 0, 1, 1, "zeroed")
    geometry = Geometry(0, 2.0, 0.5, 128, 128)
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError):
            read_patch(slide, geometry, 256.0, 256.0)
        # The neighbour ends where the damage begins: not one pixel of it may be read.
        assert read_patch(slide, geometry, 512.0, 256.0).shape == (128, 128, 3)
        assert read_patch(slide, geometry, 0.0, 256.0 + 1e-9).shape == (128, 128, 3)
