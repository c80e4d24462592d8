"""Does a dataset still hold what was written? Every byte is read: tar headers, payloads, padding, index, rows.bin."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from sharding.dataset import DIGESTED_FILES, file_sha256
from sharding.index import INDEX_SCHEMA, ROW_DTYPE, DatasetDamagedError, canonical_digest, packed_rows, read_meta
from sharding.writer import END_OF_TAR, tar_header

_BATCH_ROWS = 1 << 16
Bad = dict[str, str | None]


def verify_dataset(dataset: Path, *, on_shard: Callable[[], None] | None = None) -> dict[str, Any]:
    """Check a finished dataset completely: {"ok": bool, "samples": int, "bad": [{"shard", "key", "reason"}]}.

    `samples` counts the samples whose payload was read. What concerns no single shard or sample has `shard` or `key`
    None. Raises ValueError where there is no finished dataset to check.
    """
    try:
        meta = read_meta(dataset)
    except DatasetDamagedError as error:
        return {"ok": False, "samples": 0, "bad": [_bad(None, None, f"{error}; nothing else can be judged")]}
    bad: list[Bad] = list(_check_files(dataset, meta))
    rows = _rows(dataset, bad)
    index = _Index.open(dataset / "index.parquet", bad)
    samples = start = 0
    for number, shard in enumerate(meta["shards"]):
        table = _read_parquet(dataset / "shards" / f"{shard['name']}.parquet", bad, shard["name"])
        if table is not None:
            if file_sha256(dataset / "shards" / f"{shard['name']}.parquet") != shard["index_sha256"]:
                bad.append(_bad(shard["name"], None, "its Parquet has changed since it was written (SHA-256)"))
            bad.extend(_check_index(table, number, start, shard, rows, index))
            checked, found = _check_shard(dataset, shard, table)
            samples += checked
            bad.extend(found)
        start += shard["samples"]
        if on_shard is not None:
            on_shard()
    index_rows = None if index is None else index.num_rows
    for name, count in (("rows.bin", None if rows is None else len(rows)), ("index.parquet", index_rows)):
        if count is not None and count != start:
            bad.append(_bad(None, None, f"{name} has {count} rows, the shards have {start}"))
    return {"ok": not bad, "samples": samples, "bad": bad}


def _bad(shard: str | None, key: str | None, reason: str) -> Bad:
    return {"shard": shard, "key": key, "reason": reason}


def _check_files(dataset: Path, meta: dict[str, Any]) -> Iterator[Bad]:
    if meta.get("recipe_digest") != canonical_digest(meta["recipe"]):
        yield _bad(None, None, "dataset.json's recipe_digest is not that of its recipe")
    recorded = meta.get("files")
    for name in DIGESTED_FILES:
        path = dataset / name
        if not path.is_file():
            yield _bad(None, None, f"{name} is missing")
        elif not isinstance(recorded, dict) or file_sha256(path) != recorded.get(name):
            yield _bad(None, None, f"{name} has changed since it was written (SHA-256)")
    listed = {shard["name"] for shard in meta["shards"]}
    for stem in sorted({path.stem for path in (dataset / "shards").iterdir()} - listed):
        yield _bad(stem, None, "the shard is not listed in dataset.json")


def _rows(dataset: Path, bad: list[Bad]) -> np.ndarray[Any, np.dtype[np.void]] | None:
    path = dataset / "rows.bin"
    if not path.is_file():
        return None  # _check_files reports it
    if path.stat().st_size % ROW_DTYPE.itemsize:
        bad.append(_bad(None, None, f"rows.bin is no multiple of {ROW_DTYPE.itemsize} bytes"))
        return None
    return np.memmap(path, ROW_DTYPE, mode="r") if path.stat().st_size else np.empty(0, ROW_DTYPE)


class _Index:
    """index.parquet, read from front to back: it may be larger than the memory."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self.num_rows = file.metadata.num_rows
        self._batches = file.iter_batches(_BATCH_ROWS)
        self._rest = INDEX_SCHEMA.empty_table()

    @classmethod
    def open(cls, path: Path, bad: list[Bad]) -> _Index | None:
        try:
            return cls(pq.ParquetFile(path, pre_buffer=False))  # else it keeps what it has read
        except (OSError, pa.ArrowException) as error:
            bad.append(_bad(None, None, f"{path.name} cannot be read: {' '.join(str(error).split())}"))
            return None

    def starts_with(self, table: pa.Table) -> bool:
        """Whether the next rows are those of `table`; they are passed over."""
        try:
            while self._rest.num_rows < table.num_rows:
                self._rest = pa.concat_tables([self._rest, pa.Table.from_batches([next(self._batches)])])
        except (OSError, pa.ArrowException, StopIteration):
            return False
        head, self._rest = self._rest.slice(0, table.num_rows), self._rest.slice(table.num_rows)
        return bool(head.equals(table))


