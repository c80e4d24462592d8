"""Splits: given ones are read to the letter, drawn ones part no group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.evaluation.folds import Fold, draw_folds, folds_of_column, leaks, read_folds, with_validation

SLIDES = ["a.1", "a.2", "b", "c", "d", "d"]


def _lists(fold: Fold) -> tuple[list[int], list[int], list[int]]:
    return fold.train.tolist(), fold.val.tolist(), fold.test.tolist()


def test_splits_of_clam_are_read_with_their_gaps_and_their_svs(tmp_path: Path) -> None:
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,a.1,b,d\n1,a.2.svs,,ghost\n2,c,,\n")
    (tmp_path / "splits_0_bool.csv").write_text(",train,val,test\n")
    (tmp_path / "splits_10.csv").write_text("train,test\nd,a.1\n")
    (tmp_path / "splits_2.csv").write_text("train,test\nb,c\n")
    folds, unknown = read_folds(tmp_path, SLIDES)
    assert [fold.name for fold in folds] == ["0", "2", "10"]
    assert [_lists(fold) for fold in folds] == [([0, 1, 3], [2], [4, 5]), ([2], [], [3]), ([4, 5], [], [0])]
    assert unknown == ["ghost"]
    single, _ = read_folds(tmp_path / "splits_2.csv", SLIDES)
    assert _lists(single[0]) == ([2], [], [3])


def test_a_column_of_folds_tests_each_slide_once(tmp_path: Path) -> None:
    file = tmp_path / "folds.csv"
    file.write_text("slide_id,fold\na.1,10\na.2,9\nb,10\nc,9\nd,2\n")
    folds, unknown = read_folds(file, SLIDES)
    assert [(fold.name, fold.test.tolist()) for fold in folds] == [("2", [4, 5]), ("9", [1, 3]), ("10", [0, 2])]
    assert all(sorted([*fold.train, *fold.test]) == list(range(6)) for fold in folds)
    assert unknown == []


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("s.csv", "train,test\nb,c\nd,b\n", "fold 0 has slide b in train and test"),
        ("s.csv", "train,test\nb.svs,b\n", "slide b in train and test"),
        ("s.csv", "train,test\nb,ghost\n", "no sample is in test"),
        ("s.csv", "training,test\nb,c\n", "found columns training, test; expected train, val and test, or slide_id"),
        ("s.csv", "slide_id,fold\nb,0\nc,0\n", "found 1 fold"),
        ("s.csv", "slide_id,fold\nb,0\nb,1\nc,0\n", "b: each slide must be in one fold"),
        ("s.txt", "", "ends in .csv, .tsv or .parquet"),
        ("s.csv", "", "cannot be read as a table"),
    ],
)
def test_splits_that_contradict_themselves_are_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_folds(tmp_path / name, SLIDES)


def test_a_folder_without_splits_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected files splits_0.csv.*found none"):
        read_folds(tmp_path, SLIDES)
    with pytest.raises(ValueError, match=r"no\.csv: there is no such file"):
        read_folds(tmp_path / "no.csv", SLIDES)


def test_a_column_says_train_val_and_test() -> None:
    (fold,) = folds_of_column(["train", "Test", "tune", "validation", "train", "valid"], "split")
    assert _lists(fold) == ([0, 4], [2, 3, 5], [1])
    with pytest.raises(ValueError, match="found None, 'holdout'; expected train, val or test"):
        folds_of_column(["train", "holdout", None, "test"], "split")
    with pytest.raises(ValueError, match="no sample is in test"):
        folds_of_column(["train", "val"], "split")


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=20, max_size=60),
    folds=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_drawn_folds_part_no_group_and_test_each_sample_once(groups: list[int], folds: int, seed: int) -> None:
    numbers = np.array([*groups, *range(6)])
    labels = np.random.default_rng(seed).integers(2, size=len(numbers))
    drawn = draw_folds(labels, numbers, folds=folds, test_fraction=0.25, seed=seed)
    assert len(drawn) == folds
    complete = [with_validation(fold, labels, numbers, val_fraction=0.5, seed=seed) for fold in drawn]
    for fold in complete:
        assert leaks(fold, numbers) == {}
        assert sorted([*fold.train, *fold.val, *fold.test]) == list(range(len(numbers)))
        assert all(len(rows) for rows in fold.parts().values())
    if folds > 1:
        assert sorted(np.concatenate([fold.test for fold in drawn])) == list(range(len(numbers)))
    again = draw_folds(labels, numbers, folds=folds, test_fraction=0.25, seed=seed)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(drawn, again, strict=True))


def test_drawn_folds_are_balanced_by_class_and_differ_by_seed() -> None:
    labels, groups = np.arange(400) // 4 % 2, np.arange(400) // 4
    first, second = (draw_folds(labels, groups, folds=5, test_fraction=0.2, seed=seed) for seed in (0, 1))
    for fold in first:
        assert np.bincount(labels[fold.test]).tolist() == [40, 40]
    assert not np.array_equal(first[0].test, second[0].test)


def test_a_given_validation_stays() -> None:
    fold = Fold("x", np.arange(3), np.array([3]), np.array([4]))
    assert with_validation(fold, np.zeros(5, np.int64), np.arange(5), val_fraction=0.2, seed=0) is fold


def test_fewer_groups_than_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"folds: 5 parts need as many groups .* there are 3"):
        draw_folds(np.array([0, 1, 0, 1, 0, 1]), np.arange(6) // 2, folds=5, test_fraction=0.2, seed=0)
    with pytest.raises(ValueError, match="test_fraction: 4 parts need a class with as many samples"):
        draw_folds(np.array([0, 1, 0, 1]), np.arange(4), folds=1, test_fraction=0.25, seed=0)


def test_leaks_name_the_groups_on_two_sides() -> None:
    fold = Fold("x", np.array([0, 1]), np.array([2]), np.array([3, 4]))
    found = leaks(fold, np.array([7, 8, 9, 8, 7]))
    assert {sides: numbers.tolist() for sides, numbers in found.items()} == {"train and test": [7, 8]}
