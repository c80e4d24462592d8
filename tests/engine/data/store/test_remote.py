"""A dataset in an object store is the dataset on disk: same batches, same state, whatever lies in the cache."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data import Balance, Blocks, CropView, open_loader
from engine.data.reading import SampleReader
from engine.data.remote import open_remote_dataset

VIEW = CropView(40, output="uint8")


def open_it(dataset: Any, backend: Any = "torch", **options: Any) -> Any:
    merged: dict[str, Any] = {"batch_size_per_rank": 5, "seed": 4, "threads": 2} | options
    return open_loader(dataset, views=[VIEW], backend=backend, device="cpu", **merged)


def take(loader: Any, count: int) -> list[Any]:
    return [next(loader) for _ in range(count)]


def assert_same(batches: list[Any], others: list[Any]) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.rows, other.rows)
        assert np.array_equal(batch.sample_ids, other.sample_ids)
        assert torch.equal(batch.images[0], other.images[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_bytes": 0}, {"cache_bytes": 30_000}, {"locality": Blocks(4, 2)}, {"where": "split = 'train'"}],
    ids=str,
)
def test_batches_are_those_of_the_local_dataset(remote: Any, store: Any, backend: Any, options: Any) -> None:
    made, url = remote
    local = {name: value for name, value in options.items() if name != "cache_bytes"}
    with open_it(made.path, backend, **local) as loader:
        batches = take(loader, 9)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = take(loader, 4)
    for connections, read_ahead_bytes in ((1, 0), (8, 1 << 20), (3, 20_000)):  # with an empty cache, then a used one
        tuned = store.options(connections=connections, read_ahead_bytes=read_ahead_bytes)
        with open_it(url, backend, store_options=tuned, **options) as loader:
            assert_same(take(loader, 9), batches)
            loader.load_state_dict(state)  # of the local one
            assert_same(take(loader, 4), rest)


def test_the_default_options_do(remote: Any, store: Any, backend: Any) -> None:
    made, url = remote
    with open_it(made.path, backend) as loader, open_it(url + "/", backend) as other:
        assert_same(take(loader, 4), take(other, 4))


def test_a_local_and_a_remote_dataset_are_loaded_as_one(remote: Any, store: Any, make_dataset: Any, paint: Any) -> None:
    made, url = remote
    second = make_dataset([paint(100 + row, 96) for row in range(7)])
    with open_it([made.path, second.path]) as loader, open_it([url, second.path]) as other:
        assert_same(take(loader, 6), take(other, 6))
    with pytest.raises(ValueError, match=f"{made.path} and {url} hold the same samples"):
        open_it([made.path, url])


def test_balance_reads_the_tables_from_the_store(remote: Any, store: Any) -> None:
    made, url = remote
    with open_it(made.path, balance=Balance("split")) as loader, open_it(url, balance=Balance("split")) as other:
        assert_same(take(loader, 4), take(other, 4))
    with pytest.raises(ValueError, match=f"{url} has no column 'splt'"):
        open_it(url, where="splt = 1")


def test_tables_are_copied_once_and_the_index_only_when_it_is_needed(remote: Any, store: Any) -> None:
    _, url = remote
    for _ in range(3):
        open_it(url).close()
    assert [key for key, _ in store.asked()] == ["sets/a/dataset.json"] + ["sets/a/rows.bin"] * 2 + [
        "sets/a/dataset.json"
    ] * 2
    store.requests.clear()
    for _ in range(2):
        open_it(url, where="split = 'train'").close()
    assert len(store.asked("index.parquet")) == len(store.asked("slides.parquet")) == 2  # its size, and itself


def test_processes_that_open_at_once_copy_once(remote: Any, store: Any) -> None:
    _, url = remote
    datasets: list[Any] = []
    threads = [threading.Thread(target=lambda: datasets.append(open_remote_dataset(url))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(datasets) == 6
    assert len(store.asked("rows.bin")) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes(len(data)), lambda data: b""])
def test_a_table_that_rots_in_the_cache_is_copied_anew(remote: Any, store: Any, damage: Any) -> None:
    made, url = remote
    for name in ("rows.bin", "index.parquet"):
        path = open_remote_dataset(url).file(name) if name != "rows.bin" else open_remote_dataset(url).path / name
        path.write_bytes(damage(path.read_bytes()))
    dataset = open_remote_dataset(url)
    assert dataset.rows.tobytes() == (made.path / "rows.bin").read_bytes()
    assert dataset.file("index.parquet").read_bytes() == (made.path / "index.parquet").read_bytes()
    assert len(store.asked("rows.bin")) == len(store.asked("index.parquet")) == 4


def test_another_list_of_slides_is_another_table(remote: Any, store: Any) -> None:
    # The digest does not cover slides.parquet.
    made, url = remote
    shutil.copytree(made.path, made.path.parent / "other")
    import polars as pl

    other = made.path.parent / "other"
    pl.read_parquet(other / "slides.parquet").with_columns(split=pl.lit("test")).write_parquet(other / "slides.parquet")
    from hashlib import sha256

    meta = json.loads((other / "dataset.json").read_text())
    meta["files"]["slides.parquet"] = sha256((other / "slides.parquet").read_bytes()).hexdigest()
    (other / "dataset.json").write_text(json.dumps(meta))
    other_url = store.put(other, "sets/b")
    for _ in range(2):
        with open_it(url, where="split = 'train'") as loader, open_it(other_url, where="split = 'test'") as second:
            assert len({int(row) for batch in take(loader, 6) for row in batch.rows}) == 6
            assert len({int(row) for batch in take(second, 6) for row in batch.rows}) == 12
    assert len(store.asked("slides.parquet")) == 4


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("s4://bucket/d", "unknown kind of store 's4'"),
        ("s3://user:word@bucket/d", "credentials by the environment"),
        ("https://host/d?sig=word", "credentials by the environment"),
        ("s3:///d", "cannot be opened"),
        ("s3://b/d", "nonsense"),
    ],
)
def test_a_url_that_is_none_is_refused_in_one_sentence(url: str, match: str, store: Any) -> None:
    options = store.options(config={"nonsense": "1"} if "nonsense" in match else {})
    with pytest.raises(ValueError, match=match) as caught:
        open_it(url, store_options=options)
    assert "word" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_options_need_no_environment(remote: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, url = remote
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    config = {"endpoint": store.endpoint, "allow_http": "true", "region": "us-east-1"}
    config |= {"access_key_id": "tester", "secret_access_key": "hidden", "user_agent": "us"}
    options = store.options(config=config)
    with open_it(made.path) as loader, open_it(url, store_options=options) as other:
        assert_same(take(loader, 4), take(other, 4))
    assert "hidden" not in repr(options)


def test_options_that_cannot_be_are_refused(store: Any) -> None:
    for wrong in ({"timeout_s": 0}, {"patience_s": -1}, {"connections": 0}, {"config": {"timeout": "3s"}}):
        with pytest.raises(ValueError, match=r"timeout_s|patience_s|connections"):
            store.options(**wrong)


def test_neighbours_are_read_by_one_request(remote: Any, store: Any) -> None:
    made, url = remote
    lengths = [len(payload) for payload in made.payloads]
    reach = sum(lengths[:2]) + 2 * 512 + (-lengths[0] % 512)  # of two neighbours, headers and padding included

    def requests(rows: list[int], **options: Any) -> int:
        store.requests.clear()
        reader = SampleReader(open_remote_dataset(url, options=store.options(**options), cache_bytes=0))
        samples = reader.collect(reader.submit(np.array(rows)))
        reader.close()
        assert [sample.jpeg.tobytes() for sample in samples] == [made.payloads[row] for row in rows]
        assert [sample.sample_id for sample in samples] == [int(made.keys[row], 16) for row in rows]
        return len(store.asked(".tar"))

    everything = [7, 2, 11, 0, 5, 9, 1, 3, 10, 4, 8, 6]
    assert requests(everything) == 4  # one for each shard
    assert requests(everything, join_bytes=1) == 12
    assert requests(everything, join_gap_bytes=511) == 4  # padding
    assert requests([0, 1], join_gap_bytes=0) == 1 + (lengths[0] % 512 > 0)
    assert requests([0, 2], join_gap_bytes=511) == 2
    assert requests([0, 2], join_gap_bytes=lengths[1] + 2 * 512 + 511) == 1
    assert requests([0, 1], join_bytes=reach) == 1
    assert requests([0, 1], join_bytes=reach - 1) == 2
    assert requests([4, 4, 4]) == 1


def test_what_is_read_ahead_is_joined_over_batches(remote: Any, store: Any) -> None:
    _, url = remote
    for read_ahead_bytes, most in ((0, 99), (1 << 20, 8)):
        store.requests.clear()
        options = store.options(read_ahead_bytes=read_ahead_bytes)
        with open_it(url, batch_size_per_rank=1, store_options=options, cache_bytes=0) as loader:
            assert loader._batches_at_once == (32 if read_ahead_bytes else 1)
            take(loader, 24)
        requests = len(store.asked(".tar"))
        # Alone each sample is a request; 64 that are read ahead together hold every sample of the four shards.
        assert requests <= most
        assert read_ahead_bytes or requests >= 24


def test_what_is_read_ahead_is_bounded_in_bytes(remote: Any, store: Any) -> None:
    made, url = remote
    batch_bytes = 4 * sum(map(len, made.payloads)) / 12
    for batches, expected in ((0.1, 1), (2, 1), (9, 4), (64, 32), (1000, 32)):
        options = store.options(read_ahead_bytes=int(batches * batch_bytes) + 1)
        reader = SampleReader(open_remote_dataset(url, options=options))
        assert reader.batches_at_once(4) == expected
        reader.close()


def test_regions_come_from_the_store_a_request_for_what_lies_together(store: Any, backend: Any) -> None:
    golden = Path(__file__).parents[3] / "golden" / "dataset-v2"
    url = store.put(golden, "golden")
    view = CropView(64, output="uint8", region="padded")
    options: dict[str, Any] = {"batch_size_per_rank": 4, "views": [view], "backend": backend, "device": "cpu"}
    with open_loader(golden, **options) as loader, open_loader(url, cache_bytes=0, **options) as other:
        batches, others = take(loader, 1), take(other, 1)
        assert_same(batches, others)
        assert torch.equal(batches[0].present, others[0].present)
        assert batches[0].rows.max() == 10  # 11 patches in two shards
    assert len(store.asked(".tar")) == 4  # two for each round of batches that was read ahead


def test_a_plain_web_server_is_a_store_too(remote: Any, s3_server: Any, store: Any) -> None:
    made, url = remote
    web = url.replace("s3://", f"http://{s3_server[0]}:{s3_server[1]}/")
    with open_it(made.path) as loader, open_it(web) as other:
        assert_same(take(loader, 4), take(other, 4))
    assert store.asked() == []


def test_golden_datasets_of_both_versions_are_read(store: Any) -> None:
    for version in (1, 2):
        golden = Path(__file__).parents[3] / "golden" / f"dataset-v{version}"
        url = store.put(golden, f"golden-{version}")
        with open_it(golden) as loader, open_it(url) as other:
            assert_same(take(loader, 4), take(other, 4))
