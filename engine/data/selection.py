"""Which rows a loader runs over: one dataset or several, all of their rows or those that an SQL filter keeps.

Rows are numbered through: dataset 0 first, then dataset 1, each in the order of its index.parquet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.config import nearest
from engine.data.store import DEFAULT_CACHE_BYTES, StoreOptions, is_url
from sharding.index import Dataset, DatasetDamagedError, open_dataset

if TYPE_CHECKING:
    import polars as pl

    from engine.data.range_cache import RangeCache

_ROW, _CLASS = "number_of_the_row", "class_of_the_row"


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows, and the class of each where one was asked for.

    rows: int32[n], int64[n] from 2**31 rows on, ascending; None where all rows are selected. classes: uint32[n] with
    the position in `labels`, or None. labels: sorted, each occurs. Memory: 4 (8) bytes a row, and 4 for its class.
    """

    rows: npt.NDArray[np.signedinteger] | None = None
    classes: npt.NDArray[np.uint32] | None = None
    labels: tuple[str, ...] = ()


def open_datasets(
    given: Iterable[Dataset | Path | str],
    *,
    store_options: StoreOptions | None = None,
    cache: Path | str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> list[Dataset]:
    """Open datasets that are loaded as one, those given by a URL as `open_remote_dataset` does.

    Raises ValueError where one is empty or given twice, or there is none.
    """
    datasets: list[Dataset] = []
    ranges: RangeCache | None = None
    for place in given:
        if isinstance(place, Dataset):
            datasets.append(place)
        elif isinstance(place, str) and is_url(place):
            from engine.data.remote import open_remote_dataset

            remote = open_remote_dataset(
                place, options=store_options, cache=cache, cache_bytes=cache_bytes, ranges=ranges
            )
            ranges = remote.ranges
            datasets.append(remote)
        else:
            datasets.append(open_dataset(place))
    if not datasets:
        raise ValueError("dataset is an empty list: a loader needs at least one dataset")
    by_digest: dict[str, Dataset] = {}
    for each in datasets:
        if each.num_rows == 0:
            raise ValueError(f"{each.name} holds no samples")
        digest = str(each.meta["digest"])
        if digest in by_digest:
            raise ValueError(f"{by_digest[digest].name} and {each.name} hold the same samples: give each dataset once")
        by_digest[digest] = each
    return datasets


def select(datasets: Sequence[Dataset], *, where: str | None = None, by: str | None = None) -> Selection:
    """Select the rows for which `where` is true, and find their classes, the values of column `by` as text.

    where: an SQL expression (polars) over the columns of index.parquet and slides.parquet, for example
    "split = 'train' AND tissue_fraction > 0.5 AND flags & 2 = 0". A column of slides.parquet whose name index.parquet
    has too is `slide_NAME`. It is applied to each dataset by itself. Raises ValueError for an expression that is no
    condition, an unknown column, an empty selection and rows without a class; DatasetDamagedError where a table cannot
    be read or does not hold the dataset's rows.
    """
    if where is None and by is None:
        return Selection()
    import polars as pl

    parts, labels_of_parts, first = [], [], 0
    for dataset in datasets:
        part, labels = _selected(dataset, where, by)
        parts.append(part.with_columns(pl.col(_ROW).cast(pl.Int64) + first))
        labels_of_parts.append(labels)
        first += dataset.num_rows
    table = pl.concat(parts)
    if table.height == 0:
        raise ValueError(f"where={where!r} selects none of {first} rows")
    rows: npt.NDArray[np.signedinteger] | None = None
    if where is not None:
        rows = table.get_column(_ROW).cast(pl.Int32 if first < 2**31 else pl.Int64).to_numpy()
    if by is None:
        return Selection(rows)
    if missing := table.get_column(_CLASS).null_count():
        raise ValueError(
            f"{missing} of {table.height} rows have no {by!r} to balance by: leave them out by where='{by} IS NOT NULL'"
        )
    codes = [part.get_column(_CLASS).to_numpy() for part in parts]
    # Of the labels that the tables have, those of selected rows, numbered through.
    used = [np.flatnonzero(np.bincount(each)) for each in codes]
    found = sorted({labels[code] for labels, which in zip(labels_of_parts, used, strict=True) for code in which})
    number_of = {label: number for number, label in enumerate(found)}
    classes = [
        np.array([number_of.get(label, 0) for label in labels], np.uint32)[each]
        for labels, each in zip(labels_of_parts, codes, strict=True)
    ]
    return Selection(rows, np.concatenate(classes), tuple(found))


def identity(datasets: Sequence[Dataset], where: str | None, selection: Selection) -> str | dict[str, Any]:
    """Return what a checkpoint stores of the rows, as JSON holds it: their datasets' digests, the filter, its result.

    The result is part of it (BLAKE2b of the row numbers) because no digest covers the columns of slides.parquet.
    """
    digests = [str(dataset.meta["digest"]) for dataset in datasets]
    if len(digests) == 1 and where is None:
        return digests[0]
    rows = selection.rows
    selected = None if rows is None else hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
    return {"digests": digests, "where": where, "selected": selected}


def _selected(dataset: Dataset, where: str | None, by: str | None) -> tuple[pl.DataFrame, list[str]]:
    """Return one dataset's selected rows, in their order: _ROW and, if asked for, _CLASS, a place in the labels."""
    import polars as pl

    index, slides = (_scan(dataset, name) for name in ("index.parquet", "slides.parquet"))
    if (height := index.select(pl.len()).collect().item()) != dataset.num_rows:
        raise DatasetDamagedError(f"{dataset.name}/index.parquet has {height} rows, not {dataset.num_rows}")
    index_columns = index.collect_schema().names()
    slide_columns = [name for name in slides.collect_schema().names() if name != "slide_id"]
    renamed = {name: f"slide_{name}" if name in index_columns else name for name in slide_columns}
    known = index_columns + list(renamed.values())
    labels: list[str] = []
    try:
        condition = pl.lit(True) if where is None else pl.sql_expr(where)
        needed = set(condition.meta.root_names()) | ({by} if by is not None else set())
        if unknown := sorted(needed - set(known)):
            raise ValueError(f"{dataset.name} has no column {unknown[0]!r}{nearest(unknown[0], known)}")
        index, slides = index.with_row_index(_ROW), slides.rename(renamed)
        if by is not None:
            text = pl.col(by).cast(pl.String)
            table = index if by in index_columns else slides
            labels = table.select(text.drop_nulls().unique().sort()).collect(engine="streaming").to_series().to_list()
            table = table.with_columns(text.cast(pl.Enum(labels)).to_physical().cast(pl.UInt32).alias(_CLASS))
            # Before the join: a number a row is carried through it, not a text.
            index, slides = (table, slides) if by in index_columns else (index, table)
        joined = index
        if needed - set(index_columns):
            # The join could check this too, at three times the memory.
            if slides.select(pl.col("slide_id").is_duplicated().any()).collect().item():
                raise DatasetDamagedError(f"{dataset.path / 'slides.parquet'} lists a slide twice")
            joined = joined.join(slides, on="slide_id", how="left")
        if list(joined.select(condition).collect_schema().dtypes()) != [pl.Boolean]:
            raise ValueError(f"where={where!r} is no condition: it has to be true or false for each row")
        chosen = joined.filter(condition).select([_ROW] + ([_CLASS] if by is not None else []))
        # A join promises no order.
        return chosen.collect(engine="streaming").sort(_ROW), labels
    except pl.exceptions.PolarsError as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"where={where!r} cannot be applied to {dataset.name}: {reason}") from error


def _scan(dataset: Dataset, name: str) -> pl.LazyFrame:
    import polars as pl

    try:
        table = pl.scan_parquet(dataset.file(name))
        table.collect_schema()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetDamagedError(f"{dataset.name}/{name} cannot be read: {str(error).splitlines()[0]}") from error
    return table
