"""FORMAT.md at its word: a dataset computed anew from its text, its slides and the standard library."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from engine import shard
from engine.recipes import ShardRecipe

MASK = (1 << 64) - 1
RECIPES: dict[str, dict[str, Any]] = {
    "tiles, with glass": {"permute": "global", "min_tissue": 0.0},
    "tiles, each slide by itself": {"permute": "slide", "seed": 3},
    "context, two slides at a time": {"context_px": 192, "stride_px": 128, "permute": "group", "group_slides": 2},
    "regions": {"region_patches": 3, "min_tissue": 0.1, "permute": "group", "group_slides": 2, "seed": 2**63 + 1},
    "halved": {"mpp": 1.0, "context_px": 128, "region_patches": 2},
    "resampled": {"mpp": 0.7, "context_px": 128},
}


def splitmix64(value: int) -> int:
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def blake2b(data: bytes, size: int) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[329:345] = b"0000000\0" * 2  # Python leaves the device numbers empty
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.fixture(scope="module", params=RECIPES)
def made(
    request: pytest.FixtureRequest,
    slides: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_recipe: Callable[..., ShardRecipe],
) -> Path:
    out = tmp_path_factory.mktemp("format") / "dataset"
    shard.run(make_recipe(slides, out, **RECIPES[request.param]), local=True)
    return out


def read(made: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """dataset.json, the rows of index.parquet, and those of slides.parquet by slide_id."""
    slides = pq.read_table(made / "slides.parquet").to_pylist()
    meta = json.loads((made / "dataset.json").read_text())
    return meta, pq.read_table(made / "index.parquet").to_pylist(), {slide["slide_id"]: slide for slide in slides}


def test_fingerprints_ids_and_keys(made: Path) -> None:
    _, index, slides = read(made)
    for slide in slides.values():
        data = Path(slide["path"]).read_bytes()
        size = str(len(data)).encode()
        ends = data[: 1 << 20] + data[max(1 << 20, len(data) - (1 << 20)) :]
        assert slide["fingerprint"] == f"{len(data)}-{blake2b(size + ends, 16)}"
    for row in index:
        fingerprint = slides[row["slide_id"]]["fingerprint"].encode()
        base = hashlib.blake2b(fingerprint + struct.pack("<Id", row["read_px"], row["mpp"] or 0.0), digest_size=8)
        place = (row["x0"] & 0xFFFFFFFF) << 32 | row["y0"] & 0xFFFFFFFF
        assert row["sample_id"] == splitmix64(int.from_bytes(base.digest(), "little") ^ place)
        assert row["key"] == f"{row['sample_id']:016x}"
    assert len({row["sample_id"] for row in index}) == len(index) > 0


def test_groups_shards_and_order(made: Path) -> None:
    meta, index, slides = read(made)
    recipe = meta["recipe"]
    names = {blake2b(f"{key}\0{slide['fingerprint']}".encode(), 8): key for key, slide in slides.items()}
    seeded = sorted(names, key=lambda name: hashlib.blake2b(f"{recipe['seed']}\0{name}".encode()).digest())
    most = {"slide": 1, "global": len(names), "group": recipe["group_slides"]}[recipe["permute"]]
    runs = math.ceil(len(names) / most)
    expected = {}
    for i in range(runs):
        group = sorted(seeded[len(names) * i // runs : len(names) * (i + 1) // runs])
        name = group[0] if len(group) == 1 else blake2b("\0".join(group).encode(), 8)
        rows = [row for row in index if row["slide_id"] in {names[slide] for slide in group}]
        shards = math.ceil(len(rows) / recipe["patches_per_shard"])
        for row in rows:
            key = splitmix64(row["sample_id"] ^ splitmix64(recipe["seed"]))
            expected[row["sample_id"]] = (f"{name}-{(key >> 32) * shards >> 32:05d}", key)
    assert [row["shard"] for row in index] == [expected[row["sample_id"]][0] for row in index]
    assert index == sorted(index, key=lambda row: expected[row["sample_id"]])
    assert [shard["name"] for shard in meta["shards"]] == sorted({row["shard"] for row in index})


def test_windows_and_the_flag_of_those_that_reach_outside(made: Path) -> None:
    meta, index, slides = read(made)
    recipe = meta["recipe"]
    for row in index:
        slide = slides[row["slide_id"]]
        assert row["level"] == 0
        assert slide["mpp"] == 0.5
        scale = recipe["mpp"] / slide["mpp"]
        assert row["read_px"] == round(recipe["context_px"] * scale)
        margin = (recipe["context_px"] - recipe["stride_px"]) / 2 * scale
        x, y = (row[name] * recipe["stride_px"] * scale - margin for name in ("col", "row"))
        assert (row["x0"], row["y0"]) == (math.floor(x + 0.5), math.floor(y + 0.5))
        side = recipe["context_px"] * scale
        outside = min(x, y) < 0 or x + side > slide["width_px0"] + 1e-6 or y + side > slide["height_px0"] + 1e-6
        assert row["flags"] & 1 == outside


def test_regions(made: Path) -> None:
    meta, index, slides = read(made)
    n = meta["recipe"]["region_patches"]
    if n is None:
        assert all(row["region"] is None and not row["flags"] & 8 for row in index)
        return
    patches = defaultdict(list)
    for row in index:
        text = f"region {n} {slides[row['slide_id']]['fingerprint']}".encode()
        base = hashlib.blake2b(text + struct.pack("<Id", row["read_px"], row["mpp"]), digest_size=8).digest()
        place = row["col"] // n << 32 | row["row"] // n
        assert row["region"] == splitmix64(int.from_bytes(base, "little") ^ place) >> 1
        patches[row["region"]].append(row)
    for rows in patches.values():
        assert len({(row["row"] % n, row["col"] % n) for row in rows}) == len(rows)
        assert {bool(row["flags"] & 8) for row in rows} == {len(rows) < n * n}
        assert np.mean([row["tissue_fraction"] for row in rows]) >= meta["recipe"]["min_tissue"] - 1e-6


def test_the_flags_of_copied_patches_follow_from_their_pixels(made: Path) -> None:
    meta, index, _ = read(made)
    assert any(row["flags"] & 2 for row in index) == (meta["recipe"]["min_tissue"] < 0.5)  # there is glass
    for row in (row for row in index if row["route"] == "copy"):
        with open(made / "shards" / f"{row['shard']}.tar", "rb") as tar:
            tar.seek(row["offset"])
            pixels = simplejpeg.decode_jpeg(tar.read(row["length"])).astype(int)[::16]
        a, b, c = pixels[:, :-2, 1], pixels[:, 1:-1, 1], pixels[:, 2:, 1]
        stained = ~(pixels >= 215).all(axis=2)[:, 1:-1]
        white = stained.mean() <= 0.1
        blurred = not white and np.mean((a - 2 * b + c)[stained] ** 2) < 4 + 0.13 * np.mean((c - a)[stained] ** 2)
        assert row["flags"] & 6 == 2 * white + 4 * blurred


def test_every_byte_of_tar_idx_and_rows_follows_from_the_index_and_the_payloads(made: Path) -> None:
    meta, index, _ = read(made)
    packed = b""
    for number, listed in enumerate(meta["shards"]):
        path = made / "shards" / listed["name"]
        stored = path.with_suffix(".tar").read_bytes()
        again, lines = io.BytesIO(), []
        rows = [row for row in index if row["shard"] == listed["name"]]
        for row in rows:
            payload = stored[row["offset"] : row["offset"] + row["length"]]
            assert zlib.crc32(payload) == row["crc32"]
            again.write(tar_header(f"{row['key']}.jpg", len(payload)) + payload + bytes(-len(payload) % 512))
            lines.append(f"jpg {row['offset']} {row['length']} {row['key']}.jpg\n")
            packed += struct.pack("<IQII", number, row["offset"], row["length"], row["crc32"])
        assert again.getvalue() + bytes(1024) == stored
        assert path.with_suffix(".idx").read_text() == f"v1.2 {len(rows)}\n" + "".join(lines)
        assert pq.read_table(path.with_suffix(".parquet")).to_pylist() == rows
        assert (listed["samples"], listed["bytes"]) == (len(rows), len(stored))
        assert listed["index_sha256"] == sha256(path.with_suffix(".parquet"))
    assert (made / "rows.bin").read_bytes() == packed


def test_counts_and_digests(made: Path) -> None:
    meta, index, slides = read(made)
    assert meta["format_version"] == 2
    assert meta["counts"] == {
        "slides": len(slides),
        "slides_done": len(slides),
        "slides_quarantined": 0,
        "patches": len(index),
        "patches_copied": sum(row["route"] == "copy" for row in index),
        "patches_quarantined": 0,
        "shards": len(meta["shards"]),
        "bytes": sum(shard["bytes"] for shard in meta["shards"]),
    }
    assert [slide["slide_id"] for slide in meta["slides"]] == sorted(slides)
    for slide in meta["slides"]:
        rows = [row for row in index if row["slide_id"] == slide["slide_id"]]
        copied = sum(row["route"] == "copy" for row in rows)
        assert (slide["patches"], slide["patches_copied"]) == (len(rows), copied)
        assert slides[slide["slide_id"]]["patches"] == len(rows)
    assert meta["files"] == {name: sha256(made / name) for name in ("index.parquet", "rows.bin", "slides.parquet")}
    parts = ("format_version", "recipe", "versions", "counts", "slides", "shards")
    for name, value in (("digest", {part: meta[part] for part in parts}), ("recipe_digest", meta["recipe"])):
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert meta[name] == hashlib.sha256(text.encode()).hexdigest()
