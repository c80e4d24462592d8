"""Embeddings and labels are joined to the letter, and what is missing is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.evaluation.samples import read_samples, some
from engine.stores import open_store

Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, write_store: Writer) -> Path:
    """Slides a (4 rows), b (2) and 007 (3) of width 2; every value says its slide and row."""
    sizes = {"a": 4, "b": 2, "007": 3}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for number, (slide_id, size) in enumerate(sizes.items()):
        x = (10 * number + np.arange(size))[:, None] + np.array([0.0, 0.5])
        patches = np.stack([x, x + 100], axis=1)
        present = np.arange(2 * size).reshape(size, 2) % 3 > 0
        arrays[slide_id] = {"embedding": x, "patches": patches, "present": present}
    tissue = {"a": ["t", "s", "t", ""], "b": ["s", "s"], "007": ["t", "t", "s"]}
    tissue["a"][3] = None  # type: ignore[call-overload]
    return write_store(tmp_path_factory.mktemp("small") / "store", arrays, tissue)


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "labels.csv"
        path.write_text(text)
        return path

    return write


def test_each_row_gets_the_label_of_its_slide(small: Path, table: Callable[[str], Path]) -> None:
    samples = read_samples(open_store(small), table("slide_id,label\nb,10\n007,9\nghost,9\nc,\n"))
    assert samples.classes == ["9", "10"]
    assert samples.x[:, 0].tolist() == [20, 21, 22, 10, 11]
    assert samples.x.dtype == np.float32
    assert samples.labels.tolist() == [0, 0, 0, 1, 1]
    assert samples.table["slide_id"].to_list() == ["007"] * 3 + ["b"] * 2
    assert samples.table["sample_id"].to_list() == ["200", "201", "202", "100", "101"]
    assert samples.missing == {"without_label": ["a"], "without_embedding": ["ghost"]}
    assert samples.group_by == "slide_id"


def test_rows_have_labels_of_their_own(small: Path, table: Callable[[str], Path]) -> None:
    samples = read_samples(open_store(small), None, label="tissue")
    assert [samples.classes[label] for label in samples.labels] == ["t", "t", "s", "t", "s", "t", "s", "s"]
    assert samples.x[:, 0].tolist() == [20, 21, 22, 0, 1, 2, 10, 11]
    assert samples.missing == {"without_label": ["a (1 of 4 rows)"], "without_embedding": []}
    by_id = read_samples(open_store(small), table("sample_id,label\n101,x\n2,y\n999,x\n"), on=("sample_id",))
    assert (by_id.x[:, 0].tolist(), by_id.labels.tolist()) == ([2, 11], [1, 0])
    assert by_id.missing["without_label"] == ["007", "a (3 of 4 rows)", "b (1 of 2 rows)"]
    assert by_id.missing["without_embedding"] == ["999"]
    text = "slide_id,region,label\na,1,x\n007,0,y\n007,9,y\n"
    by_region = read_samples(open_store(small), table(text), on=("slide_id", "region"))
    assert by_region.x[:, 0].tolist() == [20, 21, 2, 3]
    assert by_region.missing["without_embedding"] == ["007 9"]


def test_the_mean_of_a_slide_is_that_of_its_rows_or_of_the_patches_that_are_there(
    small: Path, table: Callable[[str], Path]
) -> None:
    labels = table("slide_id,label\na,x\nb,y\n")
    store = open_store(small)
    samples = read_samples(store, labels, mean=True)
    assert samples.x.tolist() == [[1.5, 2.0], [10.5, 11.0]]
    patches = read_samples(store, labels, mean=True, array="patches")
    there = store["a"].array("present")
    assert patches.x[0] == pytest.approx(store["a"].array("patches")[there].mean(axis=0))
    assert there.sum() < there.size
    with pytest.raises(ValueError, match=r"array=patches of slide a has shape \[4, 2, 2\].*pool=mean"):
        read_samples(store, labels, array="patches")


def test_groups_are_patients_where_they_are_known(small: Path, table: Callable[[str], Path]) -> None:
    store = open_store(small)
    labels = table("slide_id,label,case_id,site\na,x,P1,S\nb,y,P1,S\n007,x,P2,S\n")
    samples = read_samples(store, labels, mean=True)
    assert (samples.group_by, samples.group_names, samples.groups.tolist()) == ("case_id", ["P1", "P2"], [1, 0, 0])
    by_site = read_samples(store, labels, mean=True, group="site")
    assert (by_site.group_by, by_site.group_names) == ("site", ["S"])


def test_some_rows_of_each_slide_are_taken_and_stay_with_what_is_theirs(
    small: Path, table: Callable[[str], Path]
) -> None:
    labels = table("slide_id,label\na,x\nb,y\n007,y\n")
    first, again, other = (read_samples(open_store(small), labels, rows_per_slide=2, seed=seed) for seed in (0, 0, 3))
    assert first.table["slide_id"].to_list() == ["007"] * 2 + ["a"] * 2 + ["b"] * 2
    expected = [int(sample) // 100 * 10 + int(sample) % 100 for sample in first.table["sample_id"]]
    assert first.x[:, 0].tolist() == expected
    assert first.table.equals(again.table)
    assert not first.table.equals(other.table)


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("slide_id,lable\na,x\n", {}, "has no column 'label'.*did you mean 'lable'"),
        ("slide,label\na,x\n", {}, "has no column 'slide_id'.*did you mean 'slide'"),
        ("slide_id,label\na,x\nb,x\n", {}, "found the class 'x' alone"),
        ("slide_id,label\na,x\na,y\nb,x\n", {}, "a: two rows contradict each other"),
        ("slide_id,label\nA,x\nB,y\n", {}, "no embedding has a label: the store's slides are 007, a, b.*for A, B"),
        ("slide_id,label,patient_id\na,x,\nb,y,P\n", {}, "group=patient_id: no value for a"),
        ("slide_id,label\na,x\nb,y\n", {"group": "site"}, "group=site: there is no such column"),
        ("slide_id,label\na,x\nb,y\n", {"split": "part"}, "has no column 'part'"),
        ("slide_id,label\na,x\nb,y\n", {"array": "patch"}, "array=patch: slide a has .*patches"),
        ("sample_id,label\n1,x\n2,y\n", {"on": ("sample_id",), "mean": True}, "pool=mean makes one sample of a slide"),
        ("sampleid,label\n1,x\n2,y\n", {"on": ("sampleid",)}, "on=sampleid: .*did you mean 'sample_id'"),
        (
            "sample_id,label,case_id\n1,x,P\n2,y,Q\n",
            {"on": ("sample_id",)},
            "a: rows of one slide are in several groups",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    small: Path, table: Callable[[str], Path], text: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_samples(open_store(small), table(text), **options)


def test_a_store_without_the_label_s_column_asks_for_a_file(small: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'tisue'; did you mean 'tissue'\? Give labels=FILE.csv"):
        read_samples(open_store(small), None, label="tisue")


def test_a_slide_without_embeddings_has_no_mean(tmp_path: Path, write_store: Writer, table: Any) -> None:
    arrays = {"a": {"embedding": np.ones((2, 3))}, "b": {"embedding": np.ones((0, 3))}}
    store = open_store(write_store(tmp_path / "store", arrays))
    with pytest.raises(ValueError, match="slide b has no embeddings"):
        read_samples(store, table("slide_id,label\na,x\nb,y\n"), mean=True)


def test_many_names_are_told_by_the_first() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(map(str, range(9)), 3) == "0, 1, 2 and 6 more"
