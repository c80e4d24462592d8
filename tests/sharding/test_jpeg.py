"""Route `copy`: a TIFF tile becomes a patch with its compressed bytes untouched and its pixels the slide's own."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile
from cucim.clara import CuImage
from PIL import Image

from sharding.jpeg import NotCopyableError, TileHeader, split, tile_header
from sharding.synth import SlideSpec, paint_slide

VARIANTS = [
    (256, "4:2:0", "ycbcr"),
    (256, "4:4:4", "ycbcr"),
    (256, "4:4:4", "rgb"),
    (240, "4:2:0", "ycbcr"),
    (240, "4:4:4", "rgb"),
]


def standalone(tile: bytes, header: TileHeader, *, width_px: int, height_px: int) -> bytes:
    """The whole stream: what precedes the scan, then the tile's own bytes."""
    parts = split(tile, header, width_px=width_px, height_px=height_px)
    return parts.head + tile[parts.start : parts.end]


def _patches(dataset: Path, record: Any) -> list[tuple[dict[str, Any], bytes]]:
    """(index row, payload) of every stored patch."""
    found = []
    for shard in record.shards:
        data = (dataset / "shards" / f"{shard.name}.tar").read_bytes()
        for row in pq.read_table(dataset / "shards" / f"{shard.name}.parquet").to_pylist():
            found.append((row, data[row["offset"] : row["offset"] + row["length"]]))
    return found


def _assert_lossless(path: Path, patches: list[tuple[dict[str, Any], bytes]], side: int) -> None:
    """Every decoder gives the pixels that OpenSlide and cuCIM read at the indexed place."""
    with openslide.OpenSlide(str(path)) as one:
        other = CuImage(str(path))
        for row, payload in patches:
            place, level = (row["x0"], row["y0"]), row["level"]
            pixels = simplejpeg.decode_jpeg(payload, strict=True)
            assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(payload))))
            assert np.array_equal(pixels, imagecodecs.jpeg8_decode(payload))
            assert np.array_equal(pixels, np.asarray(one.read_region(place, level, (side, side)))[:, :, :3])
            assert np.array_equal(pixels, np.asarray(other.read_region(place, (side, side), level)))
        other.close()


