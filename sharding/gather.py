"""One shard, from rows to its commit: its payloads are read where they lie, checked, and written in their order.

The unit of work that fills shards. A job is idempotent: the shard's Parquet is renamed into place after all else, and a
rerun finds it and does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from imagecodecs import deflate_crc32

from sharding.atomic import atomic_path, write_json
from sharding.faults import fault_point
from sharding.index import INDEX_SCHEMA, DatasetDamagedError, write_parquet
from sharding.jpeg import NotCopyableError, TileHeader, end_of_scan, split
from sharding.rows import NO_REGION, RAW, ROW, Rows
from sharding.slide import fingerprint
from sharding.stage import Source
from sharding.work import WorkFolder
from sharding.writer import (
    BLOCK,
    END_OF_TAR,
    KEY_LENGTH,
    Payload,
    ShardRecord,
    idx_text,
    is_whole,
    keys_of,
    tar_headers,
    write_members,
)

# Payloads that are read, in the order of their files, before they are written in theirs.
_WINDOW_PATCHES = 256
_WINDOW_BYTES = 128 << 20  # of large patches fewer are read at a time
_OPEN_FILES = 256
_MOST_KNOWN = 4  # beginnings of raw tiles that are told apart, per file


class SlideChangedError(RuntimeError):
    """A slide's file was replaced while the run was under way."""


@dataclass(frozen=True, slots=True)
class GatherJob:
    """Shard `number` of a group: rows [first, first + count) of the permutation that has this digest."""

    dataset: str
    group: str
    permutation: str
    number: int
    first: int
    count: int

    @property
    def shard(self) -> str:
        return f"{self.group}-{self.number:05d}"

    def run(self) -> GatherResult:
        return gather_shard(self)


@dataclass(frozen=True, slots=True)
class GatherResult:
    """What became of a shard: its record, None where nothing of it was left, and the patches that were rejected.

    `damaged` counts and explains them: name of the slide's job -> [patches, the first reason, their regions]. All
    were to be copied.
    """

    permutation: str
    shard: ShardRecord | None
    damaged: dict[str, list[Any]]


