from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from engine.data import BadSampleError, Balance, Blocks, CropView, SampleStream, open_loader
from engine.data.locality import BlockStream
from engine.data.selection import Selection, identity, select
from engine.data.weighted import WeightedStream
from sharding.index import ROW_DTYPE, Dataset, DatasetDamagedError, open_dataset

GOLDEN = Path(__file__).parents[2] / "golden" / "dataset-v1"
SLIDES = [("s0", "train", "p0", "tumour", 0.25), ("s1", "val", "p0", None, 0.5), ("s2", "train", "p1", "stroma", 0.5)]


def describe(path: Path, num_rows: int, *, prefix: str = "") -> None:
    """Write index.parquet and slides.parquet: slides s0, s1, s2 in turn, tissue rising with the row."""
    names = ["slide_id", "split", "patient", "class", "mpp"]
    slides = pl.DataFrame(SLIDES, names, orient="row").with_columns(pl.col("slide_id").str.replace("^", prefix))
    slides.write_parquet(path / "slides.parquet")
    pl.DataFrame(
        {
            "slide_id": [f"{prefix}s{row % 3}" for row in range(num_rows)],
            "tissue_fraction": [row / num_rows for row in range(num_rows)],
            "flags": pl.Series([row % 4 for row in range(num_rows)], dtype=pl.UInt32),
            "mpp": [0.5] * num_rows,
        }
    ).write_parquet(path / "index.parquet")


def described(path: Path, num_rows: int, *, digest: str = "d") -> Dataset:
    path.mkdir()
    describe(path, num_rows)
    return Dataset(path, {"digest": digest}, np.empty(num_rows, ROW_DTYPE), [])


@pytest.mark.parametrize(
    ("where", "keeps"),
    [
        ("split = 'train'", lambda row: row % 3 != 1),
        ("tissue_fraction > 0.5 AND slide_id IN ('s0', 's1')", lambda row: row > 15 and row % 3 < 2),
        ("flags & 2 = 0", lambda row: row % 4 < 2),
        ("mpp = 0.5 AND slide_mpp < 0.5", lambda row: row % 3 == 0),  # the patch's and the slide's
        ("class = 'tumour' OR class IS NULL", lambda row: row % 3 < 2),
        ("class <> 'tumour'", lambda row: row % 3 == 2),  # unknown is not true, as in SQL
        ("tissue_fraction >= AVG(tissue_fraction)", lambda row: row >= 15),
        ("TRUE", lambda row: True),
    ],
)
def test_a_filter_selects_the_rows_for_which_it_is_true(tmp_path: Path, where: str, keeps: Any) -> None:
    rows = select([described(tmp_path / "d", 30)], where=where).rows
    assert rows is not None
    assert rows.dtype == np.int32
    assert rows.tolist() == [row for row in range(30) if keeps(row)]


@pytest.mark.parametrize(
    ("by", "where", "expected"),
    [
        ("class", "class IS NOT NULL", lambda row: ["tumour", None, "stroma"][row % 3]),
        ("slide_id", "slide_id <> 's1'", lambda row: f"s{row % 3}"),
        ("patient", None, lambda row: ["p0", "p0", "p1"][row % 3]),
        ("split", "class = 'tumour'", lambda row: "train"),  # the other label does not occur
        ("slide_mpp", None, lambda row: ["0.25", "0.5", "0.5"][row % 3]),
        ("flags", "flags > 0", lambda row: str(row % 4)),
    ],
)
def test_classes_are_the_values_of_a_column_of_either_table(
    tmp_path: Path, by: str, where: str | None, expected: Any
) -> None:
    selection = select([described(tmp_path / "d", 30)], where=where, by=by)
    rows = range(30) if selection.rows is None else selection.rows.tolist()
    assert selection.classes is not None
    assert selection.classes.dtype == np.uint32
    assert [selection.labels[number] for number in selection.classes] == [expected(row) for row in rows]
    assert selection.labels == tuple(sorted({expected(row) for row in rows}))


