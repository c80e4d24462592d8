"""The proof that a strict decoder accepts a TIFF tile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile

from sharding.tiff_tiles import TiffTiles
from sharding.tile_codecs import TileDefectError, decode_jpeg


def opened(path: Path) -> TiffTiles:
    tiles = TiffTiles.open(path)
    assert isinstance(tiles, TiffTiles), tiles
    return tiles


@pytest.mark.parametrize("name", ["plain", "rgb", "odd", "single", "unspaced"])
def test_every_tile_of_a_whole_slide_is_accepted(name: str, slides: Any, decoded: Any) -> None:
    tiles = opened(slides[name])
    sizes = [(a.shape[1], a.shape[0]) for a in decoded(slides[name])]
    assert tiles.match_levels(sizes)
    for level, (width, height) in enumerate(sizes):
        for column, row in tiles.covering(level, 0, 0, width, height):
            assert tiles.defect(level, column, row) == ""
    tiles.close()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("zeroed", "is no JPEG: it starts with 0000"),
        ("random", "is no JPEG"),
        ("no SOI", "is no JPEG: it starts with 0000"),
        ("scrambled scan", "does not decode"),
        ("second half zeroed", "does not decode|decodes to"),
        ("claims 128 px", "does not decode|decodes to 128x128 px where 256x256"),
        ("no bytes", r"is empty \(0 bytes\)"),
    ],
)
def test_a_damaged_tile_is_rejected_with_its_reason_and_it_alone(
    how: str, reason: str, slides: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    # Tile (1, 2) is one of tissue: half a tile of plain glass may well decode.
    tiles = opened(damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, how))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(tiles.defect(0, 1, 2))
    assert tiles.defect(0, 1, 2) == tiles.defect(0, 1, 2)
    others = [(c, r) for c in range(4) for r in range(4) if (c, r) != (1, 2)]
    assert [tiles.defect(0, c, r) for c, r in others] == [""] * 15
    tiles.close()


def test_a_tile_beyond_the_files_end_is_cut_off(slides: Any, tmp_path: Path) -> None:
    with tifffile.TiffFile(slides["single"]) as tiff:
        page: Any = tiff.pages[0]
        end = page.dataoffsets[-1] + page.databytecounts[-1] // 2
    path = tmp_path / "cut.svs"
    path.write_bytes(slides["single"].read_bytes()[:end])
    tiles = opened(path)
    assert "is cut off: " in tiles.defect(0, 3, 3)
    assert tiles.defect(0, 2, 3) == ""
    tiles.close()


def test_a_tile_that_claims_to_be_huge_costs_no_memory(
    slides: Any, damage_tile: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65280 x 65280 px are 12 GB: the header has to be looked at before anything is decoded."""
    tiles = opened(damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, "claims 65280 px"))

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a tile of 65280 x 65280 px was decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    assert "65280x65280" in tiles.defect(0, 1, 2)
    tiles.close()


def test_covering_names_exactly_the_tiles_under_a_rectangle(slides: Any) -> None:
    tiles = opened(slides["rgb"])  # tiles of 240 px
    assert tiles.match_levels([(1024, 1024), (256, 256)])

    def under(level: int, *rectangle: int) -> list[tuple[int, int]]:
        return list(tiles.covering(level, *rectangle))

    assert under(0, 0, 0, 240, 240) == [(0, 0)]
    assert under(0, 239, 0, 241, 1) == [(0, 0), (1, 0)]
    assert under(0, 480, 719, 481, 721) == [(2, 2), (2, 3)]
    assert len(under(0, 0, 0, 1024, 1024)) == 25
    assert under(1, 0, 0, 256, 256) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    tiles.close()


def test_levels_are_matched_by_their_size_in_the_readers_order(slides: Any) -> None:
    tiles = opened(slides["plain"])
    assert not tiles.match_levels([(1024, 1024), (255, 256)])
    assert tiles.match_levels([(256, 256), (1024, 1024)])
    assert len(list(tiles.covering(0, 0, 0, 256, 256))) == 1
    assert tiles.defect(0, 0, 0) == ""
    assert "missing" in tiles.defect(0, 0, 1)
    tiles.close()