def read_result(job: GatherJob) -> GatherResult | None:
    """The result of a finished job; None where there is none or its shard is not whole."""
    work = WorkFolder(Path(job.dataset))
    try:
        value = json.loads(work.shard_record(job.shard).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    shard = None if value["shard"] is None else ShardRecord(**value["shard"])
    if value["permutation"] != job.permutation or (shard is not None and not is_whole(shard, work)):
        return None
    return GatherResult(job.permutation, shard, value["damaged"])


def gather_shard(job: GatherJob) -> GatherResult:
    """Write one shard, or return its record where it is already committed.

    Raises SlideChangedError where a slide's file is another one than was planned, DatasetDamagedError where a payload
    in the work folder is not what was written there.
    """
    result = read_result(job)
    if result is not None:
        return result
    work = WorkFolder(Path(job.dataset))
    rows = np.fromfile(work.permutation(job.group), ROW, count=job.count, offset=job.first * ROW.itemsize)
    if len(rows) != job.count:
        raise DatasetDamagedError(f"{work.permutation(job.group)} has lost rows; remove {work.path} and run again")
    with SourceFiles(work.group_sources(job.group)) as files:
        return write_shard(work, job, rows, files)


def write_shard(work: WorkFolder, job: GatherJob, rows: Rows, files: SourceFiles) -> GatherResult:
    """Write and commit one shard of `rows`, in their order, less those whose bytes are rejected."""
    name = job.shard
    damaged: dict[str, list[Any]] = {}
    kept: list[Rows] = []
    work.shard(name, "parquet").unlink(missing_ok=True)  # the commit of another permutation's shard goes first
    step = max(1, min(_WINDOW_PATCHES, _WINDOW_BYTES // max(1, int(rows["length"].max()))))
    with atomic_path(work.shard(name, "tar")) as temporary, open(temporary, "wb", buffering=0) as file:
        for start in range(0, len(rows), step):
            fault_point("gather.window")
            window, payloads = files.read(rows[start : start + step], damaged)
            headers = tar_headers(keys_of(window["sample_id"]), window["length"].astype(np.uint64))
            write_members(file.fileno(), headers, payloads)
            kept.append(window)
        file.write(END_OF_TAR)
    stored = np.concatenate(kept)
    if len(stored) == 0:
        work.shard(name, "tar").unlink()
        result = GatherResult(job.permutation, None, damaged)
        write_json(work.shard_record(name), asdict(result))
        return result
    size = stored["length"].astype(np.int64)
    whole = BLOCK + size + -size % BLOCK
    offsets = np.cumsum(whole) - whole + BLOCK
    keys = keys_of(stored["sample_id"]).tobytes().decode("ascii")
    names = [keys[i : i + KEY_LENGTH] for i in range(0, len(keys), KEY_LENGTH)]
    with atomic_path(work.shard(name, "idx")) as temporary:
        temporary.write_text(idx_text(names, offsets.tolist(), size.tolist()), encoding="ascii")
    table = _table(stored, files, name, names, offsets)
    with atomic_path(work.shard(name, "parquet")) as temporary:
        write_parquet(table, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        shard = ShardRecord(name, len(stored), int(whole.sum()) + len(END_OF_TAR), digest)
        result = GatherResult(job.permutation, shard, damaged)
        write_json(work.shard_record(name), asdict(result))
    return result


def _table(rows: Rows, files: SourceFiles, shard: str, keys: list[str], offsets: npt.NDArray[np.int64]) -> pa.Table:
    numbers, which = np.unique(rows["source"], return_inverse=True)
    sources = [files.source(number) for number in numbers.tolist()]
    columns: dict[str, Any] = {name: rows[name] for name in INDEX_SCHEMA.names if name in (ROW.names or ())}
    for name in ("slide_id", "level", "read_px", "mpp", "route"):
        field_type = INDEX_SCHEMA.field(name).type
        columns[name] = pa.array([getattr(source, name) for source in sources], field_type).take(pa.array(which))
    columns["region"] = pa.array(rows["region"], mask=rows["region"] == NO_REGION)
    columns["shard"] = pa.repeat(shard, len(rows))
    columns["key"] = keys
    columns["offset"] = offsets
    return pa.table([pa.array(columns[f.name], f.type) for f in INDEX_SCHEMA], schema=INDEX_SCHEMA)


@dataclass(slots=True)
class _Open:
    """An open file of payloads. `heads` are (bytes, their crc32); `known` are starts of raw tiles and their heads."""

    descriptor: int
    source: Source
    heads: list[tuple[bytes, int]]
    known: list[tuple[bytes, bytes, int]] = field(default_factory=list)


class SourceFiles:
    """The files that a group's payloads come from, opened as they are needed, a limited number at a time."""

    def __init__(self, table: Path) -> None:
        """`table` has one source, as JSON, a line."""
        self._table = table.open("rb")
        self._starts = line_starts(table)
        self._sources: dict[int, Source] = {}
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def source(self, number: int) -> Source:
        if number not in self._sources:
            self._table.seek(self._starts[number])
            self._sources[number] = Source(**json.loads(self._table.readline()))
        return self._sources[number]

    def read(self, rows: Rows, damaged: dict[str, list[Any]]) -> tuple[Rows, list[Payload]]:
        """The payloads of some rows, each as (head, rest), and the rows with length and crc32 of the payload.

        They are read in the order of files and offsets. Rows whose bytes are rejected are left out and noted in
        `damaged` (see GatherResult).
        """
        count = len(rows)
        payloads: list[Any] = [None] * count
        checksums = [0] * count
        numbers, offsets, lengths = rows["source"].tolist(), rows["offset"].tolist(), rows["length"].tolist()
        heads, expected = rows["head"].tolist(), rows["crc32"].tolist()
        pread, crc32 = os.pread, deflate_crc32
        current = -1
        for i in np.lexsort((rows["offset"], rows["source"])).tolist():
            if numbers[i] != current:
                current = numbers[i]
                file = self._file(current)
            try:
                data = pread(file.descriptor, lengths[i], offsets[i])
            except OSError as error:
                raise OSError(error.errno, error.strerror, file.source.path) from None
            rest: bytes | memoryview = data
            if heads[i] != RAW:
                head, start = file.heads[heads[i]]
                checksum = crc32(data, start)
            else:
                try:
                    head, rest, start = _parse(file, data, lengths[i])
                except NotCopyableError as error:
                    _reject(file.source, rows[i], f"cannot be copied: {error}", damaged)
                    continue
                checksum = crc32(rest, start)  # type: ignore[arg-type]  # its stub forgets memoryview
            if checksum != expected[i] and (heads[i] != RAW or expected[i]):
                _reject(file.source, rows[i], "has changed since it was checked (crc32)", damaged)
                continue
            payloads[i] = (head, rest)
            checksums[i] = checksum
        rows = rows.copy()
        rows["length"] = [0 if payload is None else len(payload[0]) + len(payload[1]) for payload in payloads]
        rows["crc32"] = checksums
        if None in payloads:
            rows = rows[[payload is not None for payload in payloads]]
            payloads = [payload for payload in payloads if payload is not None]
        return rows, payloads

    def _file(self, number: int) -> _Open:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        source = self.source(number)
        descriptor = os.open(source.path, os.O_RDONLY)
        status = os.fstat(descriptor)
        touched = status.st_mtime_ns != source.mtime_ns and source.route == "copy"
        if status.st_size != source.size_bytes or (touched and fingerprint(Path(source.path)) != source.fingerprint):
            os.close(descriptor)
            raise SlideChangedError(f"{source.path} changed while the run was under way; run again")
        heads = [bytes.fromhex(head) for head in source.heads]
        self._open[number] = _Open(descriptor, source, [(head, deflate_crc32(head)) for head in heads])
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return self._open[number]

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self._table.close()
        for file in self._open.values():
            os.close(file.descriptor)


def _parse(file: _Open, tile: bytes, length: int) -> tuple[bytes, memoryview, int]:
    """(head, scan, crc32 of the head) of a TIFF tile as it lies in the slide. Raises NotCopyableError."""
    if len(tile) < length:
        raise NotCopyableError(f"it is cut off: {len(tile)} of {length} bytes are in the file")
    # Almost all tiles of a level begin with the same segments: what precedes the scan is parsed once.
    for beginning, head, checksum in file.known:
        if tile.startswith(beginning):
            return head, memoryview(tile)[len(beginning) : end_of_scan(tile, len(beginning))], checksum
    assert file.source.raw is not None
    prefix, rgb, side = file.source.raw
    parts = split(tile, TileHeader(bytes.fromhex(prefix), rgb), width_px=side, height_px=side)
    checksum = deflate_crc32(parts.head)
    if len(file.known) < _MOST_KNOWN:
        file.known.append((tile[: parts.start], parts.head, checksum))
    return parts.head, memoryview(tile)[parts.start : parts.end], checksum


def _reject(source: Source, row: np.void, what: str, damaged: dict[str, list[Any]]) -> None:
    if source.route == "decode":
        raise DatasetDamagedError(
            f"{source.path} is damaged at byte {row['offset']}: remove the folder {Path(source.path).parent.parent} "
            "and run again"
        )
    found = damaged.setdefault(
        source.name, [0, f"TIFF tile ({row['col']}, {row['row']}) of level {source.level} {what}", []]
    )
    found[0] += 1
    if row["region"] != NO_REGION:
        found[2].append(int(row["region"]))


def line_starts(path: Path) -> list[int]:
    """Where each line of a file begins."""
    starts = [0]
    with open(path, "rb") as file:
        for line in file:
            starts.append(starts[-1] + len(line))
    return starts[:-1]
