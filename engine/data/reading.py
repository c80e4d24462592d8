"""Encoded samples by row number: one `pread` each, checked before anything decodes it.

Decoders cannot be trusted to notice damage (DALI decodes a half-random JPEG without an error), so each sample has to
agree with the index (length, crc32), with its own tar header and with the dataset's patch size.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sharding.index import ROW_DTYPE, Dataset

_HEADER_BYTES = 512  # a USTAR header; it stands right before its member's payload
_MEMBER_NAME = re.compile(rb"([0-9a-f]{16})\.jpg\0")
_MAX_OPEN_SHARDS = 128
_ROWS_PER_TASK = 16  # large enough to hide the cost of a task, small enough that threads share a batch


class BadSampleError(RuntimeError):
    """A stored sample is not what the index says it is. `shard` and `key` name it; `reason` says what was found."""

    def __init__(self, shard: str, key: str, reason: str, row: int = -1, dataset: Path | None = None) -> None:
        # All of it as args, so that the error survives pickling on its way out of a worker process.
        super().__init__(shard, key, reason, row, dataset)
        self.shard = shard
        self.key = key
        self.reason = reason
        self.row = row
        self.dataset = dataset

    def __str__(self) -> str:
        return (
            f"bad sample {self.key} in shard {self.shard} (row {self.row}): {self.reason}. "
            f"Run `engine verify {self.dataset or 'DATASET'}` to list every damaged sample, then write the shards anew."
        )


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


class _OpenShard:
    """A file descriptor that closes once nobody holds it: an eviction must not close it under a reading thread."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = -1  # __del__ runs even where the next line fails
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class SampleReader:
    """Reads the samples of one dataset or several from any number of threads; `submit` reads in threads of its own.

    Rows are numbered through, dataset after dataset. With `keep_faults` a damaged sample is returned as a fault, to be
    replaced; without, it raises BadSampleError. Raises ValueError where datasets hold patches of different sizes.
    """

    def __init__(self, datasets: Dataset | Sequence[Dataset], *, threads: int = 4, keep_faults: bool = False) -> None:
        self._datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
        self._first_rows = _firsts([dataset.num_rows for dataset in self._datasets])
        self._first_shards = _firsts([len(dataset.shard_names) for dataset in self._datasets])
        self._shard_paths = [path for dataset in self._datasets for path in dataset.shard_paths]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._keep_faults = keep_faults
        self._condemned: dict[int, BadSampleError] = {}
        self.patch_px = patch_px(self._datasets)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sample-reader")

    def submit(self, rows: npt.NDArray[np.int64]) -> list[Future[list[Sample]]]:
        """Start reading rows (int64[n]) in threads; the results in turn are the samples in the order of `rows`."""
        chunks = (rows[start : start + _ROWS_PER_TASK] for start in range(0, len(rows), _ROWS_PER_TASK))
        return [self._pool.submit(self.read, chunk) for chunk in chunks]

    def read(self, rows: npt.NDArray[np.int64]) -> list[Sample]:
        """Read rows (int64[n]) one after the other. Raises BadSampleError for the first one that is damaged."""
        # tolist makes Python numbers of all fields at once; element by element costs more than the checks.
        entries = self._entries(rows).tolist()
        return [self._read_one(row, *entry) for row, entry in zip(rows.tolist(), entries, strict=True)]

    def bad_sample(self, row: int, reason: str) -> BadSampleError:
        """Describe a damaged sample by its shard and key, for whoever found the damage (a decoder, for one)."""
        shard, offset, _, _ = self._entries(np.array([row]))[0].tolist()
        path = self._shard_paths[shard]
        return BadSampleError(path.stem, self._key(path, offset), reason, row, path.parents[1])

    def condemn(self, error: BadSampleError) -> None:
        """Treat a sample as damaged from now on: its bytes are as written, but it does not decode."""
        self._condemned[error.row] = error

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._open.clear()

    def _entries(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Return the rows' entries as ROW_DTYPE[n], their shards numbered through all datasets."""
        if len(self._datasets) == 1:
            return self._datasets[0].rows[rows]
        entries = np.empty(len(rows), ROW_DTYPE)
        owners = np.searchsorted(self._first_rows, rows, side="right") - 1
        for owner in np.unique(owners):
            chosen = owners == owner
            part = self._datasets[owner].rows[rows[chosen] - self._first_rows[owner]]
            part["shard"] += int(self._first_shards[owner])
            entries[chosen] = part
        return entries

    def _read_one(self, row: int, shard: int, offset: int, length: int, crc32: int) -> Sample:
        try:
            if row in self._condemned:
                raise self._condemned[row]
            return self._read_sound(row, shard, offset, length, crc32)
        except BadSampleError as error:
            if not self._keep_faults:
                raise
            return Sample(0, np.empty(0, np.uint8), error)

    def _read_sound(self, row: int, shard: int, offset: int, length: int, crc32: int) -> Sample:
        try:
            # pread, not mmap: a mapped file that is truncated kills the process. Bound to a name, so that the
            # descriptor stays open during the read.
            file = self._open_shard(shard)
            data = os.pread(file.fd, _HEADER_BYTES + length, offset - _HEADER_BYTES)
        except OSError as error:
            raise self.bad_sample(row, f"it cannot be read ({error})") from error
        if len(data) < _HEADER_BYTES + length:
            missing = _HEADER_BYTES + length - len(data)
            raise self.bad_sample(row, f"the shard ends {missing} bytes before the sample does (truncated?)")
        name = _header_name(data, length)
        if name is None:
            raise self.bad_sample(row, "the tar header before it is damaged, or belongs to something else")
        found = zlib.crc32(memoryview(data)[_HEADER_BYTES:])
        if found != crc32:
            raise self.bad_sample(row, f"its bytes have crc32 {found:08x}, the index says {crc32:08x}")
        size_px = jpeg_size(data, _HEADER_BYTES)
        if size_px != (self.patch_px, self.patch_px):
            shown = "no JPEG" if size_px is None else f"a JPEG of {size_px[0]} x {size_px[1]} px"
            raise self.bad_sample(row, f"it is {shown}, expected {self.patch_px} x {self.patch_px} px")
        return Sample(int(name, 16), np.frombuffer(data, np.uint8, length, _HEADER_BYTES))

    def _open_shard(self, shard: int) -> _OpenShard:
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
        # Opened outside the lock: on a network file system this takes milliseconds. Two threads may both do it.
        file = _OpenShard(self._shard_paths[shard])
        with self._lock:
            file = self._open.setdefault(shard, file)
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return file

    def _key(self, shard_path: Path, offset: int) -> str:
        """Find a sample's key; only for messages. The shard's table knows it even where the header is damaged."""
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(
                shard_path.with_suffix(".parquet"), columns=["key"], filters=[("offset", "=", offset)]
            )
            if table.num_rows == 1:
                return str(table.column("key")[0].as_py())
        except (OSError, ValueError):  # no such file, or damaged as well (pyarrow's errors derive from these two)
            pass
        try:
            file = _OpenShard(shard_path)
            match = _MEMBER_NAME.match(os.pread(file.fd, 32, offset - _HEADER_BYTES))
        except OSError:
            match = None
        return match[1].decode() if match else f"<unreadable, payload at byte {offset}>"


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
            raise ValueError(f"{dataset.path / 'dataset.json'} does not state recipe.context_px") from None
        if sizes_px[-1] != sizes_px[0]:
            raise ValueError(
                f"{dataset.path} holds patches of {sizes_px[-1]} px, {datasets[0].path} of {sizes_px[0]} px: "
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


def jpeg_size(data: bytes, start: int = 0) -> tuple[int, int] | None:
    """Return (width, height) in px from a JPEG stream's frame header, None where there is no such header.

    The stream begins at data[start]. Only markers are walked, which is far cheaper than asking a decoder.
    """
    if data[start : start + 2] != b"\xff\xd8":
        return None
    at = start + 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOFn; those three are DHT, JPG and DAC
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame header
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
