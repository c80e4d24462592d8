"""The index of a dataset: one row per stored patch, as Parquet for people and as `rows.bin` for training ranks.

FORMAT.md states every column. This module owns their dtypes, merges the shards' Parquet files into one
`index.parquet` without holding the table in memory, and opens a finished dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.atomic import atomic_path

FORMAT_VERSION = 2

# What a training rank maps: 20 packed little-endian bytes a row, no header, the order of index.parquet.
ROW_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])

INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.uint64(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("x0", pa.int32(), nullable=False),
        pa.field("y0", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("col", pa.int32(), nullable=False),
        pa.field("level", pa.uint8(), nullable=False),
        pa.field("read_px", pa.int32(), nullable=False),
        pa.field("mpp", pa.float64()),
        pa.field("tissue_fraction", pa.float32(), nullable=False),
        pa.field("flags", pa.uint32(), nullable=False),
        pa.field("route", pa.string(), nullable=False),
        pa.field("region", pa.int64()),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("length", pa.uint32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)

# What of dataset.json its digest is made of. `files` is not among them: slides.parquet holds paths.
_DIGESTED = ("format_version", "recipe", "versions", "counts", "slides", "shards")

# Bits of the column `flags`.
FLAG_OUTSIDE = 1  # the stored pixels reach beyond the slide's edge; there they are white
FLAG_WHITE = 2  # almost all of the patch is near white
FLAG_BLURRED = 4  # it is out of focus
FLAG_PARTIAL_REGION = 8  # its region lacks patches: the slide ends inside it, or some are damaged


class DatasetDamagedError(RuntimeError):
    """A dataset is not what was written."""


_ROW_GROUP = 1 << 17
_MOST_ROWS = 1 << 26  # pyarrow's own limit of a row group
_PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 3}


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file atomically. Its bytes depend on the table and the pyarrow version alone."""
    with atomic_path(path) as temporary:
        write_parquet(table, temporary)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one Parquet file as it comes."""
    pq.write_table(table, path, **_PARQUET)


def write_index(dataset: Path, shard_names: list[str]) -> int:
    """Merge the shards' Parquet files into `index.parquet` and `rows.bin`, in shard order.

    A hundred thousand rows are in memory at a time. `shard_names[i]` is shard number i of `rows.bin`.
    Returns the number of rows.
    """
    num_rows = 0
    with (
        atomic_path(dataset / "index.parquet") as index_tmp,
        atomic_path(dataset / "rows.bin") as rows_tmp,
        pq.ParquetWriter(index_tmp, INDEX_SCHEMA, **_PARQUET) as writer,
        open(rows_tmp, "wb") as rows_file,
    ):
        waiting: list[pa.Table] = []
        for number, table in enumerate(_shard_tables(dataset, shard_names)):
            rows_file.write(packed_rows(table, number).tobytes())
            num_rows += table.num_rows
            # A row group a shard would fill the file's footer, and the memory, at a hundred million rows.
            waiting.append(table)
            if sum(part.num_rows for part in waiting) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting), _MOST_ROWS)
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting), _MOST_ROWS)
    return num_rows


def _shard_tables(dataset: Path, shard_names: list[str]) -> Iterator[pa.Table]:
    for name in shard_names:
        yield pq.read_table(dataset / "shards" / f"{name}.parquet", schema=INDEX_SCHEMA)


def packed_rows(table: pa.Table, shard_number: int) -> npt.NDArray[np.void]:
    """The rows of one shard's table as ROW_DTYPE [num_rows]."""
    rows = np.empty(table.num_rows, ROW_DTYPE)
    rows["shard"] = shard_number
    for column in ("offset", "length", "crc32"):
        rows[column] = table.column(column).to_numpy()
    return rows


@dataclass(frozen=True, slots=True)
class Dataset:
    """A finished dataset, opened. `rows` is ROW_DTYPE [num_rows], memory-mapped and shared between processes."""

    path: Path
    meta: dict[str, Any]
    rows: npt.NDArray[np.void]
    shard_names: list[str]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def shard_paths(self) -> list[Path]:
        """Path of each shard's tar; the position is the shard number of `rows`."""
        return [self.path / "shards" / f"{name}.tar" for name in self.shard_names]

    @property
    def name(self) -> str:
        """What messages call it: its path."""
        return str(self.path)

    def file(self, name: str) -> Path:
        """Where its index.parquet or slides.parquet can be read."""
        return self.path / name


def content_digest(meta: dict[str, Any]) -> str:
    """The digest of a dataset: SHA-256 over what dataset.json says of content, hexadecimal.

    Equal for equal slides, recipe and library versions. Raises KeyError where a part is missing.
    """
    return canonical_digest({key: meta[key] for key in _DIGESTED})


def canonical_digest(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON (sorted keys, no spaces, UTF-8), hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_meta(dataset: Path) -> dict[str, Any]:
    """`dataset.json` as a dict, checked against its own digest.

    Raises ValueError where there is no finished dataset or its format is newer than this program, DatasetDamagedError
    where the file has changed since it was written.
    """
    if not dataset.is_dir():
        raise ValueError(f"{dataset} is not a folder: expected a dataset written by `engine shard`.")
    try:
        data = (dataset / "dataset.json").read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{dataset} holds no dataset.json: it is no dataset, or `engine shard` has not finished it. "
            "Run the same `engine shard` again to finish it."
        ) from None
    return checked_meta(data, str(dataset))


def checked_meta(data: bytes, dataset: str) -> dict[str, Any]:
    """The content of `dataset`'s dataset.json as a dict, checked against its own digest. Raises like `read_meta`."""
    path = f"{dataset}/dataset.json"
    try:
        meta = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetDamagedError(f"{path} is damaged: {error}") from None
    if isinstance(meta, dict) and isinstance(version := meta.get("format_version"), int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{dataset} has format version {version}, this program reads up to {FORMAT_VERSION}: update the engine."
        )
    try:
        intact = content_digest(meta) == meta["digest"]
    except (KeyError, TypeError):
        intact = False
    if not intact:
        raise DatasetDamagedError(f"{path} is damaged: it does not agree with its own digest")
    return dict(meta)


def open_dataset(path: Path | str) -> Dataset:
    """Open a finished dataset for reading.

    Raises ValueError where it is unfinished or of a newer format, DatasetDamagedError where its index is damaged.
    """
    path = Path(path)
    meta = read_meta(path)
    rows = map_rows(path / "rows.bin", meta, str(path))
    return Dataset(path=path, meta=meta, rows=rows, shard_names=[shard["name"] for shard in meta["shards"]])


def map_rows(path: Path, meta: dict[str, Any], dataset: str) -> npt.NDArray[np.void]:
    """Map the rows.bin of `dataset`, which lies at `path`. Raises DatasetDamagedError where it has another size."""
    size = path.stat().st_size if path.is_file() else -1
    expected = int(meta["counts"]["patches"]) * ROW_DTYPE.itemsize
    if size != expected:
        found = f"has {size} bytes" if size >= 0 else "is missing"
        raise DatasetDamagedError(
            f"{dataset}/rows.bin {found}, dataset.json says {expected} bytes "
            f"({meta['counts']['patches']} patches of {ROW_DTYPE.itemsize}): the dataset is damaged, "
            f"see `engine verify {dataset}`."
        )
    return np.memmap(path, dtype=ROW_DTYPE, mode="r") if size else np.empty(0, ROW_DTYPE)
