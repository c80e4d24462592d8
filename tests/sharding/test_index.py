"""The merged index: Parquet for people, rows.bin for training ranks; and opening a dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sharding import index
from sharding.index import (
    FORMAT_VERSION,
    INDEX_SCHEMA,
    ROW_DTYPE,
    DatasetDamagedError,
    open_dataset,
    read_meta,
    write_index,
)


def test_a_row_is_twenty_packed_little_endian_bytes() -> None:
    assert ROW_DTYPE.itemsize == 20
    row = np.array([(1, 2, 3, 4)], ROW_DTYPE)
    assert row.tobytes() == bytes([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])


def test_rows_and_parquet_agree_and_are_ordered_by_shard_and_offset(finished: Path) -> None:
    table = pq.read_table(finished / "index.parquet")
    rows = np.fromfile(finished / "rows.bin", ROW_DTYPE)
    assert table.schema.equals(INDEX_SCHEMA)
    names = [shard["name"] for shard in read_meta(finished)["shards"]]
    assert names == sorted(names)
    assert len(names) > 3
    assert [names[number] for number in rows["shard"]] == table["shard"].to_pylist()
    for column in ("offset", "length", "crc32"):
        assert np.array_equal(rows[column], table[column].to_numpy())
    places = list(zip(rows["shard"].tolist(), rows["offset"].tolist(), strict=True))
    assert places == sorted(set(places))
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows


def test_the_index_is_the_shards_tables_one_after_another(finished: Path) -> None:
    start = 0
    table = pq.read_table(finished / "index.parquet")
    for shard in read_meta(finished)["shards"]:
        own = pq.read_table(finished / "shards" / f"{shard['name']}.parquet")
        assert table.slice(start, own.num_rows).equals(own)
        assert own.num_rows == shard["samples"]
        start += own.num_rows
    assert start == table.num_rows


def test_rows_find_the_payloads(finished: Path) -> None:
    dataset = open_dataset(finished)
    table = pq.read_table(finished / "index.parquet")
    assert dataset.num_rows == table.num_rows == dataset.meta["counts"]["patches"]
    for row, key in zip(dataset.rows, table["key"].to_pylist(), strict=True):
        with open(dataset.shard_paths[row["shard"]], "rb") as file:
            file.seek(int(row["offset"]) - 512)
            block = file.read(512 + int(row["length"]))
        assert block.startswith(f"{key}.jpg\0".encode())
        assert block[512:514] == b"\xff\xd8"
        assert block[-2:] == b"\xff\xd9"


def test_merging_again_gives_the_same_bytes(dataset: Path) -> None:
    before = {name: (dataset / name).read_bytes() for name in ("index.parquet", "rows.bin")}
    names = [shard["name"] for shard in read_meta(dataset)["shards"]]
    assert write_index(dataset, names) == read_meta(dataset)["counts"]["patches"]
    assert {name: (dataset / name).read_bytes() for name in before} == before


def test_a_merge_that_fails_leaves_what_was_there(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in dataset.iterdir() if p.is_file()}
    packed = index.packed_rows

    def fail(table: Any, number: int) -> Any:
        if number == 2:
            raise OSError(28, "No space left on device")
        return packed(table, number)

    monkeypatch.setattr(index, "packed_rows", fail)
    with pytest.raises(OSError, match="No space"):
        write_index(dataset, [shard["name"] for shard in read_meta(dataset)["shards"]])
    assert {p.name: p.read_bytes() for p in dataset.iterdir() if p.is_file()} == before


def test_an_empty_dataset_opens(tmp_path: Path, make_dataset: Callable[..., Any], slides: Any) -> None:
    make_dataset(tmp_path / "empty", {"a": slides["plain"]}, mpp=0.01)
    opened = open_dataset(tmp_path / "empty")
    assert opened.num_rows == 0
    assert opened.shard_paths == []


def put(dataset: Path, text: str) -> None:
    (dataset / "dataset.json").write_text(text)


def change(dataset: Path, **content: Any) -> None:
    """Change dataset.json and leave its digest as it is."""
    put(dataset, json.dumps({**json.loads((dataset / "dataset.json").read_text()), **content}))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda d: (d / "dataset.json").unlink(), ValueError, "holds no dataset.json"),
        (lambda d: put(d, json.dumps({"format_version": FORMAT_VERSION + 1})), ValueError, "update the engine"),
        (lambda d: put(d, ""), DatasetDamagedError, "is damaged"),
        (lambda d: put(d, '{"format_version": 1, '), DatasetDamagedError, "is damaged"),
        (lambda d: put(d, "[]"), DatasetDamagedError, "does not agree with its own digest"),
        (lambda d: put(d, "{}"), DatasetDamagedError, "does not agree with its own digest"),
        (lambda d: put(d, json.dumps({"format_version": 1})), DatasetDamagedError, "its own digest"),
        (lambda d: change(d, counts={"patches": 0}), DatasetDamagedError, "its own digest"),
        (lambda d: change(d, shards=[]), DatasetDamagedError, "its own digest"),
        (lambda d: (d / "rows.bin").unlink(), DatasetDamagedError, "rows.bin"),
        (lambda d: (d / "rows.bin").write_bytes(b"x" * 19), DatasetDamagedError, "rows.bin has 19 bytes"),
    ],
)
def test_what_is_no_whole_dataset_is_refused_in_one_sentence(
    damage: Callable[[Path], Any], kind: type[Exception], message: str, dataset: Path
) -> None:
    damage(dataset)
    with pytest.raises(kind, match=message) as caught:
        open_dataset(dataset)
    assert str(dataset) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        open_dataset(tmp_path / "absent")
