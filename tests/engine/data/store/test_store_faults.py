"""What is wrong with a sample is replaced or named; what is wrong with the store is waited for, then named."""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data import BadSampleError, CropView, SampleStream, open_loader
from engine.data.ahead import OneAhead
from engine.data.order import substitute_position
from engine.data.reading import SampleReader
from engine.data.remote import open_remote_dataset
from engine.data.store import StoreError
from sharding.index import DatasetDamagedError

SEED = 4
VIEW = CropView(40, output="uint8")


def open_it(url: str, backend: Any = "torch", **options: Any) -> Any:
    merged: dict[str, Any] = {"batch_size_per_rank": 4, "seed": SEED, "threads": 2} | options
    return open_loader(url, views=[VIEW], backend=backend, device="cpu", **merged)


def rows_of(loader: Any, batches: int) -> list[int]:
    return [int(row) for _ in range(batches) for row in next(loader).rows]


def deliver(loader: Any, rows: list[int]) -> None:
    """Take batches until there is an error."""
    while True:
        rows += rows_of(loader, 1)


def expected(count: int, bad: set[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Return the rows that are delivered of 12, and (position, row, substitute) of each bad one among them."""
    stream = SampleStream(12, SEED)
    delivered, replaced = [], []
    for position, row in enumerate(stream.rows(0, count).tolist()):
        attempt, substitute = 0, row
        while substitute in bad:
            substitute = int(stream.rows(substitute_position(SEED, position, attempt), 1)[0])
            attempt += 1
        delivered.append(substitute)
        if row in bad:
            replaced.append((position, row, substitute))
    return delivered, replaced


def flip(made: Any, store: Any) -> set[int]:
    at = made.offsets[4] + 100
    store.replace("sets/a/shards/shard-000001.tar", lambda d: d[:at] + bytes([d[at] ^ 1]) + d[at + 1 :])
    return {4}


def truncate(made: Any, store: Any) -> set[int]:
    store.replace("sets/a/shards/shard-000001.tar", lambda data: data[: made.offsets[4] + 100])
    return {4, 5}


def cut_before_the_header(made: Any, store: Any) -> set[int]:
    store.replace("sets/a/shards/shard-000001.tar", lambda data: data[: made.offsets[4] - 600])
    return {4, 5} if made.offsets[4] - 600 >= made.offsets[3] + len(made.payloads[3]) else {3, 4, 5}


def empty(made: Any, store: Any) -> set[int]:
    store.replace("sets/a/shards/shard-000002.tar", lambda data: b"")
    return {6, 7, 8}


def remove(made: Any, store: Any) -> set[int]:
    store.remove("sets/a/shards/shard-000002.tar")
    return {6, 7, 8}


DAMAGE: dict[str, tuple[Callable[[Any, Any], set[int]], str]] = {
    "flipped byte": (flip, "crc32"),
    "truncated": (truncate, "truncated"),
    "cut before a header": (cut_before_the_header, "truncated"),
    "empty": (empty, "truncated"),
    "missing": (remove, r"\.tar .*is not there"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_sample_in_the_store_is_replaced_and_counted(remote: Any, store: Any, backend: Any, damage: str) -> None:
    made, url = remote
    bad = DAMAGE[damage][0](made, store)
    delivered, replaced = expected(36, bad)
    for cache_bytes in (0, 1 << 20, 1 << 20):
        options: dict[str, Any] = {"store_options": store.options(), "cache_bytes": cache_bytes}
        with open_it(url, backend, bad_samples="replace", **options) as loader:
            assert rows_of(loader, 9) == delivered
            assert [(each.position, each.row, each.substitute) for each in loader.replacements] == replaced
            assert len(replaced) == 3 * len(bad)  # once in each of three epochs
            assert all(each.fault.key == made.keys[each.row] for each in loader.replacements)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_sample_in_the_store_is_named(remote: Any, store: Any, backend: Any, damage: str) -> None:
    made, url = remote
    bad = DAMAGE[damage][0](made, store)
    delivered: list[int] = []
    with open_it(url, backend, batch_size_per_rank=1, store_options=store.options()) as loader:
        with pytest.raises(BadSampleError, match=DAMAGE[damage][1]) as caught:
            delivered.extend(int(batch.rows) for batch in loader)
        assert loader.seen == len(delivered)
    planned = SampleStream(12, SEED).rows(0, 12).tolist()
    assert delivered == planned[: len(delivered)]
    assert planned[len(delivered)] == caught.value.row
    assert caught.value.row in bad
    for part in (made.keys[caught.value.row], made.shards[caught.value.row], f"{url}/shards/"):
        assert part in str(caught.value)
    assert "cache" not in str(caught.value)


def test_a_missing_table_is_named(remote: Any, store: Any) -> None:
    _, url = remote
    store.remove("sets/a/rows.bin")
    with pytest.raises(DatasetDamagedError, match=f"{url}/rows.bin is missing"):
        open_it(url)
    store.remove("sets/a/dataset.json")
    with pytest.raises(ValueError, match=f"{url} holds no dataset.json"):
        open_it(url)


def test_a_table_that_is_another_is_named(remote: Any, store: Any) -> None:
    _, url = remote
    store.replace("sets/a/rows.bin", lambda data: bytes(len(data)))
    store.replace("sets/a/slides.parquet", lambda data: data + b"x")
    with pytest.raises(DatasetDamagedError, match=f"{url}/rows.bin has SHA-256"):
        open_it(url)


def test_a_dataset_json_with_a_path_for_a_shard_is_refused(remote: Any, store: Any) -> None:
    import json

    from sharding.index import content_digest

    def change(data: bytes) -> bytes:
        meta = json.loads(data)
        meta["shards"][0]["name"] = "../../outside"
        meta["digest"] = content_digest(meta)
        return json.dumps(meta).encode()

    store.replace("sets/a/dataset.json", change)
    with pytest.raises(DatasetDamagedError, match="which is no file's name"):
        open_it(remote[1])


@pytest.mark.parametrize("fault", [500, 503, "cut", "stall", "stall in the body"])
def test_what_passes_is_waited_for(
    remote: Any, store: Any, backend: Any, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, url = remote
    # Each object fails at first: the tables, then every shard.
    store.fault = lambda key, number: fault if number < 2 else None
    options = store.options(timeout_s=0.5 if "stall" in str(fault) else 10.0)
    with open_it(url, backend, store_options=options, bad_samples="replace", cache_bytes=0) as loader:
        assert rows_of(loader, 6) == expected(24, set())[0]
        assert loader.replacements == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # and not one for each request
    assert url in warnings[0]


WORDS = {
    500: r"HTTP 500 Internal Server Error \(InternalError\)",
    503: r"HTTP 503 Service Unavailable \(SlowDown\)",
    "cut": "connection was cut",
    "stall": r"no answer within 0\.3 s",
    "stall in the body": r"no answer within 0\.3 s",
}


@pytest.mark.parametrize("bad_samples", ["fail", "replace"])
@pytest.mark.parametrize("fault", WORDS)
def test_an_outage_is_an_error_and_no_bad_sample(
    remote: Any, store: Any, backend: Any, fault: Any, bad_samples: Any
) -> None:
    _, url = remote
    options = store.options(timeout_s=0.3 if "stall" in str(fault) else 10.0, patience_s=0.5)
    with open_it(url, backend, store_options=options, bad_samples=bad_samples, cache_bytes=0) as loader:
        assert rows_of(loader, 1) == expected(4, set())[0]
        store.fault = lambda key, number: fault if key.endswith(".tar") else None
        rows: list[int] = []
        with pytest.raises(StoreError, match=rf"{url}/shards/shard-\d+\.tar \(bytes .* attempts? .*{WORDS[fault]}"):
            deliver(loader, rows)
        delivered = 4 + len(rows)
        assert loader.seen == delivered
        assert loader.replacements == []
        store.fault = lambda key, number: None
        assert rows_of(loader, 6) == expected(delivered + 24, set())[0][delivered:]  # it goes on where it stood


def test_attempts_are_counted_and_end_with_patience(remote: Any, store: Any) -> None:
    _, url = remote
    reader = SampleReader(open_remote_dataset(url, options=store.options(patience_s=0.0), cache_bytes=0))
    store.fault = lambda key, number: 500
    store.requests.clear()
    with pytest.raises(StoreError, match=r"shard-000001\.tar .* in 1 attempt and"):
        reader.read_one(3)
    reader.close()
    assert len(store.asked()) == 1
    reader = SampleReader(open_remote_dataset_again(url, store, patience_s=1.0))
    store.fault = lambda key, number: 500
    store.requests.clear()
    with pytest.raises(StoreError, match=r"attempts") as caught:
        reader.read_one(3)
    reader.close()
    assert f"in {len(store.asked())} attempts" in str(caught.value)


def open_remote_dataset_again(url: str, store: Any, **options: Any) -> Any:
    store.fault = lambda key, number: None
    return open_remote_dataset(url, options=store.options(**options), cache_bytes=0)


def test_a_loader_closes_while_the_store_is_silent(remote: Any, store: Any) -> None:
    _, url = remote
    before = set(threading.enumerate())
    options = store.options(timeout_s=1.0, patience_s=3600.0)
    with open_it(url, store_options=options, cache_bytes=0) as loader:
        loader._reader.submit(np.arange(12))
        store.fault = lambda key, number: "stall"
        loader._reader.submit(np.arange(12))
    # Not before this line would it wait for an hour; what runs in threads is over.
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("sample-reader")]


@pytest.mark.parametrize("answers_again", [True, False])
def test_neither_an_interruption_nor_closing_waits_for_a_silent_store(
    remote: Any, store: Any, backend: Any, answers_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: OneAhead[Any]) -> Any:
        raise KeyboardInterrupt

    _, url = remote
    before = set(threading.enumerate())
    options = store.options(timeout_s=0.3, patience_s=3600.0, read_ahead_bytes=0)
    with open_it(url, backend, store_options=options, cache_bytes=0) as loader:
        next(loader)
        store.fault = lambda key, number: "stall"
        while wait([loader._batches._next], timeout=1).done:
            next(loader)
        with monkeypatch.context() as patch:
            patch.setattr(OneAhead, "__next__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(loader)
        assert not loader._batches._next.done()
        if answers_again:
            store.fault = lambda key, number: None
            delivered = loader.seen
            assert rows_of(loader, 6) == expected(delivered + 24, set())[0][delivered:]  # it goes on where it stood
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith(("sample-reader", "loader"))]


def test_a_store_that_is_not_there_is_one_sentence(remote: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, url = remote
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(StoreError, match=rf"{url}/dataset.json .*the connection is refused") as caught:
            open_it(url, store_options=store.options(patience_s=0.3))
    assert str(caught.value).isprintable()


@pytest.mark.timeout(60)  # the options' patience is far longer
def test_an_endpoint_without_tls_that_is_not_allowed_is_said_at_once(
    remote: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = remote
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="AWS_ALLOW_HTTP=true"):
        open_it(url, store_options=store.options(patience_s=600.0))


def test_wrong_credentials_are_one_sentence(remote: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, url = remote
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with pytest.raises(StoreError, match=r"refuses the credentials \(HTTP 403 Forbidden \(AccessDenied\)\)") as caught:
        open_it(url)
    assert str(caught.value).isprintable()
    assert "secret" not in str(caught.value)
    assert len(store.asked()) == 1  # it is not tried again


def test_no_credentials_are_one_sentence(remote: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, url = remote
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"{store.endpoint}/metadata")  # which has none
    with pytest.raises(StoreError, match="no credentials were found; set AWS_ACCESS_KEY_ID") as caught:
        open_it(url)
    assert str(caught.value).isprintable()


def test_credentials_that_end_during_a_run_are_no_bad_samples(remote: Any, store: Any, backend: Any) -> None:
    _, url = remote
    with open_it(url, backend, bad_samples="replace", cache_bytes=0, store_options=store.options()) as loader:
        rows_of(loader, 1)
        store.fault = lambda key, number: 403
        with pytest.raises(StoreError, match="refuses the credentials"):
            deliver(loader, [])
        assert loader.replacements == []


def test_a_bucket_that_does_not_exist_is_one_sentence(store: Any) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/d/dataset\.json: the store has no such bucket"):
        open_it("s3://no-such-bucket/d")


def test_a_bucket_that_disappears_is_no_bad_sample(remote: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, url = remote
    with open_it(url, bad_samples="replace", cache_bytes=0, store_options=store.options()) as loader:
        rows_of(loader, 1)
        for file in made.path.rglob("*.*"):
            store.remove(f"sets/a/{file.relative_to(made.path)}")
        store.client.delete_bucket(Bucket=store.bucket)
        with pytest.raises(StoreError, match="no such bucket"):
            deliver(loader, [])
        assert loader.replacements == []


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.soak] * (seed > 1)) for seed in range(40)])
def test_nothing_is_lost_or_changed_by_a_store_and_a_cache_that_fail_at_random(
    remote: Any, store: Any, tmp_path: Path, seed: int
) -> None:
    made, url = remote
    backend: Any = ("dali", "torch")[seed % 2]
    with open_it(str(made.path), backend) as loader:
        batches = [next(loader) for _ in range(20)]
    faults = random.Random(seed)
    store.fault = lambda key, number: faults.choice([None] * 8 + [500, 503, "cut", "stall", "stall in the body"])
    over = threading.Event()

    def rot() -> None:
        chance = random.Random(seed + 1)
        while not over.wait(0.02):
            for path in tmp_path.glob("shards/*/*.tar"):
                with open(path, "r+b") as file:
                    file.seek(chance.randrange(1 + path.stat().st_size))
                    file.write(chance.choice([b"x", bytes(3000)]))
                    if chance.random() < 0.2:
                        file.truncate(chance.randrange(1 + path.stat().st_size))

    thread = threading.Thread(target=rot)
    thread.start()
    try:
        size = faults.choice([0, 20_000, 1 << 20])
        options: dict[str, Any] = {"cache": tmp_path, "cache_bytes": size, "bad_samples": "replace"}
        tuned = store.options(timeout_s=0.4, patience_s=60.0, join_bytes=faults.choice([1, 5000, 1 << 20]))
        with open_it(url, backend, store_options=tuned, **options) as loader:
            for batch in batches:
                found = next(loader)
                assert torch.equal(found.rows, batch.rows)
                assert torch.equal(found.images[0], batch.images[0])
            assert loader.replacements == []
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(60)  # far above patience and one attempt, far below a hang
def test_waiting_is_bounded(remote: Any, store: Any) -> None:
    _, url = remote
    options = store.options(timeout_s=0.5, patience_s=1.0)
    with open_it(url, store_options=options, cache_bytes=0) as loader:
        store.fault = lambda key, number: "stall"
        with pytest.raises(StoreError):
            deliver(loader, [])
