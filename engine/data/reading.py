"""Encoded samples by row number: read where they lie, checked before anything decodes them.

Decoders cannot be trusted to notice damage (DALI decodes a half-random JPEG without an error), so each sample has to
agree with the index (length, crc32), with its own tar header and with the dataset's patch size.
"""

from __future__ import annotations

import functools
import io
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data.sources import LocalShards, OpenFiles, ShardSource, in_tasks, joined
from sharding.faults import fault_point
from sharding.index import ROW_DTYPE, Dataset

_HEADER_BYTES = 512  # a USTAR header; it stands right before its member's payload
_MEMBER_NAME = re.compile(rb"([0-9a-f]{16})\.jpg\0")
_TABLES_KEPT = 4  # of keys, for messages
_MOST_BATCHES_AT_ONCE = 32
_LENGTHS_LOOKED_AT = 1000


class BadSampleError(RuntimeError):
    """A stored sample is not what the index says it is. `shard` and `key` name it; `reason` says what was found."""

    def __init__(self, shard: str, key: str, reason: str, row: int = -1, mending: str = "") -> None:
        # All of it as args, so that the error survives pickling on its way out of a worker process.
        super().__init__(shard, key, reason, row, mending)
        self.shard = shard
        self.key = key
        self.reason = reason
        self.row = row
        self.mending = mending

    def __str__(self) -> str:
        return f"bad sample {self.key} in shard {self.shard} (row {self.row}): {self.reason}. {self.mending}".rstrip()


class Sample(NamedTuple):
    """One encoded sample: its id (u64) and its JPEG stream, uint8[length]; or the fault that stands in their place."""

    sample_id: int
    jpeg: npt.NDArray[np.uint8]
    fault: BadSampleError | None = None


@dataclass(frozen=True, slots=True)
class Replacement:
    """A bad sample and what was delivered for it: the stream's position, the row it holds, the row that came.

    `substitute` is None for a patch of a region: that is absent from its region.
    """

    position: int
    row: int
    substitute: int | None
    fault: BadSampleError = field(compare=False)

    @property
    def outcome(self) -> str:
        if self.substitute is None:
            return f"row {self.row} is absent from its region"
        return f"row {self.substitute} is delivered instead"


class _Entry(NamedTuple):
    """Where a row's sample lies; `shard` is numbered through all datasets."""

    row: int
    shard: int
    offset: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Pending:
    """One sample that is being read: the task that reads it, and its place in what the task returns."""

    task: Future[list[Sample]]
    place: int