def _read_parquet(path: Path, bad: list[Bad], shard: str | None = None) -> pa.Table | None:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        bad.append(_bad(shard, None, f"{path.name} cannot be read: {' '.join(str(error).split())}"))
        return None
    if not table.schema.equals(INDEX_SCHEMA):
        bad.append(_bad(shard, None, f"{path.name} does not have the columns of the index"))
        return None
    return table


def _check_index(
    table: pa.Table,
    number: int,
    start: int,
    shard: dict[str, Any],
    rows: np.ndarray[Any, np.dtype[np.void]] | None,
    index: _Index | None,
) -> Iterator[Bad]:
    name, count = shard["name"], table.num_rows
    if count != shard["samples"]:
        yield _bad(name, None, f"its Parquet has {count} rows, dataset.json says {shard['samples']} samples")
        return
    if rows is not None and not np.array_equal(rows[start : start + count], packed_rows(table, number)):
        yield _bad(name, None, "rows.bin does not agree with the shard's Parquet")
    if index is not None and not index.starts_with(table):
        yield _bad(name, None, "index.parquet does not agree with the shard's Parquet")


def _check_shard(dataset: Path, shard: dict[str, Any], table: pa.Table) -> tuple[int, list[Bad]]:
    """Read one tar from front to back; returns the number of samples read and what is wrong."""
    name = shard["name"]
    bad: list[Bad] = []
    tar = dataset / "shards" / f"{name}.tar"
    lines = []
    checked = 0
    position = 0
    digest = hashlib.sha256()
    try:
        size = tar.stat().st_size
        if size != shard["bytes"]:
            bad.append(_bad(name, None, f"the tar has {size} bytes, dataset.json says {shard['bytes']}"))
        with open(tar, "rb") as file:
            for row in table.select(["sample_id", "key", "offset", "length", "crc32"]).to_pylist():
                key, length = row["key"], row["length"]
                if row["offset"] != position + 512 or key != f"{row['sample_id']:016x}":
                    bad.append(_bad(name, key, "its offset or key in the index is wrong"))
                    break
                block = file.read(512 + length + -length % 512)
                digest.update(block)
                position += len(block)
                lines.append(f"jpg {row['offset']} {length} {key}.jpg\n")
                reason = _sample_defect(block, key, length, row["crc32"])
                if reason:
                    bad.append(_bad(name, key, reason))
                checked += 1
            end = file.read()
            digest.update(end)
            if not bad and end != END_OF_TAR:
                bad.append(_bad(name, None, "the tar does not end as it was written"))
    except OSError as error:
        bad.append(_bad(name, None, f"the tar cannot be read: {error.strerror}"))
        return checked, bad
    # Version 1 recorded a digest of the tar; now every part of it is checked by itself.
    if not bad and digest.hexdigest() != shard.get("sha256", digest.hexdigest()):
        bad.append(_bad(name, None, "the tar has changed since it was written (SHA-256)"))
    try:
        idx = (dataset / "shards" / f"{name}.idx").read_bytes()
    except OSError as error:
        bad.append(_bad(name, None, f"the idx cannot be read: {error.strerror}"))
    else:
        if idx != (f"v1.2 {len(lines)}\n" + "".join(lines)).encode():
            bad.append(_bad(name, None, "the idx does not agree with the tar"))
    return checked, bad


def _sample_defect(block: bytes, key: str, length: int, crc32: int) -> str:
    payload = block[512 : 512 + length]
    if len(payload) < length:
        return f"the tar ends inside the sample ({len(payload)} of {length} bytes)"
    if zlib.crc32(payload) != crc32:
        return "the payload's crc32 is wrong"
    if block[:512] != tar_header(key, length):
        return "the tar header is damaged"
    if any(block[512 + length :]):
        return "the padding after the payload is damaged"
    try:
        simplejpeg.decode_jpeg(payload, strict=True)
    except ValueError as error:
        return f"the payload does not decode: {error}"
    return ""
