"""Damaged slides, among them one with a bit flipped in each of 600 tiles: stored is what another decoder sees."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile
from PIL import Image

from engine import shard, synth
from engine.recipes import ShardRecipe
from sharding.encode import encode_patch

TILE_PX = 256
FLIPPED_TILES = 600


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """(a slide with one bit flipped in each of FLIPPED_TILES tiles of level 0, their numbers)."""
    folder = tmp_path_factory.mktemp("flipped")
    synth.run(folder, slides=1, size=8192, seed=5, workers=1)
    (path,) = folder.glob("*.svs")
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        offsets, lengths = page.dataoffsets, page.databytecounts
    random = np.random.default_rng(0)
    numbers = random.choice(len(offsets), FLIPPED_TILES, replace=False).tolist()
    data = bytearray(path.read_bytes())
    for number in numbers:
        at = offsets[number] + int(random.integers(lengths[number]))
        data[at] ^= 1 << int(random.integers(8))
    path.write_bytes(data)
    return path, set(numbers)


def pil_sees(path: Path) -> list[np.ndarray | None]:
    """Each tile of level 0 by PIL, which shares no code with ours above libjpeg; None where it gives up."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        tables, places = page.jpegtables, list(zip(page.dataoffsets, page.databytecounts, strict=True))
    data = path.read_bytes()
    pixels: list[np.ndarray | None] = []
    for offset, length in places:
        try:
            picture = Image.open(io.BytesIO(tables[:-2] + data[offset + 2 : offset + length]))
            pixels.append(np.asarray(picture.convert("RGB")) if picture.size == (TILE_PX, TILE_PX) else None)
        except Exception:  # PIL raises many kinds on damaged files
            pixels.append(None)
    return pixels


def strictly_decodes(path: Path) -> list[bool]:
    """Whether each tile of level 0 begins as a JPEG does and libjpeg-turbo decodes it without a warning."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        tables, places = page.jpegtables, list(zip(page.dataoffsets, page.databytecounts, strict=True))
    data = path.read_bytes()
    found = []
    for offset, length in places:
        try:
            shape = simplejpeg.decode_jpeg(tables[:-2] + data[offset + 2 : offset + length], "RGB", strict=True).shape
            found.append(shape == (TILE_PX, TILE_PX, 3) and data[offset : offset + 2] == b"\xff\xd8")
        except ValueError:
            found.append(False)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("routes", ["auto", "decode"])
def test_every_stored_patch_is_the_damaged_files_own_and_every_rejected_one_is_counted(
    routes: str, flipped: tuple[Path, set[int]], tmp_path: Path
) -> None:
    path, numbers = flipped
    out = tmp_path / "dataset"
    recipe = ShardRecipe(slides=str(path), out=out, min_tissue=0.0, routes=routes, workers=2, max_bad_fraction=1.0)
    result = shard.run(recipe, local=True)
    columns = 8192 // TILE_PX
    independent, strict = pil_sees(path), strictly_decodes(path)
    rejected = {number for number, good in enumerate(strict) if not good}
    assert rejected <= numbers
    # Both kinds of damage are there: what a strict decoder notices, and what decodes all the same.
    assert 100 < len(rejected) < FLIPPED_TILES - 50
    rows = pq.read_table(out / "index.parquet").to_pylist()
    stored = {row["row"] * columns + row["col"] for row in rows}
    assert stored == set(range(columns * columns)) - rejected
    assert result["patches"]["quarantined"] == len(rejected)
    assert result["slides"] == {"done": 1, "quarantined": 0}
    assert {row["route"] for row in rows} == {"copy" if routes == "auto" else "decode"}
    for row in rows:
        with open(out / "shards" / f"{row['shard']}.tar", "rb") as tar:
            tar.seek(row["offset"])
            payload = tar.read(row["length"])
        expected = independent[row["row"] * columns + row["col"]]
        assert expected is not None
        if routes == "auto":
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")), expected)
        else:
            assert payload == encode_patch(expected, recipe.quality, optimize=recipe.optimize_huffman)


@pytest.mark.slow
def test_a_damaged_slide_read_after_a_good_one_shows_nothing_of_it(
    flipped: tuple[Path, set[int]], tmp_path: Path, command: Callable[..., Any]
) -> None:
    """cuCIM gives the pixels of the slide before for a tile that does not decode; we do not, also when cuCIM reads."""
    path, _ = flipped
    folder = tmp_path / "slides"
    folder.mkdir()
    synth.run(tmp_path / "good", slides=1, size=2048, seed=9, workers=1)
    (good,) = (tmp_path / "good").glob("*.svs")
    (folder / "a.svs").symlink_to(good)
    (folder / "b.svs").symlink_to(path)
    independent = pil_sees(path)
    done = command.run(  # type: ignore[attr-defined]
        "shard", "shard/tiny", f"slides={folder}", f"out={tmp_path / 'out'}", "reader=cucim", "routes=decode",
        "min_tissue=0", "max_bad_fraction=1", "workers=1", "--local",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    for row in pq.read_table(tmp_path / "out" / "index.parquet").to_pylist():
        if row["slide_id"] == "b":
            with open(tmp_path / "out" / "shards" / f"{row['shard']}.tar", "rb") as tar:
                tar.seek(row["offset"])
                pixels = simplejpeg.decode_jpeg(tar.read(row["length"])).astype(int)
            expected = independent[row["row"] * 32 + row["col"]]
            assert expected is not None
            assert np.abs(pixels - expected).mean() < 8


def tag_value_at(path: Path, name: str, index: int) -> tuple[int, int]:
    """(where in the file, how many bytes) entry `index` of a tag of level 0 stands."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        tag = page.tags[name]
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        return tag.valueoffset + index * width, width