def test_rows_of_several_datasets_are_numbered_through(tmp_path: Path) -> None:
    datasets = [described(tmp_path / "a", 10), described(tmp_path / "b", 5)]
    selection = select(datasets, where="patient = 'p1'", by="class")
    assert selection.rows is not None
    assert selection.rows.tolist() == [2, 5, 8, 12]
    everything = select(datasets, by="split")
    assert everything.rows is None
    assert everything.classes is not None
    assert everything.labels == ("train", "val")
    assert everything.classes.tolist() == [0, 1, 0] * 3 + [0] + [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"where": "splt = 'train'"}, "no column 'splt'; did you mean 'split'"),
        ({"where": "SPLIT = 'train'"}, "no column 'SPLIT'"),
        ({"by": "patent"}, "no column 'patent'; did you mean 'patient'"),
        ({"by": "class"}, "10 of 30 rows have no 'class'"),
        ({"where": "split = 'test'"}, "split = 'test'.* selects none of 30 rows"),
        ({"where": "tissue_fraction"}, "no condition"),
        ({"where": "slide_id = 3"}, "cannot compare"),
        ({"where": "split ="}, "cannot be applied"),
        ({"where": ""}, "cannot be applied"),
        ({"where": "flags = 0; flags = 1"}, "cannot be applied"),
        ({"where": "SELECT 1"}, "cannot be applied"),
        ({"where": "slide_id IN (SELECT slide_id FROM elsewhere)"}, "cannot be applied"),
    ],
)
def test_what_selects_nothing_sensible_is_refused(tmp_path: Path, options: Any, match: str) -> None:
    dataset = described(tmp_path / "d", 30)
    with pytest.raises(ValueError, match=match):
        select([dataset], **options)


def test_tables_that_are_not_the_datasets_are_refused(tmp_path: Path) -> None:
    dataset = described(tmp_path / "d", 30)
    describe(dataset.path, 29)
    with pytest.raises(DatasetDamagedError, match="29 rows, not 30"):
        select([dataset], where="TRUE")
    describe(dataset.path, 30)
    slides = pl.read_parquet(dataset.path / "slides.parquet")
    pl.concat([slides, slides[:1]]).write_parquet(dataset.path / "slides.parquet")
    with pytest.raises(DatasetDamagedError, match="lists a slide twice"):
        select([dataset], where="split = 'train'")
    (dataset.path / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetDamagedError, match=r"index\.parquet cannot be read"):
        select([dataset], where="TRUE")
    (dataset.path / "index.parquet").unlink()
    with pytest.raises(DatasetDamagedError, match=r"index\.parquet cannot be read"):
        select([dataset], where="TRUE")


def test_a_dataset_that_was_sharded_is_filtered_by_the_slide_lists_columns() -> None:
    dataset = open_dataset(GOLDEN)
    tissue = pl.read_parquet(GOLDEN / "index.parquet")["tissue_fraction"].to_numpy()
    some = float(np.median(tissue))
    selection = select([dataset], where=f"label IS NOT NULL AND tissue_fraction > {some}", by="patient_id")
    assert selection.rows is not None
    assert selection.rows.tolist() == np.flatnonzero(tissue > some).tolist()
    assert 0 < len(selection.rows) < 16
    assert len(selection.labels) == 1


def test_the_identity_of_rows_changes_with_all_that_decides_them(tmp_path: Path) -> None:
    one, other = described(tmp_path / "a", 10), described(tmp_path / "b", 10, digest="e")
    where = "split = 'train'"

    def found(datasets: list[Dataset], where: str | None) -> Any:
        return identity(datasets, where, select(datasets, where=where))

    assert identity([one], None, Selection()) == "d"  # as checkpoints of the first version have it
    identities = [found([one], where), found([other], where), found([one, other], None), found([other, one], None)]
    identities += [found([one], "split = 'val'"), found([one, other], where)]
    slides = pl.read_parquet(one.path / "slides.parquet")
    slides.with_columns(split=pl.lit("train")).write_parquet(one.path / "slides.parquet")  # no digest covers it
    identities.append(found([one], where))
    assert len({str(each) for each in identities}) == len(identities)


def open_cpu(dataset: Any, **options: Any) -> Any:
    merged: dict[str, Any] = {"batch_size_per_rank": 6, "views": [CropView(32, output="uint8")], "seed": 9} | options
    return open_loader(dataset, backend="torch", device="cpu", threads=1, **merged)


def rows_of(loader: Any, batches: int) -> list[int]:
    return [int(row) for _ in range(batches) for row in next(loader).rows]


@pytest.fixture
def two(make_dataset: Any, paint: Any) -> Any:
    """Two datasets of 12 and 9 patches in 3 shards each, with tables."""
    made = [make_dataset(rows_per_shard=5), make_dataset([paint(100 + row, 96) for row in range(9)], rows_per_shard=3)]
    for each in made:
        describe(each.path, len(each.keys))
    return made


def test_a_loader_runs_over_the_selected_rows(two: Any) -> None:
    with open_cpu(two[0].path, where="split = 'train'") as loader:
        selected = np.array([row for row in range(12) if row % 3 != 1])
        assert rows_of(loader, 4) == selected[SampleStream(8, 9).rows(0, 24)].tolist()


