"""Where the bytes of shards come from: files here, or an object store with a cache of it here."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.data.store import StoreError
from sharding.index import Dataset

_MAX_OPEN_SHARDS = 128
# What says nothing about the file itself.
_OUTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN}
)


class ShardSource(Protocol):
    """The shards of one dataset. Methods may be called from any number of threads."""

    names: list[str]  # of the shards
    threads: int  # that read at a time
    read_ahead_bytes: int  # beyond the few batches that are always read ahead
    join_gap_bytes: int  # samples no further apart are read as one piece,
    join_bytes: int  # which is not longer than this, unless one sample is
    rows_per_task: int  # fewer cost more for the task than for the reading; more leave threads idle

    def cached(self, shard: int, offset: int, length: int) -> bytes | None:
        """What a cache holds of these bytes; it may be short, damaged or nothing at all. None: there is no cache."""
        ...

    def read(self, shard: int, offset: int, length: int) -> memoryview:
        """Read bytes of shard number `shard`, fewer where it ends before.

        Raises OSError where the shard cannot be read, and StoreError where the store cannot.
        """
        ...

    def table(self, shard: int) -> bytes:
        """The shard's Parquet file. Raises like `read`."""
        ...

    def mending(self, shard: int) -> str:
        """What to do about a damaged shard, for messages."""
        ...

    def stop(self) -> None:
        """Have reads that wait for something give up."""
        ...

    def close(self) -> None:
        """Close files; nothing is read any more."""
        ...


class OpenFile:
    """A file descriptor that closes once nobody holds it: an eviction must not close it under a reading thread."""

    __slots__ = ("fd",)

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1  # __del__ runs even where the next line fails
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class OpenFiles:
    """The files used last, kept open. Hold the OpenFile while its descriptor is in use."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> OpenFile:
        """Return the file at `path`, opened. Raises OSError."""
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        # Opened outside the lock: on a network file system this takes milliseconds. Two threads may both do it.
        file = OpenFile(path, self._flags)
        with self._lock:
            file = self._open.setdefault(path, file)
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return file

    def close(self) -> None:
        """Forget the files; each closes when nobody uses it."""
        with self._lock:
            self._open.clear()


class LocalShards:
    """A ShardSource of files. It reads with `pread`, not mmap: a mapped file that is truncated kills the process."""

    threads = 4
    read_ahead_bytes = 0
    join_gap_bytes = 16 << 10
    join_bytes = 1 << 20
    rows_per_task = 16

    def __init__(self, dataset: Dataset, files: OpenFiles) -> None:
        """`files`, opened for reading, may be shared: so many are open, however many datasets there are."""
        self.names = dataset.shard_names
        self._name = dataset.name
        self._paths = dataset.shard_paths
        self._files = files

    def cached(self, shard: int, offset: int, length: int) -> bytes | None:
        """See ShardSource."""
        return None

    def read(self, shard: int, offset: int, length: int) -> memoryview:
        """See ShardSource."""
        try:
            file = self._files.get(self._paths[shard])  # bound to a name, so that it stays open during the read
            return memoryview(os.pread(file.fd, length, offset))
        except OSError as error:
            if error.errno in _OUTAGES:
                raise StoreError(
                    f"{self._paths[shard]} cannot be read: {error.strerror}. That is trouble of the file system or the "
                    "machine, the samples may be sound: run the same again once it is over"
                ) from error
            raise

    def table(self, shard: int) -> bytes:
        """See ShardSource."""
        return self._paths[shard].with_suffix(".parquet").read_bytes()

    def mending(self, shard: int) -> str:
        """See ShardSource."""
        return f"Run `engine verify {self._name}` to list every damaged sample, then write the shards anew."

    def stop(self) -> None:
        """See ShardSource."""

    def close(self) -> None:
        """See ShardSource."""
        self._files.close()


def joined(
    shards: npt.NDArray[np.integer],
    offsets: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    *,
    gap_bytes: int,
    most_bytes: int,
) -> list[list[int]]:
    """Group pieces of shards, given by three arrays of one length, into those that are read as one.

    Returns positions in the arrays, each exactly once: within a group in the order of their offsets, groups in the
    order of their first position. A group lies in one shard, its gaps have at most gap_bytes, and it spans at most
    most_bytes unless it has one member.
    """
    order = np.lexsort((offsets, shards))
    groups: list[list[int]] = []
    last, start, end = -1, 0, 0
    columns = (order, shards[order], offsets[order], lengths[order])
    for place, shard, offset, length in zip(*(column.tolist() for column in columns), strict=True):
        reach = max(end, offset + length)
        if shard == last and offset - end <= gap_bytes and reach - start <= most_bytes:
            groups[-1].append(place)
        else:
            groups.append([place])
            last, start, reach = shard, offset, offset + length
        end = reach
    return sorted(groups, key=min)


def in_tasks(groups: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Put successive groups together until they have `size` members."""
    task: list[list[int]] = []
    members = 0
    for group in groups:
        task.append(group)
        members += len(group)
        if members >= size:
            yield task
            task, members = [], 0
    if task:
        yield task