def damaged(slide: Path, out: Path, kind: str) -> None:
    """`slide` with damage of a kind around the middle of level 0."""
    data = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as tiff:
        page: Any = tiff.pages[0]
        offsets, lengths = page.dataoffsets, page.databytecounts
    middle = (2048 // TILE_PX) ** 2 // 2 + 3
    start, stop = offsets[middle], offsets[middle] + lengths[middle]
    if kind == "zeroed":
        data[start:stop] = bytes(stop - start)
    elif kind == "random":
        data[start:stop] = np.random.default_rng(0).bytes(stop - start)
    elif kind.startswith("truncated"):
        del data[len(data) * int(kind.rsplit(maxsplit=1)[-1]) // 100 :]
    else:
        name, value = {
            "zero length": ("TileByteCounts", 0),
            "half the length": ("TileByteCounts", lengths[middle] // 2),
            "a huge length": ("TileByteCounts", 2**31),
            "another tile's place": ("TileOffsets", offsets[middle - 1]),
            "a place beyond the end": ("TileOffsets", 2**31),
            "another subsampling": ("YCbCrSubSampling", 1),
        }[kind]
        at, width = tag_value_at(slide, name, 0 if name == "YCbCrSubSampling" else middle)
        data[at : at + width] = value.to_bytes(width, "little")
    out.write_bytes(data)


KINDS = ["zeroed", "random", "zero length", "truncated at 1", "truncated at 50", "truncated at 99"]
LIES = ["half the length", "a huge length", "another tile's place", "a place beyond the end", "another subsampling"]


@pytest.mark.parametrize("kind", KINDS + LIES)
@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_each_kind_of_damage_costs_what_is_damaged_and_nothing_else(
    kind: str, check: bool, slides: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "good.svs").symlink_to(slides / "synth-0001.svs")
    damaged(slides / "synth-0000.svs", folder / "bad.svs", kind)
    out = tmp_path / "out"
    recipe = ShardRecipe(
        slides=str(folder), out=out, min_tissue=0.0, workers=1, max_bad_fraction=1.0, check_tiles=check
    )
    result = shard.run(recipe, local=True)
    rows = pq.read_table(out / "index.parquet").to_pylist()
    assert sum(row["slide_id"] == "good" for row in rows) == 64
    bad = [row for row in rows if row["slide_id"] == "bad"]
    if result["slides"]["quarantined"]:
        assert kind == "truncated at 1"
        assert not bad
        return
    assert len(bad) + result["patches"]["quarantined"] == 64
    # The last hundredth of the file holds the overviews.
    harmless = kind in ("another tile's place", "another subsampling", "truncated at 99")
    assert (result["patches"]["quarantined"] > 0) != harmless
    independent = pil_sees(folder / "bad.svs")
    for row in bad:
        with open(out / "shards" / f"{row['shard']}.tar", "rb") as tar:
            tar.seek(row["offset"])
            payload = tar.read(row["length"])
        expected = independent[row["row"] * 8 + row["col"]]
        assert expected is not None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")), expected)