def test_several_datasets_are_loaded_as_one(two: Any) -> None:
    keys, payloads = two[0].keys + two[1].keys, two[0].payloads + two[1].payloads
    with open_cpu([each.path for each in two]) as loader:
        batches = [next(loader) for _ in range(7)]
    rows = [int(row) for batch in batches for row in batch.rows]
    assert rows == SampleStream(21, 9).rows(0, 42).tolist()
    assert len(payloads) == len(set(rows))
    ids = [int(each) for batch in batches for each in batch.sample_ids]
    assert [f"{each:016x}" for each in ids] == [keys[row] for row in rows]


def test_damage_in_the_second_dataset_is_named(two: Any) -> None:
    two[1].overwrite(4, 50, b"\0" * 20)
    paths = [each.path for each in two]
    with open_cpu(paths, batch_size_per_rank=1) as loader, pytest.raises(BadSampleError) as caught:
        rows_of(loader, 21)
    assert f"bad sample {two[1].keys[4]} in shard {two[1].shards[4]} (row 16)" in str(caught.value)
    assert f"engine verify {two[1].path}" in str(caught.value)


def test_balance_gives_every_class_its_share(two: Any) -> None:
    options: dict[str, Any] = {
        "where": "class IS NOT NULL",
        "balance": Balance("class", {"tumour": 1, "stroma": 2}),
    }
    with open_cpu([each.path for each in two], **options) as loader:
        rows = rows_of(loader, 7)
        assert [sum(row in range(start, 21, 3) for row in rows) for start in (0, 2)] == [14, 28]
        # 7 rows each: the tumour's in two passes, the stroma's in four.
        assert Counter(Counter(rows).values()) == {2: 7, 4: 7}
        assert loader.state_dict()["order"]["version"] == "weighted-1"
    with open_cpu([each.path for each in two], balance=Balance("split"), seen=42) as loader:
        classes = np.array([0, 1, 0] * 7)
        assert rows_of(loader, 2) == WeightedStream(classes, np.array([1, 1]), 9).rows(42, 12).tolist()


def test_locality_keeps_neighbours_together(two: Any) -> None:
    with open_cpu(two[0].path, locality=Blocks(2, 3)) as loader:
        assert rows_of(loader, 4) == BlockStream(12, 9, Blocks(2, 3)).rows(0, 24).tolist()
        assert loader.state_dict()["order"] == {"version": "blocks-1", "block_rows": 2, "window_blocks": 3}


ASKED: list[dict[str, Any]] = [
    {},
    {"where": "class IS NOT NULL"},
    {"where": "split = 'train'"},
    {"where": "class IS NOT NULL", "balance": Balance("class")},
    {"where": "class IS NOT NULL", "balance": Balance("class", {"tumour": 1, "stroma": 3})},
    {"where": "class IS NOT NULL", "balance": Balance("patient")},
    {"locality": Blocks(2, 3)},
    {"locality": Blocks(3, 2)},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_every_order_resumes_and_refuses_the_state_of_another(two: Any, asked: dict[str, Any]) -> None:
    with open_cpu(two[0].path, **asked) as loader:
        rows_of(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = rows_of(loader, 5)
    with open_cpu(two[0].path, **asked) as loader:
        loader.load_state_dict(state)
        assert rows_of(loader, 5) == rest
    with open_cpu(two[0].path, **asked, batch_size_per_rank=2, rank=1, world_size=3) as loader:
        loader.load_state_dict(state)
        assert rows_of(loader, 2) == rest[2:4] + rest[8:10]
    for other in ASKED:
        if other != asked:
            with open_cpu(two[0].path, **other) as loader, pytest.raises(ValueError, match=r"'order'|'dataset'"):
                loader.load_state_dict(state)
    with (
        open_cpu([each.path for each in two], **asked) as loader,
        pytest.raises(ValueError, match=r"'order'|'dataset'"),
    ):
        loader.load_state_dict(state)


def test_impossible_requests_are_refused(two: Any, make_dataset: Any, paint: Any) -> None:
    paths = [each.path for each in two]
    small = make_dataset([paint(1, 64)], context_px=64)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "empty list"),
        ([paths[0], paths[1], paths[0]], {}, "hold the same samples"),
        ([paths[0], small.path], {}, "64 px, .* of 96 px"),
        (paths, {"where": "split = 'test'"}, "selects none"),
        (paths, {"balance": Balance("split"), "locality": Blocks()}, "exclude each other"),
        (paths, {"balance": Balance("split", {"train": 1})}, "no weight for 'val'"),
        (paths, {"bad_samples": "ignore"}, "bad_samples"),
    ]
    for dataset, options, match in wrong:
        with pytest.raises(ValueError, match=match):
            open_cpu(dataset, **options)