def test_overlapping_windows_in_raster_order_decode_each_tile_once(
    slides: Any, decoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, sizes = simplejpeg.decode_jpeg, []

    def counted(*args: Any, **options: Any) -> Any:
        pixels = decode(*args, **options)
        sizes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    picture = decoded(slides["rgb"])[0]
    windows = [(x, y) for y in range(0, 1024 - 320, 224) for x in range(0, 1024 - 320, 224)]
    tiles = opened(slides["rgb"])
    for x, y in windows:
        assert np.array_equal(tiles.read(0, x, y, x + 320, y + 320), picture[y : y + 320, x : x + 320])
    assert sizes == [(240, 240, 3)] * 25
    sizes.clear()
    for x, y in windows:
        assert tiles.read(0, x, y, x + 320, y + 320, factor=4).shape == (80, 80, 3)
    assert sizes == [(60, 60, 3)] * 25
    tiles.close()
    # A cache of three tiles forgets, and is right all the same.
    sizes.clear()
    monkeypatch.setattr("sharding.tiff_tiles._CACHE_BYTES", 3 * 240 * 240 * 3)
    tiles = opened(slides["rgb"])
    for x, y in windows:
        assert np.array_equal(tiles.read(0, x, y, x + 320, y + 320), picture[y : y + 320, x : x + 320])
        assert len(tiles._decoded) <= 3
    assert len(sizes) > 25
    tiles.close()


def write(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, np.full((512, 512, 3), 90, np.uint8), photometric="rgb", metadata=None, **options)
    return path


def test_other_tiffs_cannot_be_proven_and_say_why(tmp_path: Path) -> None:
    assert TiffTiles.open(write(tmp_path / "strips.tif")) == "the TIFF is not tiled"
    packed = TiffTiles.open(write(tmp_path / "packbits.tif", tile=(256, 256), compression="packbits"))
    assert packed == "there is no strict decoder for its tiles (TIFF compression 32773)"
    (tmp_path / "text.tif").write_text("no TIFF\nat all")
    reason = TiffTiles.open(tmp_path / "text.tif")
    assert isinstance(reason, str)
    assert reason.startswith("not a readable TIFF (")
    assert reason.isprintable()


def test_tiles_too_large_for_memory_are_refused_before_anything_is_decoded(slides: Any, tmp_path: Path) -> None:
    path = tmp_path / "vast.svs"
    for size in ((65_520, 65_520), (0, 256)):
        path.write_bytes(slides["single"].read_bytes())
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            page: Any = tiff.pages[0]
            page.tags["TileWidth"].overwrite(size[0])
            page.tags["TileLength"].overwrite(size[1])
        assert isinstance(TiffTiles.open(path), str)


def test_resolution_tags_become_um_per_pixel_of_each_axis(tmp_path: Path) -> None:
    jpeg: dict[str, Any] = {"tile": (256, 256), "compression": "jpeg"}
    for unit, per_unit, um in (
        ("CENTIMETER", (20_000, 10_000), (0.5, 1.0)),
        ("INCH", (50_800, 50_800), (0.5, 0.5)),
        ("NONE", (1, 1), None),
    ):
        path = write(tmp_path / f"{unit}.tif", resolution=per_unit, resolutionunit=unit, **jpeg)
        tiles = opened(path)
        assert tiles.resolution_um == (um and pytest.approx(um))
        tiles.close()


def test_files_are_closed(slides: Any) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    if before is None:
        pytest.skip("no /proc: open files cannot be counted")
    for _ in range(5):
        opened(slides["plain"]).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_proof_at_an_eighth_of_the_size_rejects_what_a_full_decode_rejects(slides: Any) -> None:
    """It reads the same codes and leaves out the arithmetic: of 2,000 damaged streams none is judged otherwise."""
    random = np.random.default_rng(0)
    streams = []
    for name in ("plain", "rgb"):
        tiles = TiffTiles.open(slides[name])
        assert isinstance(tiles, TiffTiles)
        streams += [tiles.copy(0, column, row, pixels=False).stream for column in range(3) for row in range(3)]
        tiles.close()
    rejected = 0
    for _ in range(2000):
        stream = bytearray(streams[random.integers(len(streams))])
        start = stream.index(b"\xff\xda")  # sizes before the scan are checked elsewhere
        for _ in range(random.integers(1, 4)):
            stream[random.integers(start, len(stream))] ^= 1 << int(random.integers(8))
        judged = []
        for size in ((0, 0), (32, 32)):
            try:
                decode_jpeg(bytes(stream), size)
                judged.append(True)
            except TileDefectError:
                judged.append(False)
        assert judged[0] == judged[1]
        rejected += not judged[0]
    assert 200 < rejected < 1800