class SampleReader:
    """Reads the samples of one dataset or several from any number of threads; `submit` reads in threads of its own.

    Rows are numbered through, dataset after dataset. With `keep_faults` a damaged sample is returned as a fault, to be
    replaced; without, it raises BadSampleError. Raises ValueError where datasets hold patches of different sizes.
    """

    def __init__(self, datasets: Dataset | Sequence[Dataset], *, keep_faults: bool = False) -> None:
        self._datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
        self._first_rows = _firsts([dataset.num_rows for dataset in self._datasets])
        self._first_shards = _firsts([len(dataset.shard_names) for dataset in self._datasets]).tolist()
        self._keep_faults = keep_faults
        self._condemned: dict[int, BadSampleError] = {}
        self.patch_px = patch_px(self._datasets)
        files = OpenFiles(os.O_RDONLY)
        self._sources = [_open_source(dataset, files) for dataset in self._datasets]
        # Datasets of several kinds are read like the one that is farthest away.
        self._manner = max(self._sources, key=lambda source: source.read_ahead_bytes)
        self._pool = ThreadPoolExecutor(self._manner.threads, thread_name_prefix="sample-reader")
        self._keys = functools.lru_cache(_TABLES_KEPT)(self._read_keys)

    def batches_at_once(self, rows: int) -> int:
        """How many batches of so many rows are best submitted together, so that what lies together is read as one."""
        if not self._manner.read_ahead_bytes:
            return 1
        entries = self._datasets[0].rows
        mean_length = float(entries["length"][:: 1 + len(entries) // _LENGTHS_LOOKED_AT].mean())
        # Half of what is read ahead: one half is on its way while the other is used.
        return int(np.clip(self._manner.read_ahead_bytes / 2 / (rows * mean_length), 1, _MOST_BATCHES_AT_ONCE))

    def submit(self, rows: npt.NDArray[np.int64]) -> list[Pending]:
        """Start reading rows (int64[n]) in threads; `collect` waits for the samples."""
        found = self._entries(rows)
        entries = _listed(rows, found)
        pending: dict[int, Pending] = {}
        for task in in_tasks(self._groups(found), self._manner.rows_per_task):
            future = self._pool.submit(self._read_groups, [[entries[place] for place in group] for group in task])
            pending |= {place: Pending(future, number) for number, place in enumerate(chain.from_iterable(task))}
        return [pending[place] for place in range(len(rows))]

    def collect(self, pending: Sequence[Pending]) -> list[Sample]:
        """Return the samples in their order. Raises BadSampleError for the first that is damaged, see `keep_faults`."""
        samples = [each.task.result()[each.place] for each in pending]
        if not self._keep_faults:
            for sample in samples:
                if sample.fault is not None:
                    raise sample.fault
        return samples

    def read_one(self, row: int) -> Sample:
        """Read one row, now and in this thread. Raises like `collect`."""
        (sample,) = self._read_group([self._entry(row)])
        if sample.fault is not None and not self._keep_faults:
            raise sample.fault
        return sample

    def bad_sample(self, row: int, reason: str) -> BadSampleError:
        """Describe a damaged sample by its shard and key, for whoever found the damage (a decoder, for one)."""
        entry = self._entry(row)
        source, shard = self._source(entry.shard)
        return BadSampleError(source.names[shard], self._key(entry), reason, row, source.mending(shard))

    def condemn(self, error: BadSampleError) -> None:
        """Treat a sample as damaged from now on: its bytes are as written, but it does not decode."""
        self._condemned[error.row] = error

    def stop(self) -> None:
        """Have reads give up, those that wait for a store and those that have not begun; do not wait for them."""
        for source in self._sources:
            source.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.stop()
        self._pool.shutdown()
        for source in self._sources:
            source.close()

    def _source(self, shard: int) -> tuple[ShardSource, int]:
        owner = bisect_right(self._first_shards, shard) - 1
        return self._sources[owner], shard - self._first_shards[owner]

    def _entries(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Return the rows' entries as ROW_DTYPE[n], their shards numbered through all datasets."""
        if len(self._datasets) == 1:
            return self._datasets[0].rows[rows]
        entries = np.empty(len(rows), ROW_DTYPE)
        owners = np.searchsorted(self._first_rows, rows, side="right") - 1
        for owner in np.unique(owners):
            chosen = owners == owner
            part = self._datasets[owner].rows[rows[chosen] - self._first_rows[owner]]
            part["shard"] += self._first_shards[owner]
            entries[chosen] = part
        return entries

    def _entry(self, row: int) -> _Entry:
        rows = np.array([row])
        return _listed(rows, self._entries(rows))[0]

    def _groups(self, entries: npt.NDArray[np.void]) -> list[list[int]]:
        """Say which of the entries (ROW_DTYPE[n]) are read as one, headers included."""
        return joined(
            entries["shard"],
            entries["offset"].astype(np.int64) - _HEADER_BYTES,
            entries["length"].astype(np.int64) + _HEADER_BYTES,
            gap_bytes=self._manner.join_gap_bytes,
            most_bytes=self._manner.join_bytes,
        )

    def _read_groups(self, groups: list[list[_Entry]]) -> list[Sample]:
        """Read entries, those of a group as one piece; the samples come in the order of the groups."""
        fault_point("loader.read")
        return [sample for group in groups for sample in self._read_group(group)]

    def _read_group(self, group: list[_Entry]) -> list[Sample]:
        samples = [self._at_hand(entry) for entry in group]
        places = [place for place, sample in enumerate(samples) if sample is None]
        missing = [group[place] for place in places]
        pieces = [list(range(len(missing)))] if missing else []
        if len(missing) < len(group):  # what lay together may now be apart
            pieces = self._groups(np.array([entry[1:] for entry in missing], ROW_DTYPE))
        for piece in pieces:
            for place, sample in zip(piece, self._read_piece([missing[place] for place in piece]), strict=True):
                samples[places[place]] = sample
        return [sample for sample in samples if sample is not None]

    def _at_hand(self, entry: _Entry) -> Sample | None:
        """Return what needs no reading: a sample that was condemned, or one from the cache, if it is sound."""
        if entry.row in self._condemned:
            return _fault(self._condemned[entry.row])
        source, shard = self._source(entry.shard)
        data = source.cached(shard, entry.offset - _HEADER_BYTES, _HEADER_BYTES + entry.length)
        found = self._checked(entry, memoryview(data)) if data else None
        return found if isinstance(found, Sample) else None

    def _read_piece(self, piece: list[_Entry]) -> list[Sample]:
        source, shard = self._source(piece[0].shard)
        start = piece[0].offset - _HEADER_BYTES
        try:
            data = source.read(shard, start, max(entry.offset + entry.length for entry in piece) - start)
        except OSError as error:
            if len(piece) > 1 and not isinstance(error, FileNotFoundError):  # some of it may be readable
                return [sample for entry in piece for sample in self._read_piece([entry])]
            return [_fault(self.bad_sample(entry.row, f"it cannot be read ({error})")) for entry in piece]
        samples = []
        for entry in piece:
            at = entry.offset - _HEADER_BYTES - start
            part = data[at : at + _HEADER_BYTES + entry.length]
            if len(piece) > 1:  # a sample must not keep the whole piece in memory
                part = memoryview(bytes(part))
            found = self._checked(entry, part)
            samples.append(found if isinstance(found, Sample) else _fault(self.bad_sample(entry.row, found)))
        return samples

    def _checked(self, entry: _Entry, data: memoryview) -> Sample | str:
        """Return the sample in `data`, a header and a payload, or say what is wrong with it."""
        missing = _HEADER_BYTES + entry.length - len(data)
        if missing:
            return f"the shard ends {missing} bytes before the sample does (truncated?)"
        name = _header_name(bytes(data[:_HEADER_BYTES]), entry.length)
        if name is None:
            return "the tar header before it is damaged, or belongs to something else"
        found = zlib.crc32(data[_HEADER_BYTES:])
        if found != entry.crc32:
            return f"its bytes have crc32 {found:08x}, the index says {entry.crc32:08x}"
        size_px = jpeg_size(data, _HEADER_BYTES)
        if size_px != (self.patch_px, self.patch_px):
            shown = "no JPEG" if size_px is None else f"a JPEG of {size_px[0]} x {size_px[1]} px"
            return f"it is {shown}, expected {self.patch_px} x {self.patch_px} px"
        return Sample(int(name, 16), np.frombuffer(data, np.uint8, entry.length, _HEADER_BYTES))

    def _key(self, entry: _Entry) -> str:
        """Find a sample's key; only for messages. The shard's table knows it even where the header is damaged."""
        if (key := self._keys(entry.shard).get(entry.offset)) is not None:
            return key
        source, shard = self._source(entry.shard)
        try:
            match = _MEMBER_NAME.match(source.read(shard, entry.offset - _HEADER_BYTES, 32))
        except (OSError, RuntimeError):
            match = None
        return match[1].decode() if match else f"<unreadable, payload at byte {entry.offset}>"

    def _read_keys(self, shard: int) -> dict[int, str]:
        """Return the keys of a shard by their offsets, none where its table is damaged or out of reach."""
        import pyarrow.parquet as pq

        source, number = self._source(shard)
        try:
            table = pq.read_table(io.BytesIO(source.table(number)), columns=["key", "offset"])
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # pyarrow's errors derive from the first two, a store's from the last
            return {}
        return dict(zip(table.column("offset").to_pylist(), table.column("key").to_pylist(), strict=True))


def _open_source(dataset: Dataset, files: OpenFiles) -> ShardSource:
    if type(dataset) is Dataset:
        return LocalShards(dataset, files)
    from engine.data.remote import RemoteDataset, RemoteShards

    assert isinstance(dataset, RemoteDataset)
    return RemoteShards(dataset)


def _listed(rows: npt.NDArray[np.int64], entries: npt.NDArray[np.void]) -> list[_Entry]:
    # tolist makes Python numbers of all fields at once; element by element costs more than the checks.
    return [_Entry(row, *entry) for row, entry in zip(rows.tolist(), entries.tolist(), strict=True)]


def _fault(error: BadSampleError) -> Sample:
    return Sample(0, np.empty(0, np.uint8), error)


def _firsts(counts: list[int]) -> npt.NDArray[np.int64]:
    """Return where each part begins when parts of these sizes are numbered through, int64[n]."""
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)


def patch_px(datasets: Sequence[Dataset]) -> int:
    """Return the side of the stored patches in px, one and the same for all datasets."""
    sizes_px = []
    for dataset in datasets:
        try:
            sizes_px.append(int(dataset.meta["recipe"]["context_px"]))
        except KeyError:
            raise ValueError(f"{dataset.name}/dataset.json does not state recipe.context_px") from None
        if sizes_px[-1] != sizes_px[0]:
            raise ValueError(
                f"{dataset.name} holds patches of {sizes_px[-1]} px, {datasets[0].name} of {sizes_px[0]} px: "
                "datasets that are loaded together need one context_px"
            )
    return sizes_px[0]


def _header_name(data: bytes, length: int) -> bytes | None:
    """Return the key in a USTAR header whose checksum and size are right, else None."""
    match = _MEMBER_NAME.match(data)
    try:
        # The checksum, over the header with its own field blank, covers the name: no flipped digit goes unnoticed.
        checksum = int(data[148:154], 8)
        size = int(data[124:135], 8)
    except ValueError:
        return None
    if match is None or size != length or checksum != sum(data[:148]) + 8 * 32 + sum(data[156:_HEADER_BYTES]):
        return None
    return match[1]


def jpeg_size(data: bytes | memoryview, start: int = 0) -> tuple[int, int] | None:
    """Return (width, height) in px from a JPEG stream's frame header, None where its headers end before any pixels.

    The stream begins at data[start]. Only markers are walked, which is far cheaper than asking a decoder. They are
    walked to the first scan: a stream that breaks off before can end DALI's process.
    """
    if data[start : start + 2] != b"\xff\xd8":
        return None
    at, size = start + 2, None
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOFn; those three are DHT, JPG and DAC
            size = int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
        elif marker in (0xD9, 0xDA):  # the end; a scan, before which a frame header has to be
            return size if marker == 0xDA else None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
