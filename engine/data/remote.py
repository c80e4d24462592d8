"""A dataset in an object store: its tables are copied to a local cache and checked, its shards are read in ranges."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.data.range_cache import RangeCache
from engine.data.store import DEFAULT_CACHE_BYTES, ObjectStore, StoreOptions
from sharding.atomic import atomic_path, sweep_temporary
from sharding.dataset import file_sha256
from sharding.index import Dataset, DatasetDamagedError, canonical_digest, checked_meta, map_rows

_PART_BYTES = 4 << 20
_PARTS_AT_A_TIME = 8
_STALE_S = 24 * 3600.0  # a copy that was not finished by then was given up


@dataclass(frozen=True, slots=True)
class RemoteDataset(Dataset):
    """A Dataset of an object store. `path` is the folder of the cache that holds its tables."""

    store: ObjectStore
    ranges: RangeCache

    @property
    def name(self) -> str:
        """What messages call it: its URL."""
        return self.store.url

    def file(self, name: str) -> Path:
        """Where its index.parquet or slides.parquet can be read; copied there now, unless it is there and intact."""
        _fetch(self.store, name, self.path, self.meta["files"][name])
        return self.path / name


def default_cache() -> Path:
    """The folder that is used where none is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pathology-engine"


def open_remote_dataset(
    url: str,
    *,
    options: StoreOptions | None = None,
    cache: Path | str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    ranges: RangeCache | None = None,
) -> RemoteDataset:
    """Open the finished dataset at `url` (s3://BUCKET/PREFIX, gs://, az://, http://).

    cache: a folder on a local disk, made where it is missing; any number of processes may share it. cache_bytes: how
    much of the shards it keeps; the tables come on top. ranges: that of another dataset with the same cache, to share
    its open files. Raises what `open_dataset` raises, and StoreError.
    """
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes is {cache_bytes}; expected 0 (keep no samples) or more")
    store = ObjectStore(url, options or StoreOptions())
    try:
        meta = checked_meta(store.read_all("dataset.json"), store.url)
    except FileNotFoundError:
        raise ValueError(
            f"{store.url} holds no dataset.json: it is no dataset, or it was not copied there as a whole. "
            "Copy the whole folder that `engine shard` made, dataset.json last."
        ) from None
    shard_names = [shard["name"] for shard in meta["shards"]]
    if strange := [name for name in shard_names if "/" in name]:
        raise DatasetDamagedError(f"{store.url}/dataset.json names a shard {strange[0]!r}, which is no file's name")
    folder = Path(cache).expanduser() if cache else default_cache()
    # The digest covers no slides.parquet, so datasets that differ in nothing else have one folder for shards, not for
    # tables.
    tables = folder / "tables" / canonical_digest(meta)
    tables.mkdir(parents=True, exist_ok=True)
    rows_bin = tables / "rows.bin"
    if meta["counts"]["patches"]:
        _fetch(store, "rows.bin", tables, meta["files"]["rows.bin"])
    else:
        rows_bin.touch()
    return RemoteDataset(
        path=tables,
        meta=meta,
        rows=map_rows(rows_bin, meta, store.url),
        shard_names=shard_names,
        store=store,
        ranges=ranges or RangeCache(folder / "shards", cache_bytes),
    )


class RemoteShards:
    """A ShardSource of ranges of objects."""

    rows_per_task = 1  # each is a request, and as many as there are connections wait at a time

    def __init__(self, dataset: RemoteDataset) -> None:
        options = dataset.store.options
        self.names = dataset.shard_names
        self.threads = options.connections
        self.read_ahead_bytes = options.read_ahead_bytes
        self.join_gap_bytes = options.join_gap_bytes
        self.join_bytes = options.join_bytes
        self._store = dataset.store
        self._ranges = dataset.ranges
        self._digest = str(dataset.meta["digest"])
        self._stop = threading.Event()

    def cached(self, shard: int, offset: int, length: int) -> bytes | None:
        """See ShardSource."""
        return self._ranges.read(f"{self._digest}/{self.names[shard]}.tar", offset, length)

    def read(self, shard: int, offset: int, length: int) -> memoryview:
        """See ShardSource."""
        data = self._store.read(f"shards/{self.names[shard]}.tar", offset, length, self._stop)
        self._ranges.write(f"{self._digest}/{self.names[shard]}.tar", offset, data)
        return data

    def table(self, shard: int) -> bytes:
        """See ShardSource."""
        return self._store.read_all(f"shards/{self.names[shard]}.parquet", self._stop)

    def mending(self, shard: int) -> str:
        """See ShardSource."""
        return (
            f"Copy {self._store.url}/shards/{self.names[shard]}.tar there anew, from a dataset that `engine verify` "
            "finds sound."
        )

    def stop(self) -> None:
        """See ShardSource."""
        self._stop.set()

    def close(self) -> None:
        """See ShardSource."""
        self._ranges.close()


def _fetch(store: ObjectStore, name: str, folder: Path, sha256: str) -> None:
    """Have an object with this digest at folder/name. One process copies it, others wait for that one."""
    path = folder / name
    if path.is_file() and file_sha256(path) == sha256:
        return
    with _locked(folder):
        if path.is_file() and file_sha256(path) == sha256:
            return
        sweep_temporary(folder, older_than_s=_STALE_S)
        with atomic_path(path) as temporary:
            try:
                _copy(store, name, temporary)
            except FileNotFoundError:
                raise DatasetDamagedError(
                    f"{store.url}/{name} is missing, dataset.json lists it: the dataset was not copied as a whole, or "
                    "is damaged; copy the file there anew"
                ) from None
            if (found := file_sha256(temporary)) != sha256:
                raise DatasetDamagedError(
                    f"{store.url}/{name} has SHA-256 {found[:16]}..., dataset.json says {sha256[:16]}...: it is "
                    "damaged or belongs to another dataset; copy the file there anew"
                )


def _copy(store: ObjectStore, name: str, path: Path) -> None:
    size = store.size(name)
    with open(path, "wb") as file, ThreadPoolExecutor(_PARTS_AT_A_TIME, thread_name_prefix="table-copy") as pool:

        def copy_part(offset: int) -> None:
            os.pwrite(file.fileno(), store.read(name, offset, min(_PART_BYTES, size - offset)), offset)

        for _ in pool.map(copy_part, range(0, size, _PART_BYTES)):
            pass


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time in; the kernel drops the lock with its process."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: several may copy, each for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
