"""The cache saves requests and is never believed."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.range_cache import RangeCache
from engine.data.reading import BadSampleError, SampleReader
from engine.data.remote import RemoteDataset, open_remote_dataset
from engine.data.selection import open_datasets
from sharding.index import content_digest


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*/*"))


def age(path: Path, seconds: int) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - seconds * 10**9))


def read_all(url: str, made: Any, store: Any, cache: Path, rows: Any = range(12), **options: Any) -> int:
    """Read rows through the cache, check each, and return the number of requests for shards."""
    before = len(store.asked(".tar"))
    dataset = open_remote_dataset(url, options=store.options(join_bytes=1), cache=cache, **options)
    reader = SampleReader(dataset)
    samples = reader.collect(reader.submit(np.array(list(rows))))
    reader.close()
    assert [sample.jpeg.tobytes() for sample in samples] == [made.payloads[row] for row in rows]
    return len(store.asked(".tar")) - before


def cached_shards(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*/*.tar"))


def test_what_was_read_is_not_asked_for_again(remote: Any, store: Any, tmp_path: Path) -> None:
    made, url = remote
    assert read_all(url, made, store, tmp_path / "c", rows=[1, 4, 9]) == 3
    assert read_all(url, made, store, tmp_path / "c", rows=[1, 4, 9]) == 0
    assert read_all(url, made, store, tmp_path / "c") == 9
    assert read_all(url, made, store, tmp_path / "c") == 0
    assert read_all(url, made, store, tmp_path / "c", cache_bytes=0) == 12
    assert read_all(url, made, store, tmp_path / "d") == 12


def rot(made: Any, cache: Path, row: int, at: int, data: bytes) -> None:
    (path,) = [path for path in cached_shards(cache) if path.stem == made.shards[row]]
    with open(path, "r+b") as file:
        file.seek(made.offsets[row] + at)
        file.write(data)


def test_what_rots_in_the_cache_is_read_anew(remote: Any, store: Any, tmp_path: Path) -> None:
    made, url = remote
    cache = tmp_path / "c"
    read_all(url, made, store, cache)
    rot(made, cache, 3, 200, bytes([made.payloads[3][200] ^ 4]))  # a flipped bit
    rot(made, cache, 6, len(made.payloads[6]) // 2, bytes(len(made.payloads[6]) // 2))  # written by half
    rot(made, cache, 10, -512 + 5, b"z")  # in the header
    assert read_all(url, made, store, cache) == 3
    assert read_all(url, made, store, cache) == 0  # mended
    for path in cached_shards(cache):
        os.truncate(path, path.stat().st_size // 2)
    assert 0 < read_all(url, made, store, cache) <= 12
    assert read_all(url, made, store, cache) == 0


def test_what_is_wrong_in_the_store_is_a_bad_sample_every_time(remote: Any, store: Any, tmp_path: Path) -> None:
    made, url = remote
    at = made.offsets[4] + 50
    store.replace("sets/a/shards/shard-000001.tar", lambda d: d[:at] + bytes([d[at] ^ 1]) + d[at + 1 :])
    for _ in range(2):
        with pytest.raises(BadSampleError, match="crc32"):
            read_all(url, made, store, tmp_path / "c", rows=[3, 4])
    store.replace("sets/a/shards/shard-000001.tar", lambda d: d[:at] + bytes([d[at] ^ 1]) + d[at + 1 :])
    assert read_all(url, made, store, tmp_path / "c", rows=[3, 4]) == 1  # of 4: 3 is in the cache


def test_a_hole_inside_a_joined_piece_is_all_that_is_asked_for(remote: Any, store: Any, tmp_path: Path) -> None:
    made, url = remote
    dataset = open_remote_dataset(url, options=store.options(join_gap_bytes=511), cache=tmp_path)
    reader = SampleReader(dataset)
    reader.collect(reader.submit(np.array([1])))
    store.requests.clear()
    samples = reader.collect(reader.submit(np.array([0, 1, 2])))
    reader.close()
    assert [sample.jpeg.tobytes() for sample in samples] == made.payloads[:3]
    assert len(store.asked(".tar")) == 2
    (asked, _), (other, _) = store.asked(".tar")
    assert asked == other == "sets/a/shards/shard-000000.tar"
    header = made.offsets[0] - 512
    ranges = [f"bytes={header}-{made.offsets[0] + len(made.payloads[0]) - 1}"]
    ranges.append(f"bytes={made.offsets[2] - 512}-{made.offsets[2] + len(made.payloads[2]) - 1}")
    assert sorted(each for _, each in store.asked(".tar")) == sorted(ranges)


def test_the_cache_stays_within_its_size_and_empties_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100 * 4096)
    piece = memoryview(os.urandom(10 * 4096))
    for number in range(10):
        cache.write(f"d/{number}", 0, piece)
    assert disk_bytes(tmp_path) == 100 * 4096
    for number in range(10):
        age(tmp_path / "d" / str(number), 1000 - number)
    assert cache.read("d/0", 0, 4096) == piece[:4096]  # which is a use
    cache.write("d/10", 0, piece)
    left = [number for number in range(11) if (tmp_path / "d" / str(number)).stat().st_size]
    assert left == [0, 4, 5, 6, 7, 8, 9, 10]  # 1, 2 and 3 make 7/8 of the size
    assert cache.read("d/1", 0, 4096) == b""
    for number in range(200):
        cache.write(f"e/{number}", 4096 * number, piece)
        assert disk_bytes(tmp_path) <= 100 * 4096
    # The layout is the remote file's: what is written far from the beginning takes no more room.
    assert cache.read("e/199", 4096 * 199, len(piece)) == piece
    assert cache.read("e/199", 0, 4096) == bytes(4096)
    cache.close()


def test_a_smaller_size_is_kept_from_the_next_opening_on(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1 << 20)
    for number in range(10):
        cache.write(f"d/{number}", 0, memoryview(os.urandom(40960)))
    assert disk_bytes(tmp_path) == 409600
    RangeCache(tmp_path, 100_000)
    assert 0 < disk_bytes(tmp_path) <= 100_000


def test_a_full_disk_ends_the_cache_and_not_the_run(
    remote: Any, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, url = remote
    read_all(url, made, store, tmp_path, rows=[0])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("engine.data.range_cache.os.pwrite", full)
        dataset = open_remote_dataset(url, options=store.options(join_bytes=1), cache=tmp_path)
        reader = SampleReader(dataset)
        samples = reader.collect(reader.submit(np.arange(12)))
        reader.close()
    assert [sample.jpeg.tobytes() for sample in samples] == made.payloads
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


def test_a_cache_that_cannot_be_looked_over_ends_and_not_the_run(
    remote: Any, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, url = remote
    dataset = open_remote_dataset(url, options=store.options(join_bytes=1), cache=tmp_path, cache_bytes=1000)

    def refused(_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(RangeCache, "_sole", refused)
    reader = SampleReader(dataset)
    samples = reader.collect(reader.submit(np.arange(12)))
    reader.close()
    assert [sample.jpeg.tobytes() for sample in samples] == made.payloads
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1


def test_datasets_that_are_loaded_together_share_a_cache(remote: Any, store: Any, tmp_path: Path) -> None:
    made, url = remote
    meta = json.loads((made.path / "dataset.json").read_text())
    meta["versions"] = {"other": "1"}
    (made.path / "dataset.json").write_text(json.dumps(meta | {"digest": content_digest(meta)}))
    urls = [url, store.put(made.path, "sets/b")]
    first, second = open_datasets(urls, store_options=store.options(), cache=tmp_path / "cache")
    assert isinstance(first, RemoteDataset)
    assert isinstance(second, RemoteDataset)
    assert first.ranges is second.ranges


def test_threads_that_write_read_and_empty_at_once_get_nothing_wrong(remote: Any, store: Any, tmp_path: Path) -> None:
    made, url = remote
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            # So small that nearly every write empties something.
            dataset = open_remote_dataset(url, options=store.options(), cache=tmp_path, cache_bytes=20_000)
            reader = SampleReader(dataset)
            for row in np.random.default_rng(seed).integers(0, 12, 60).tolist():
                assert reader.read_one(row).jpeg.tobytes() == made.payloads[row]
            reader.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    RangeCache(tmp_path / "shards", 20_000)
    assert disk_bytes(tmp_path / "shards") <= 20_000


def _write_and_read(folder: Path, seed: int, failures: Any) -> None:
    cache = RangeCache(folder, 40 * 4096)
    random = np.random.default_rng(seed)
    for _ in range(400):
        number = int(random.integers(0, 30))
        name, offset = f"d/{number % 6}", 4 * 4096 * (number // 6)
        data = bytes([number + 1]) * 4096
        if random.random() < 0.5:
            cache.write(name, offset, memoryview(data))
        else:
            found = cache.read(name, offset, 4096)
            if found.strip(b"\0") not in (b"", data[: len(found)]):
                failures.put((number, found[:8]))
    cache.close()


def test_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=_write_and_read, args=(tmp_path, seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert failures.empty()
    RangeCache(tmp_path, 40 * 4096)
    assert disk_bytes(tmp_path) <= 40 * 4096


def test_a_negative_size_is_refused(remote: Any) -> None:
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        open_remote_dataset(remote[1], cache_bytes=-1)