@pytest.mark.parametrize(("tile_px", "subsampling", "photometric"), VARIANTS)
def test_copied_tiles_are_the_slides_pixels_on_every_level(
    tile_px: int, subsampling: Any, photometric: Any, make_job: Callable[..., Any], run_slide: Any, tmp_path: Path
) -> None:
    spec = SlideSpec(
        seed=11,
        width_px=16 * tile_px + 64,
        height_px=8 * tile_px + 32,
        tile_px=tile_px,
        subsampling=subsampling,
        photometric=photometric,
    )
    paint_slide(spec, tmp_path)
    path = tmp_path / f"{spec.slide_id}.svs"
    levels = set()
    for mpp in (0.5, 2.0):
        out = tmp_path / f"at-{mpp}"
        job = make_job(path, out, mpp=mpp, context_px=tile_px, stride_px=tile_px, min_tissue=0.0)
        record = run_slide(job)
        patches = _patches(out, record)
        assert (record.patches, record.patches_copied, len(patches)) == (len(patches), len(patches), record.patches)
        assert {row["route"] for row, _ in patches} == {"copy"}
        _assert_lossless(path, patches, tile_px)
        levels |= {row["level"] for row, _ in patches}
        # Padded tiles at the right and lower edge are no cells of the grid.
        size = spec.width_px // (4 if mpp == 2.0 else 1), spec.height_px // (4 if mpp == 2.0 else 1)
        assert len(patches) == (size[0] // tile_px) * (size[1] // tile_px)
    assert levels == {0, 1}


def test_a_real_slide_is_copied_losslessly(
    shared: Path, make_job: Callable[..., Any], run_slide: Any, tmp_path: Path
) -> None:
    path = shared / "slides" / "CMU-1-Small-Region.svs"
    record = run_slide(make_job(path, tmp_path, mpp=None, context_px=240, stride_px=240))
    patches = _patches(tmp_path, record)
    assert len(patches) > 20
    assert record.patches_copied == len(patches)
    _assert_lossless(path, patches, 240)


@pytest.mark.parametrize(
    "options",
    [
        {"routes": "decode"},
        {"context_px": 128, "stride_px": 128},
        {"context_px": 256, "stride_px": 128},
        {"mpp": 0.7},
    ],
)
def test_what_is_no_whole_tile_is_decoded(
    options: dict[str, Any], slides: Any, make_job: Callable[..., Any], run_slide: Any, tmp_path: Path
) -> None:
    record = run_slide(make_job(slides["plain"], tmp_path, **{"context_px": 256, "stride_px": 256, **options}))
    assert record.patches > 0
    assert record.patches_copied == 0
    assert {row["route"] for row, _ in _patches(tmp_path, record)} == {"decode"}


def _tile(path: Path) -> tuple[bytes, bytes, int]:
    """(the first tile, the JPEGTables, the side) of a slide."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        tiff.filehandle.seek(page.dataoffsets[0])
        return tiff.filehandle.read(page.databytecounts[0]), page.jpegtables, page.tilewidth


def _insert(tile: bytes, segment: bytes) -> bytes:
    return tile[:2] + segment + tile[2:]


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def test_comments_and_application_segments_and_what_follows_the_end_are_left_out(slides: Any) -> None:
    tile, tables, side = _tile(slides["plain"])
    clean = standalone(tile, tile_header(tables, rgb=False), width_px=side, height_px=side)
    planted = tile
    for marker in (0xFE, 0xE1, 0xED, 0xE0):
        planted = _insert(planted, _segment(marker, b"PATIENT NAME"))
    planted += b"SCANNER USER"
    tagged = tables[:2] + _segment(0xFE, b"SITE NAME") + tables[2:]
    assert standalone(planted, tile_header(tagged, rgb=False), width_px=side, height_px=side) == clean
    assert b"NAME" not in clean
    simplejpeg.decode_jpeg(clean, strict=True)


def test_an_adobe_marker_is_believed_only_where_it_agrees_with_the_tiff(slides: Any) -> None:
    tile, tables, side = _tile(slides["rgb"])
    for transform, rgb in ((0, True), (1, False)):
        marked = _insert(tile, _segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])))
        standalone(marked, tile_header(tables, rgb=rgb), width_px=side, height_px=side)
        with pytest.raises(NotCopyableError, match="Adobe marker"):
            standalone(marked, tile_header(tables, rgb=not rgb), width_px=side, height_px=side)


def test_without_the_adobe_marker_an_rgb_tile_has_wrong_colours(slides: Any) -> None:
    tile, tables, side = _tile(slides["rgb"])
    right = standalone(tile, tile_header(tables, rgb=True), width_px=side, height_px=side)
    wrong = standalone(tile, tile_header(tables, rgb=False), width_px=side, height_px=side)
    assert not np.array_equal(simplejpeg.decode_jpeg(right), simplejpeg.decode_jpeg(wrong))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tile: tile.replace(b"\xff\xc0", b"\xff\xc2", 1), "FFC2 is not one of a baseline stream"),
        (lambda tile: tile[:-2], "no end|cut off"),
        (lambda tile: tile[:9], "beyond the end|cut off|no marker"),
        (lambda tile: b"\0\0" + tile[2:], "not with SOI"),
        (lambda _: b"\xff\xd8\xff\xd9", "ends before its scan"),
        (lambda _: b"", "starts with nothing"),
    ],
)
def test_what_cannot_stand_alone_is_told(change: Callable[[bytes], bytes], reason: str, slides: Any) -> None:
    tile, tables, side = _tile(slides["plain"])
    with pytest.raises(NotCopyableError, match=reason):
        standalone(change(tile), tile_header(tables, rgb=False), width_px=side, height_px=side)


def test_a_frame_of_another_size_or_grey_cannot_stand_alone(slides: Any) -> None:
    tile, tables, side = _tile(slides["plain"])
    with pytest.raises(NotCopyableError, match="the TIFF says"):
        standalone(tile, tile_header(tables, rgb=False), width_px=side, height_px=side - 16)
    grey = simplejpeg.encode_jpeg(np.zeros((64, 64, 1), np.uint8), colorspace="GRAY")
    with pytest.raises(NotCopyableError, match="1 components"):
        standalone(grey, tile_header(b"", rgb=False), width_px=64, height_px=64)


def test_a_progressive_tile_is_decoded_by_the_reader_and_not_copied(
    make_job: Callable[..., Any], run_slide: Any, tmp_path: Path
) -> None:
    """It decodes, so it is no damage; it cannot be copied, so its patches are re-encoded."""
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    pixels[:, :, 1] //= 2  # pink: tissue everywhere

    def progressive() -> Any:
        for y in (0, 256):
            for x in (0, 256):
                file = io.BytesIO()
                Image.fromarray(pixels[y : y + 256, x : x + 256]).save(file, "JPEG", quality=90, progressive=True)
                yield file.getvalue()

    path = tmp_path / "progressive.tif"
    options: dict[str, Any] = {"shape": (512, 512, 3), "dtype": np.uint8, "tile": (256, 256), "compression": "jpeg"}
    tifffile.imwrite(
        path, progressive(), photometric="ycbcr", resolution=(20000, 20000), resolutionunit="CENTIMETER", **options
    )
    record = run_slide(make_job(path, tmp_path / "out", context_px=256, stride_px=256, quality=95, min_tissue=0.0))
    assert (record.status, record.patches, record.patches_copied) == ("done", 4, 0)
    with openslide.OpenSlide(str(path)) as slide:
        for row, payload in _patches(tmp_path / "out", record):
            true = np.asarray(slide.read_region((row["x0"], row["y0"]), 0, (256, 256)))[:, :, :3].astype(int)
            assert np.abs(simplejpeg.decode_jpeg(payload).astype(int) - true).mean() < 6
