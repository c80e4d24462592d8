"""What is written into a store is what is read from it, rounded to its dtype, and nothing else gets in."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stores import (
    StoreDamagedError,
    begin_store,
    finish_store,
    finished_slides,
    open_store,
    verify_store,
    write_slide,
)
from engine.stores import merging as merging_module
from engine.stores import zarr_store as module
from engine.stores.checks import RESERVED_NAMES
from engine.stores.layout import folder_name, slide_id_of
from engine.stores.zarr_store import SlideEmbeddings

IDS = [
    "plain",
    "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF",
    "a/b\\c d",
    ".hidden",
    "..",
    "Präparat",
    "x" * 300,
    "X" * 300,
    "a~b",
]


def test_what_was_written_is_read(tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]) -> None:
    slides = {name: make_slide(count, seed=count) for name, count in (("b", 5), ("a", 1), ("empty", 0))}
    begin_store(tmp_path / "store", identity)
    for name, slide in slides.items():
        write_slide(tmp_path / "store", name, *slide)
    meta = finish_store(tmp_path / "store", failures=[{"slide_id": "c", "reason": "no spacing"}])
    store = open_store(tmp_path / "store")
    assert list(store) == ["a", "b", "empty"]
    assert len(store) == 3
    assert store.meta == identity
    assert store.digest == meta["digest"]
    assert meta["counts"] == {"slides": 3, "rows": 6, "failures": 1}
    assert store.failures == [{"slide_id": "c", "reason": "no spacing"}]
    for name, (arrays, rows, attributes) in slides.items():
        slide = store[name]
        assert len(slide) == rows.num_rows
        assert set(slide.names) == set(arrays)
        assert slide.attributes == attributes
        assert slide.embedding.dtype == slide.local.dtype == np.float16
        assert slide.xy0.dtype == np.int32
        assert slide.present.dtype == bool
        for key, values in arrays.items():
            assert slide.shape(key) == values.shape
            expected = values.astype(np.float16) if values.dtype == np.float32 else values
            np.testing.assert_array_equal(slide.array(key), expected)
        assert slide.rows.drop("slide_id").equals(pl.DataFrame(pl.from_arrow(rows)))
        assert slide.rows["slide_id"].to_list() == [name] * rows.num_rows
    assert store.rows.equals(pl.concat([store[name].rows for name in store]))


def test_some_rows_of_an_array_are_read_alone(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 100)  # inner chunks of eight rows
    given = make_slide(50)
    begin_store(tmp_path, identity)
    write_slide(tmp_path, "one", *given)
    finish_store(tmp_path)
    slide = open_store(tmp_path)["one"]
    np.testing.assert_array_equal(slide.embedding, given[0]["embedding"].astype(np.float16))
    np.testing.assert_array_equal(slide.array("embedding", slice(11, 30)), slide.embedding[11:30])


def test_any_reader_of_zarr_can_read_it(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    path = make_store(tmp_path / "store", ["a/b"])
    group = zarr.open_group(path, mode="r")
    assert group.attrs["identity"] == open_store(path).meta
    array = group["slides/a%2Fb/embedding"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(np.asarray(array[:]), open_store(path)["a/b"].embedding)
    # One object holds all of an array.
    assert sorted(file.name for file in (path / "slides/a%2Fb/embedding").iterdir()) == ["c.0.0", "zarr.json"]


def test_zeros_are_stored_too(tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]) -> None:
    """zarr leaves out chunks of zeros by default; then a lost object could not be told from zeros."""
    arrays, rows, attributes = make_slide(3)
    begin_store(tmp_path, identity)
    write_slide(tmp_path, "one", {**arrays, "embedding": np.zeros((3, 6), np.float32)}, rows, attributes)
    assert (tmp_path / "slides/one/embedding/c.0.0").stat().st_size > 0


@pytest.mark.parametrize("slide_id", IDS)
def test_a_slides_name_is_safe_and_reversible(slide_id: str, tmp_path: Path, make_store: Callable[..., Path]) -> None:
    name = folder_name(slide_id)
    assert name.isascii()
    assert "/" not in name
    assert not name.startswith(".")
    assert 1 <= len(name) <= 200
    path = make_store(tmp_path / "store", [slide_id])
    assert finished_slides(path) == {slide_id}
    assert list(open_store(path)) == [slide_id]
    assert len(open_store(path)[slide_id].embedding) == 5
    assert verify_store(path)["ok"]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_from_its_name(slide_id: str) -> None:
    name = folder_name(slide_id)
    assert not set(name) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.%~")
    if "~" not in name:
        assert slide_id_of(Path(name)) == slide_id
    else:
        assert len(name) == 200


@pytest.mark.parametrize(("slide_id", "reason"), [("", "empty id"), ("\ud800", "no valid Unicode")])
def test_an_impossible_id_is_refused(slide_id: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        folder_name(slide_id)


def test_ids_that_a_file_system_takes_for_one_are_refused(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    begin_store(tmp_path, identity)
    write_slide(tmp_path, "slide", *make_slide())
    (tmp_path / "slides" / "SLIDE").symlink_to("slide")  # what a file system that ignores case would find
    with pytest.raises(ValueError, match=r"'slide', not of 'SLIDE'.*ignores case"):
        write_slide(tmp_path, "SLIDE", *make_slide())


@given(st.lists(st.floats(-65000, 65000, width=32), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_floats_are_rounded_to_the_nearest(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("rounding")
    given = np.array(values, np.float32)[:, None]
    xy0 = np.zeros((len(values), 2), np.int32)
    begin_store(path, {})
    write_slide(path, "one", {"embedding": given, "xy0": xy0}, pa.table({"row": range(len(values))}), {})
    finish_store(path)
    stored = open_store(path)["one"].embedding.astype(np.float64)
    for other in (np.nextafter(stored.astype(np.float16), np.float16(side)) for side in (-np.inf, np.inf)):
        assert (abs(stored - given) <= abs(other.astype(np.float64) - given)).all()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (65520.0, "overflows float16"),
        (-1e30, "overflows float16"),
        (np.nan, "is not finite"),
        (np.inf, "is not finite"),
    ],
)
def test_a_value_that_float16_does_not_hold_names_slide_and_place(
    value: float, reason: str, tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    arrays, rows, attributes = make_slide()
    arrays["local"][3, 1, 2] = value
    begin_store(tmp_path, identity)
    with pytest.raises(ValueError, match=rf"slide bad: local\[3, 1, 2\] = .* {reason}"):
        write_slide(tmp_path, "bad", arrays, rows, attributes)
    assert [path.name for path in (tmp_path / "slides").iterdir()] == ["zarr.json"]


def test_float32_is_stored_where_the_identity_says_so(
    tmp_path: Path, make_slide: Callable[..., Any], make_store: Callable[..., Path]
) -> None:
    given = make_slide()
    given[0]["embedding"][0, 0] = 1e30
    path = make_store(tmp_path / "store", {"one": given}, dtype="float32")
    np.testing.assert_array_equal(open_store(path)["one"].embedding, given[0]["embedding"])
    with pytest.raises(ValueError, match="dtype bfloat16"):
        begin_store(tmp_path / "other", {"dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"xy0": None}, "there is no array xy0"),
        ({"embedding": None}, "there is no array embedding"),
        ({"embedding": np.zeros((4, 6))}, r"embedding has shape \[4, 6\], expected 5 rows"),
        ({"xy0": np.zeros((5, 2))}, r"xy0 is float16 \[5, 2\], expected int32"),
        ({"xy0": np.zeros((5, 3), np.int32)}, r"xy0 is int32 \[5, 3\], expected int32 \[5, 2\]"),
        ({"rows": np.zeros(5)}, "cannot be called 'rows'"),
        ({"a/b": np.zeros(5)}, "cannot be called 'a/b'"),
        ({"label": np.array(["x"] * 5)}, "label is <U1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    change: dict[str, Any], reason: str, tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    arrays, rows, attributes = make_slide()
    given = {key: value for key, value in {**arrays, **change}.items() if value is not None}
    begin_store(tmp_path, identity)
    with pytest.raises(ValueError, match=f"slide s: .*{reason}"):
        write_slide(tmp_path, "s", given, rows, attributes)
    assert finished_slides(tmp_path) == set()


def test_no_array_hides_an_attribute() -> None:
    attributes = set(dir(SlideEmbeddings(Path(), "", "")))
    assert {name for name in attributes if not name.startswith("_")} == RESERVED_NAMES


def test_rows_of_another_slide_are_refused(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    arrays, rows, attributes = make_slide()
    begin_store(tmp_path, identity)
    with pytest.raises(ValueError, match="its rows name another slide"):
        write_slide(tmp_path, "a", arrays, rows.append_column("slide_id", pa.array(["b"] * 5)), attributes)
    write_slide(tmp_path, "a", arrays, rows.append_column("slide_id", pa.array(["a"] * 5)), attributes)
    finish_store(tmp_path)
    assert open_store(tmp_path)["a"].rows.columns[0] == "slide_id"


def test_a_wrong_name_says_what_there_is(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    store = open_store(make_store(tmp_path / "store", ["one"]))
    with pytest.raises(KeyError, match="two: no such slide"):
        store["two"]
    with pytest.raises(KeyError, match="globals: slide one has embedding, local, present, xy0"):
        store["one"].array("globals")
    with pytest.raises(AttributeError, match="no attribute or array 'embeddings'"):
        _ = store["one"].embeddings
    assert not hasattr(store["one"], "_repr_html_")


def test_the_reason_of_a_failed_slide_is_told(tmp_path: Path, identity: dict[str, Any]) -> None:
    begin_store(tmp_path, identity)
    finish_store(tmp_path, failures=[{"slide_id": "bad", "reason": "it states no spacing"}])
    with pytest.raises(KeyError, match="bad: it states no spacing"):
        open_store(tmp_path)["bad"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "vittm"}, 'encoder = "hipt_patch", now it is "vittm"'),
        ({"normalisation": {"mean": [0.4], "std": [0.5]}}, r"normalisation\.mean = \[0\.5\], now it is \[0\.4\]"),
        ({"dtype": "float32"}, 'dtype = null, now it is "float32"'),
    ],
)
def test_another_identity_is_refused_by_its_key(
    change: dict[str, Any], message: str, tmp_path: Path, identity: dict[str, Any], make_slide: Callable[..., Any]
) -> None:
    begin_store(tmp_path, identity)
    write_slide(tmp_path, "kept", *make_slide())
    with pytest.raises(ValueError, match=message):
        begin_store(tmp_path, identity | change)
    begin_store(tmp_path, dict(reversed(identity.items())))
    assert finished_slides(tmp_path) == {"kept"}


@pytest.mark.parametrize("name", ["dataset.json", "rows.parquet", "slides"])
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path, identity: dict[str, Any]) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name}"):
        begin_store(tmp_path, identity)


def test_a_slide_without_a_store_is_refused(tmp_path: Path, make_slide: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="call begin_store first"):
        write_slide(tmp_path, "one", *make_slide())


def test_an_unfinished_store_cannot_be_opened(
    tmp_path: Path, identity: dict[str, Any], make_slide: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        open_store(tmp_path / "none")
    begin_store(tmp_path, identity)
    write_slide(tmp_path, "one", *make_slide())
    with pytest.raises(ValueError, match=r"holds no store\.json.*engine extract.*finish"):
        open_store(tmp_path)


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    path = make_store(tmp_path / "store", ["one"]) / "store.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format version 2, this program reads up to 1"):
        open_store(tmp_path / "store")


def test_the_same_slides_make_the_same_bytes(
    tmp_path: Path, make_store: Callable[..., Path], make_slide: Callable[..., Any], tree: Callable[..., Any]
) -> None:
    slides = {name: make_slide(30, seed=number) for number, name in enumerate("abc")}
    one = make_store(tmp_path / "one", slides)
    two = make_store(tmp_path / "two", dict(reversed(slides.items())))
    assert tree(one) == tree(two)


def test_a_finished_store_is_left_alone(
    tmp_path: Path, make_store: Callable[..., Path], make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    path = make_store(tmp_path / "store", ["one"])
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    begin_store(path, identity)
    write_slide(path, "one", *make_slide(seed=77))
    assert finish_store(path)["digest"] == open_store(path).digest
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file != path / "slides"} == {
        file: when for file, when in before.items() if file != path / "slides"
    }


def test_readers_see_a_whole_store_while_slides_are_added(
    tmp_path: Path, make_store: Callable[..., Path], make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    path = make_store(tmp_path / "store", ["b"])
    before = open_store(path)
    begin_store(path, identity)
    write_slide(path, "a", *make_slide(3, seed=9))
    for store in (before, open_store(path)):
        assert list(store) == ["b"]
        assert set(store.rows["slide_id"]) == {"b"}
    assert finished_slides(path) == {"a", "b"}
    finish_store(path)
    # Who opened it before still sees what was there then.
    assert set(before.rows["slide_id"]) == {"b"}
    assert before["b"].embedding.shape == (5, 6)
    after = open_store(path)
    assert list(after) == ["a", "b"]
    assert after.rows["slide_id"].to_list() == ["a"] * 3 + ["b"] * 5
    assert after.digest != before.digest
    assert verify_store(path)["ok"]


def test_columns_of_unlike_slides_are_brought_together(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any]
) -> None:
    arrays, _, _ = make_slide(2)
    begin_store(tmp_path, identity)
    write_slide(tmp_path, "a", arrays, pa.table({"mpp": pa.nulls(2), "row": pa.array([1, 2], pa.int32())}), {})
    write_slide(tmp_path, "b", arrays, pa.table({"row": pa.array([3, 4], pa.int64()), "mpp": [0.5, 0.5]}), {})
    write_slide(tmp_path, "c", arrays, pa.table({"row": [5, 6], "more": ["x", "y"]}), {})
    finish_store(tmp_path)
    rows = open_store(tmp_path).rows
    assert rows["mpp"].to_list() == [None, None, 0.5, 0.5, None, None]
    assert rows["row"].to_list() == [1, 2, 3, 4, 5, 6]
    assert rows["more"].to_list() == [None] * 4 + ["x", "y"]
    write_slide(tmp_path, "d", arrays, pa.table({"row": ["one", "two"]}), {})
    with pytest.raises(ValueError, match="the rows of slide d do not fit"):
        finish_store(tmp_path)


def test_rows_are_merged_piece_by_piece(
    tmp_path: Path, make_slide: Callable[..., Any], make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_module, "_ROW_GROUP", 10)
    path = make_store(tmp_path / "store", [f"s{number}" for number in range(7)])
    assert pq.ParquetFile(path / "rows.parquet").metadata.num_row_groups == 4
    store = open_store(path)
    assert store.rows.equals(pl.concat([slide.rows for slide in store.values()]))


def _write_many(path: Path, start: Any, make: Callable[..., Any], names: list[str]) -> None:
    start.wait()
    for name in names:
        write_slide(path, name, *make(200))


def test_writers_of_the_same_slides_at_once_leave_each_slide_whole(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any], make_store: Callable[..., Path], tree: Any
) -> None:
    names = [f"s{number}" for number in range(8)]
    begin_store(tmp_path / "store", identity)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    writers = [
        context.Process(target=_write_many, args=(tmp_path / "store", start, make_slide, names)) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    finish_store(tmp_path / "store")
    assert tree(tmp_path / "store") == tree(make_store(tmp_path / "other", {name: make_slide(200) for name in names}))


def test_the_first_of_two_writers_wins(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other comes to its rename when the slide is there already."""
    begin_store(tmp_path, identity)
    first, second = make_slide(seed=1), make_slide(seed=2)
    commit = module.commit_slide

    def overtaken(temporary: Path, folder: Path) -> bool:
        monkeypatch.setattr(module, "commit_slide", commit)
        write_slide(tmp_path, "one", *first)
        return commit(temporary, folder)

    monkeypatch.setattr(module, "commit_slide", overtaken)
    write_slide(tmp_path, "one", *second)
    finish_store(tmp_path)
    np.testing.assert_array_equal(open_store(tmp_path)["one"].xy0, first[0]["xy0"])
    assert sorted(path.name for path in (tmp_path / "slides").iterdir()) == ["one", "zarr.json"]


