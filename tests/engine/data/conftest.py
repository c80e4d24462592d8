"""A minimal dataset folder, written with tarfile alone: the loader is tested against the format, not our writer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

PATCH_PX = 96


@dataclass(frozen=True)
class MadeDataset:
    path: Path
    keys: list[str]  # per row
    shards: list[str]  # per row
    offsets: list[int]  # per row, of the payload
    payloads: list[bytes]  # per row

    def shard_file(self, row: int) -> Path:
        return self.path / "shards" / f"{self.shards[row]}.tar"

    def overwrite(self, row: int, at: int, data: bytes) -> None:
        """Overwrite bytes of the shard, `at` bytes after the start of the row's payload."""
        with open(self.shard_file(row), "r+b") as file:
            file.seek(self.offsets[row] + at)
            file.write(data)


def painted_jpeg(seed: int, size_px: int, *, quality: int = 80, subsampling: str = "420") -> bytes:
    """A JPEG with structure at all scales, so that a shifted or wrongly upsampled crop cannot look right."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (size_px // 8 + 1, size_px // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    noise = random.integers(-40, 40, (size_px, size_px, 3))
    pixels = np.clip(coarse[:size_px, :size_px] + noise, 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", subsampling)


def write_dataset(
    path: Path, payloads: list[bytes], *, rows_per_shard: int = 10, context_px: int = PATCH_PX
) -> MadeDataset:
    (path / "shards").mkdir(parents=True)
    made = MadeDataset(path, [], [], [], payloads)
    rows, names = [], []
    for number, first in enumerate(range(0, len(payloads), rows_per_shard)):
        name = f"shard-{number:06d}"
        names.append(name)
        with tarfile.open(path / "shards" / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(first, min(first + rows_per_shard, len(payloads))):
                # The top bit is set in half of the ids: they are unsigned.
                key = f"{(row + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}"
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = len(payloads[row])
                made.offsets.append(tar.offset + 512)
                tar.addfile(info, io.BytesIO(payloads[row]))
                made.keys.append(key)
                made.shards.append(name)
                rows.append((number, made.offsets[row], len(payloads[row]), zlib.crc32(payloads[row])))
        table = pa.table({"key": made.keys[first:], "offset": pa.array(made.offsets[first:], pa.uint64())})
        pq.write_table(table, path / "shards" / f"{name}.parquet")
    dtype = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
    (path / "rows.bin").write_bytes(np.array(rows, dtype).tobytes())
    meta: dict[str, Any] = {
        "format_version": 1,
        "recipe": {"context_px": context_px},
        "counts": {"patches": len(payloads)},
        "shards": [{"name": name} for name in names],
        "slides": [],
        "versions": {},
    }
    digested = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    meta["digest"] = hashlib.sha256(digested.encode()).hexdigest()
    (path / "dataset.json").write_text(json.dumps(meta))
    return made


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MadeDataset:
    """37 patches (a prime) of 96 px in 4 shards, with and without chroma subsampling. Not to be damaged."""
    payloads = [painted_jpeg(row, PATCH_PX, subsampling=("444", "420", "422")[row % 3]) for row in range(37)]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "d", payloads)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., MadeDataset]:
    """Write a dataset of one's own: make_dataset(payloads, ...)."""

    def make(payloads: list[bytes] | None = None, **options: Any) -> MadeDataset:
        if payloads is None:
            payloads = [painted_jpeg(row, PATCH_PX) for row in range(12)]
        return write_dataset(tmp_path / f"d{len(list(tmp_path.iterdir()))}", payloads, **options)

    return make


@pytest.fixture(scope="session")
def paint() -> Callable[..., bytes]:
    return painted_jpeg


@pytest.fixture(params=["dali", "torch"])
def backend(request: pytest.FixtureRequest) -> Any:
    """Every backend passes the same tests: a new one is one more word here."""
    return request.param
