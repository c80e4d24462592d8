"""Which samples train, validate and test: splits that are given, or drawn by groups. No group is on two sides."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from engine.evaluation.samples import read_table, some

Indices = npt.NDArray[np.int64]
PARTS = ("train", "val", "test")
_PART_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "tune": "val", "test": "test"}
_FOLD_FILE = re.compile(r"splits_(\d+)\.csv")


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows of the samples, ascending; `val` may be empty."""

    name: str
    train: Indices
    val: Indices
    test: Indices

    def parts(self) -> dict[str, Indices]:
        return {"train": self.train, "val": self.val, "test": self.test}


def folds_of_column(values: Sequence[str | None], column: str) -> list[Fold]:
    """One fold, from each sample's train, val (valid, validation, tune) or test.

    Raises:
        ValueError: another value, or nothing to train on or to test.
    """
    wrong = {value for value in values if value is None or value.strip().lower() not in _PART_OF}
    if wrong:
        raise ValueError(
            f"split={column}: found {some(map(repr, sorted(wrong, key=str)))}; expected train, val or test in every row"
        )
    part = np.array([_PART_OF[str(value).strip().lower()] for value in values])
    fold = Fold(column, *(np.flatnonzero(part == name) for name in PARTS))
    return [_filled(fold, f"split={column}")]


def read_folds(path: Path, slide_ids: Sequence[str]) -> tuple[list[Fold], list[str]]:
    """The folds that a file or a folder lists.

    A folder of CLAM's and HIPT's `splits_0.csv`, `splits_1.csv` ... (columns train, val, test of slide ids; others are
    ignored), a single such file, or a CSV of slide_id and fold, where each value of fold is tested by what was trained
    on the others.

    Args:
        slide_ids: of each sample.

    Returns:
        The folds, and the slides listed in them that no sample has, sorted. A listed id may end in .svs.

    Raises:
        ValueError: no such files or columns, a slide in two parts of a fold, or a fold without train or test.
    """
    rows_of: dict[str, list[int]] = {}
    for row, slide_id in enumerate(slide_ids):
        rows_of.setdefault(slide_id, []).append(row)
    if path.is_dir():
        files = sorted((int(match[1]), file) for file in path.iterdir() if (match := _FOLD_FILE.fullmatch(file.name)))
        if not files:
            raise ValueError(f"splits={path}: expected files splits_0.csv, splits_1.csv ... in this folder, found none")
        listed = {str(number): _listed(read_table(file, "splits"), file) for number, file in files}
    else:
        table = read_table(path, "splits")
        rotated = {"slide_id", "fold"} <= set(table.columns)
        listed = _rotated(table, path) if rotated else {"0": _listed(table, path)}
    unknown: set[str] = set()
    folds = []
    for name, parts in listed.items():
        rows: dict[str, list[int]] = {part: [] for part in PARTS}
        seen: dict[str, str] = {}
        for part, ids in parts.items():
            for listed_id in ids:
                slide_id = listed_id if listed_id in rows_of else listed_id.removesuffix(".svs")
                if seen.setdefault(slide_id, part) != part:
                    raise ValueError(f"splits={path}: fold {name} has slide {slide_id} in {seen[slide_id]} and {part}")
                rows[part] += rows_of.get(slide_id, [])
                if slide_id not in rows_of:
                    unknown.add(slide_id)
        fold = Fold(name, *(np.unique(np.array(rows[part], np.int64)) for part in PARTS))
        folds.append(_filled(fold, f"splits={path}: fold {name}"))
    return folds, sorted(unknown)


def _listed(table: pl.DataFrame, file: Path) -> dict[str, list[str]]:
    if not {"train", "test"} <= set(table.columns):
        raise ValueError(
            f"splits={file}: found columns {', '.join(table.columns)}; expected train, val and test, or slide_id "
            "and fold"
        )
    return {part: table[part].drop_nulls().to_list() for part in PARTS if part in table.columns}


def _rotated(table: pl.DataFrame, file: Path) -> dict[str, dict[str, list[str]]]:
    known = table.select("slide_id", "fold").drop_nulls().unique(maintain_order=True)
    names = sorted(known["fold"].unique().to_list(), key=_number_first)
    if len(names) < 2:
        raise ValueError(f"splits={file}: found {len(names)} fold; expected two or more values in the column fold")
    twice = known.filter(pl.col("slide_id").is_duplicated())["slide_id"].unique(maintain_order=True).to_list()
    if twice:
        raise ValueError(f"splits={file}: {some(twice)}: each slide must be in one fold, and these are in several")
    return {
        name: {
            "train": known.filter(pl.col("fold") != name)["slide_id"].to_list(),
            "test": known.filter(pl.col("fold") == name)["slide_id"].to_list(),
        }
        for name in names
    }


def _number_first(text: str) -> tuple[bool, float, str]:
    return (False, float(text), "") if re.fullmatch(r"\d+(\.\d+)?", text) else (True, 0.0, text)


def _filled(fold: Fold, where: str) -> Fold:
    for part in ("train", "test"):
        if not len(fold.parts()[part]):
            raise ValueError(f"{where}: no sample is in {part}; expected slides that have embeddings and labels")
    return fold


def draw_folds(labels: Indices, groups: Indices, *, folds: int, test_fraction: float, seed: int) -> list[Fold]:
    """Folds without validation, by groups and balanced by class: k-fold, or with `folds` 1 a single split.

    Raises:
        ValueError: fewer groups than parts.
    """
    rows = np.arange(len(labels))
    parts = folds if folds > 1 else _num_parts(test_fraction)
    tested = _parts(labels, groups, parts, seed, "folds" if folds > 1 else "test_fraction")
    none = np.empty(0, np.int64)
    return [
        Fold(str(number), np.setdiff1d(rows, test), none, test)
        for number, test in enumerate(tested[: folds if folds > 1 else 1])
    ]


def with_validation(fold: Fold, labels: Indices, groups: Indices, *, val_fraction: float, seed: int) -> Fold:
    """`fold`, whose validation is drawn from its training groups where it has none."""
    if len(fold.val):
        return fold
    parts = _num_parts(val_fraction)
    val = fold.train[_parts(labels[fold.train], groups[fold.train], parts, seed, "val_fraction")[0]]
    return Fold(fold.name, np.setdiff1d(fold.train, val), val, fold.test)


def _num_parts(fraction: float) -> int:
    return max(2, round(1 / fraction))


def _parts(labels: Indices, groups: Indices, parts: int, seed: int, key: str) -> list[Indices]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    found = len(np.unique(groups))
    if found < parts:
        raise ValueError(f"{key}: {parts} parts need as many groups (patients or slides), and there are {found}")
    with warnings.catch_warnings():
        # That a class has fewer members than there are parts: metrics say what they lack.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        if found == len(groups) and np.bincount(labels).max() >= parts:
            drawn = StratifiedKFold(parts, shuffle=True, random_state=seed).split(labels, labels)
        elif np.bincount(labels).max() >= parts:
            drawn = StratifiedGroupKFold(parts, shuffle=True, random_state=seed).split(labels, labels, groups)
        else:
            raise ValueError(f"{key}: {parts} parts need a class with as many samples; give fewer folds or more labels")
        return [test for _, test in drawn]


def leaks(fold: Fold, groups: Indices) -> dict[str, Indices]:
    """The groups on two sides: {"train and test": numbers, ...}, only where there are any."""
    parts = {name: np.unique(groups[rows]) for name, rows in fold.parts().items()}
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    shared = {f"{a} and {b}": np.intersect1d(parts[a], parts[b]) for a, b in pairs}
    return {sides: found for sides, found in shared.items() if len(found)}