def test_a_writer_whose_folder_is_swept_away_fails_and_leaves_nothing(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_store(tmp_path, identity)
    commit = module.commit_slide

    def swept(temporary: Path, folder: Path) -> bool:
        begin_store(tmp_path, identity)
        return commit(temporary, folder)

    monkeypatch.setattr(module, "commit_slide", swept)
    with pytest.raises(FileNotFoundError):
        write_slide(tmp_path, "one", *make_slide())
    assert finished_slides(tmp_path) == set()


def test_a_thousand_tiny_slides(
    tmp_path: Path, make_slide: Callable[..., Any], identity: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finishing reads each slide's record and rows a fixed number of times, and opening reads none."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    begin_store(tmp_path, identity)
    arrays, rows, attributes = make_slide(2)
    given = {"embedding": arrays["embedding"], "xy0": arrays["xy0"]}
    for number in range(1000):
        write_slide(tmp_path, f"s{number:04d}", given, rows, attributes)
    opened: list[Path] = []
    read_bytes = Path.read_bytes

    def counted(self: Path) -> bytes:
        opened.append(self)
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", counted)
    finish_store(tmp_path)
    assert len(opened) <= 4 * 1000 + 10
    opened.clear()
    store = open_store(tmp_path)
    assert len(store) == 1000
    assert len(store.rows) == 2000
    assert len(opened) == 1
    assert len(store["s0999"].embedding) == 2


def test_damage_is_an_error_at_reading(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    path = make_store(tmp_path / "store", ["one"])
    folder = path / "slides" / "one"
    for name in ("embedding/c.0.0", "embedding/zarr.json", "rows.parquet", "zarr.json", "slide.json"):
        file = folder / name
        data = file.read_bytes()
        for changed in (
            None,
            data[:-1],
            data + b"\0",
            bytes([data[0] ^ 1]) + data[1:],
            data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
        ):
            if changed is None:
                file.unlink()
            else:
                file.write_bytes(changed)
            slide = open_store(path)["one"]
            with pytest.raises(StoreDamagedError, match=r"slides/one.*engine verify"):
                _ = slide.embedding, slide.rows, slide.attributes
            file.write_bytes(data)
    assert open_store(path)["one"].embedding.shape == (5, 6)
    (path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreDamagedError, match="cannot be read"):
        _ = open_store(path).rows
    pq.write_table(pa.table({"slide_id": ["one"]}), path / "rows.parquet")
    with pytest.raises(StoreDamagedError, match=r"has 1 rows, store\.json says 5"):
        _ = open_store(path).rows
