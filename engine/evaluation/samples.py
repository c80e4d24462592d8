"""Embeddings of a store joined with labels of a table. What is missing on either side is listed, never just dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from engine.config import nearest
from engine.console import progress

if TYPE_CHECKING:
    from engine.stores import SlideEmbeddings

_GROUPS = ("patient_id", "case_id")
_LABEL, _ROW = "__label", "__row"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Samples:
    """What is classified.

    Attributes:
        x: float32 [n, D].
        labels: int64 [n], indices of `classes`.
        classes: the labels as text; numbers in their order, else in the order of letters.
        groups: int64 [n], indices of `group_names`: samples of one group are never on both sides of a split.
        table: a row per sample: slide_id and what else names it, as text.
        group_by: the column that the groups are of.
        missing: {without_label: names, without_embedding: names}.
    """

    x: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    groups: npt.NDArray[np.int64]
    group_names: list[str]
    table: pl.DataFrame
    group_by: str = "slide_id"
    missing: dict[str, list[str]] = field(default_factory=dict)


def some(names: Iterable[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(islice(listed, shown)) + more


def read_table(path: Path, key: str) -> pl.DataFrame:
    """A CSV, TSV or Parquet table with all its values as text; an empty field is null.

    Raises:
        ValueError: no such file, or none of these.
    """
    if not path.is_file():
        raise ValueError(f"{key}={path}: there is no such file")
    if path.suffix.lower() not in (*_SEPARATORS, ".parquet"):
        raise ValueError(f"{key}={path}: expected a name that ends in .csv, .tsv or .parquet")
    try:
        if path.suffix.lower() == ".parquet":
            return pl.read_parquet(path).select(pl.all().cast(pl.String))
        table = pl.read_csv(path, separator=_SEPARATORS[path.suffix.lower()], infer_schema=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}={path} cannot be read as a table: {' '.join(str(error).split())}") from None
    return table.with_columns(pl.all().str.strip_chars().replace("", None))


def read_samples(
    store: Mapping[str, SlideEmbeddings],
    labels: Path | None,
    *,
    label: str = "label",
    on: Sequence[str] = ("slide_id",),
    group: str | None = None,
    split: str | None = None,
    array: str = "embedding",
    mean: bool = False,
    rows_per_slide: int | None = None,
    seed: int = 0,
) -> Samples:
    """The labelled embeddings of a store, in the order of slides and their rows.

    Args:
        store: as `open_store` opens it; its arrays are [M, ..., D].
        labels: a table with `label` and the columns `on`; None where `label` is a column of the store's rows.
        on: what tells which embedding a label is of: slide_id alone, or columns of the store's rows as well.
        group: the column whose values are kept together; None is patient_id or case_id where there is one, else
            slide_id.
        split: a column to carry along.
        mean: one sample per slide, the mean over all axes but the last (of patches that are `present`).
        rows_per_slide: at most so many of each slide, drawn at random by the seed; ignored with `mean`.

    Raises:
        ValueError: columns that are not there, labels that contradict each other, embeddings that are not finite, a
            slide in two groups, or nothing that has both an embedding and a label.
    """
    by_row = labels is None or tuple(on) != ("slide_id",)
    if mean and by_row:
        raise ValueError(
            "pool=mean makes one sample of a slide, so its label must be a slide's: give labels by slide_id"
        )
    table = None if labels is None else _label_table(labels, label, on, group, split)
    known = None if table is None or "slide_id" not in on else set(table["slide_id"].to_list())
    wanted = list(store) if known is None else [slide_id for slide_id in store if slide_id in known]
    generator = np.random.default_rng(seed)
    xs, tables, unlabelled, matched = [], [], [], []
    with progress("read", len(wanted), "slides") as advance:
        for slide_id in wanted:
            slide = store[slide_id]
            if array not in slide.names:
                raise ValueError(f"array={array}: slide {slide_id} has {', '.join(slide.names)}")
            x = slide.array(array)
            rows = _rows(slide, slide_id, len(x)) if by_row or not mean else pl.DataFrame({"slide_id": [slide_id]})
            if mean:
                x = _mean(slide, x, slide_id)
            elif x.ndim != 2:
                raise ValueError(
                    f"array={array} of slide {slide_id} has shape {list(x.shape)}: expected [rows, width]; choose "
                    "another array, or pool=mean"
                )
            joined = _joined(rows.with_row_index(_ROW), table, label, on)
            if table is not None and by_row:
                matched.append(joined.select(on))
            lacking = rows.height - joined.height
            if lacking:
                unlabelled.append(f"{slide_id} ({lacking} of {rows.height} rows)" if joined.height else slide_id)
            if rows_per_slide is not None and not mean and joined.height > rows_per_slide:
                kept = np.sort(generator.choice(joined.height, rows_per_slide, replace=False))
                joined = joined[kept]
            xs.append(_finite(x[joined[_ROW].to_numpy()], slide_id, array))
            tables.append(joined.drop(_ROW))
            advance(1, "")
    missing = {
        "without_label": sorted([*unlabelled, *(set(store) - set(wanted))]),
        "without_embedding": _without_embedding(table, on, set(store), matched if by_row else None),
    }
    found = pl.concat(tables, how="diagonal_relaxed") if tables else pl.DataFrame()
    if not found.height:
        raise ValueError(
            f"no embedding has a label: the store's slides are {some(sorted(store))}; labels are given for "
            f"{some(missing['without_embedding']) or 'none'}. Names must agree to the letter"
        )
    return made(np.concatenate(xs), found, label, group, missing)


def made(
    x: npt.NDArray[np.float32], table: pl.DataFrame, label: str, group: str | None, missing: dict[str, list[str]]
) -> Samples:
    """Samples of a table whose column `__label` holds their labels; classes and groups are numbered.

    Raises:
        ValueError: a single class, no column `group` or one with gaps, or a slide in two groups.
    """
    names = table[_LABEL].unique().to_list()
    classes = sorted(names, key=_natural)
    if len(classes) < 2:
        raise ValueError(f"label={label}: found the class {classes[0]!r} alone; expected two or more")
    by = group or next((name for name in _GROUPS if name in table.columns), "slide_id")
    if by not in table.columns:
        raise ValueError(f"group={by}: there is no such column{nearest(by, table.columns)}")
    if table[by].null_count():
        lacking = table.filter(pl.col(by).is_null())["slide_id"].unique(maintain_order=True)
        raise ValueError(f"group={by}: no value for {some(lacking)}; fill the column, or group by slide_id")
    torn = table.group_by("slide_id").agg(pl.col(by).n_unique().alias("of")).filter(pl.col("of") > 1)["slide_id"]
    if len(torn):
        raise ValueError(f"group={by}: {some(torn.sort())}: rows of one slide are in several groups")
    group_names, groups = np.unique(table[by].cast(pl.String).to_numpy(), return_inverse=True)
    numbers = {name: number for number, name in enumerate(classes)}
    codes = np.array([numbers[name] for name in table[_LABEL].to_list()], np.int64)
    rest = table.drop(_LABEL)
    return Samples(x, codes, classes, groups.astype(np.int64), group_names.tolist(), rest, by, missing)


def labelled(table: pl.DataFrame, label: str) -> pl.DataFrame:
    """`table` with its column `label` under the name that `made` expects, without rows that have none."""
    return table.rename({label: _LABEL}).filter(pl.col(_LABEL).is_not_null())


def _label_table(path: Path, label: str, on: Sequence[str], group: str | None, split: str | None) -> pl.DataFrame:
    table = read_table(path, "labels")
    for key, column in (("label", label), *(("on", name) for name in on)):
        if column not in table.columns:
            raise ValueError(f"labels={path} has no column {column!r} ({key}={column}){nearest(column, table.columns)}")
    if split is not None and split not in table.columns:
        raise ValueError(f"labels={path} has no column {split!r} (split={split}){nearest(split, table.columns)}")
    known = table.drop_nulls([*on]).unique(maintain_order=True)
    keep = [*on, *(name for name in {*_GROUPS, group, split} - {*on, label, None} if name in table.columns)]
    known = labelled(known.select(*keep, pl.col(label).alias(_LABEL)), _LABEL).unique(maintain_order=True)
    twice = known.filter(known.select(on).is_duplicated())
    if twice.height:
        names = [" ".join(row) for row in twice.select(on).unique(maintain_order=True).iter_rows()]
        raise ValueError(
            f"labels={path}: {some(names)}: two rows contradict each other; expected one per {' '.join(on)}"
        )
    return known


def _rows(slide: SlideEmbeddings, slide_id: str, count: int) -> pl.DataFrame:
    """The rows of a slide as text, slide_id among them."""
    table = slide.rows
    if table.height != count:
        raise ValueError(
            f"slide {slide_id}: its {table.height} rows do not belong to {count} embeddings; verify the store"
        )
    plain = [name for name, kind in table.schema.items() if not kind.is_nested() and name != "slide_id"]
    return table.select(pl.lit(slide_id).alias("slide_id"), pl.col(plain).cast(pl.String))


def _joined(rows: pl.DataFrame, table: pl.DataFrame | None, label: str, on: Sequence[str]) -> pl.DataFrame:
    if table is None:
        if label not in rows.columns:
            raise ValueError(
                f"the store's rows have no column {label!r}{nearest(label, rows.columns)} Give labels=FILE.csv"
            )
        return labelled(rows, label)
    for column in on:
        if column not in rows.columns:
            raise ValueError(f"on={column}: the store's rows have no such column{nearest(column, rows.columns)}")
    own = rows.drop(name for name in table.columns if name in rows.columns and name not in on)
    return own.join(table, on=list(on), how="inner", maintain_order="left")


def _mean(slide: SlideEmbeddings, x: npt.NDArray[Any], slide_id: str) -> npt.NDArray[np.float32]:
    """[M, ..., D] to [1, D]; patches that are not `present` do not count."""
    if not len(x):
        raise ValueError(f"slide {slide_id} has no embeddings: leave it out of the labels")
    patches = x.ndim == 3 and "present" in slide.names
    values = x[slide.array("present")] if patches else x.reshape(-1, x.shape[-1])
    return values.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)


def _finite(x: npt.NDArray[Any], slide_id: str, array: str) -> npt.NDArray[np.float32]:
    values = x.astype(np.float32)
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
        raise ValueError(
            f"slide {slide_id}: {len(rows)} rows of {array} are not finite, the first of them row {rows[0]}"
        )
    return values


def _without_embedding(
    table: pl.DataFrame | None, on: Sequence[str], slides: set[str], matched: list[pl.DataFrame] | None
) -> list[str]:
    if table is None:
        return []
    if matched is None:
        return sorted(set(table["slide_id"].to_list()) - slides)
    rest = table.select(on)
    if matched:
        rest = rest.join(pl.concat(matched).unique(), on=list(on), how="anti")
    return sorted(" ".join(row) for row in rest.iter_rows())


def _natural(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
