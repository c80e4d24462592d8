"""Which slides: a folder, a glob, a CSV or a TSV; one row per slide, ids unique; all of them or a random subset."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from engine.config import UsageError
from sharding.dataset import RESERVED_COLUMNS

SUFFIXES = frozenset({".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm"})
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXT_COLUMNS = frozenset({"slide_id", "path", "mpp"})
_WHOLE = r"^-?(0|[1-9]\d{0,17})$"
_DECIMAL = r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$"


@dataclass(frozen=True, slots=True)
class ListedSlide:
    """A slide as the user listed it. `columns` are the list's further columns, for slides.parquet."""

    slide_id: str
    path: Path
    mpp: float | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def list_slides(source: str) -> list[ListedSlide]:
    """The slides of a folder (searched below too), a glob, a CSV or TSV, or one slide, by slide_id; paths are absolute.

    In a glob `**` is any number of folders. Hidden files and folders are left out of folders and globs. The paths of a
    list are relative to the folder it lies in. A listed file that is missing stays listed: the run reports it. Raises
    UsageError where there are no slides, the list cannot be read, two slides have one id, or a name is no UTF-8.
    """
    path = Path(source).expanduser()
    if any(character in source for character in "*?[") and not path.exists():
        slides = _from_paths(Path(found) for found in glob.glob(str(path), recursive=True))
        where = f"the pattern {source}"
    elif path.is_dir():
        slides = _from_paths(_below(path))
        where = f"the folder {source} (searched for {', '.join(sorted(SUFFIXES))})"
    elif path.is_file() and path.suffix.lower() in _SEPARATORS:
        slides = _from_table(path)
        where = f"the slide list {source}"
    elif path.is_file():
        slides = [ListedSlide(path.stem, path.resolve())]
        where = source
    else:
        raise UsageError(f"slides={source}: there is no such folder or file.")
    if not slides:
        raise UsageError(f"slides={source}: no slide in {where}.")
    first: dict[str, ListedSlide] = {}
    for slide in slides:
        if not _is_utf8(str(slide.path)):
            raise UsageError(
                f"the name of the slide {str(slide.path)!r} is no UTF-8, which the index needs: rename it."
            )
        other = first.setdefault(slide.slide_id, slide)
        if other is not slide:
            raise UsageError(
                f"two slides have the id {slide.slide_id!r}: {other.path} and {slide.path}. "
                "Give a CSV with a column slide_id that tells them apart."
            )
    return sorted(slides, key=lambda slide: slide.slide_id)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def subset(slides: Sequence[ListedSlide], n: int, seed: int) -> list[ListedSlide]:
    """`n` slides at random, sorted by slide_id: those whose ids come first by a hash that `seed` is the key of.

    It is the same whatever the order of the list and the place of the files; the subset of n is part of that of n + 1,
    and a slide that is added to the list displaces one at most. Raises UsageError where there are not that many slides.
    """
    if not 1 <= n <= len(slides):
        raise UsageError(
            f"a subset of {n} slides was asked for; expected 1 to {len(slides)}, the number of slides listed."
        )
    chosen = sorted(slides, key=lambda slide: (_subset_key(slide.slide_id, seed), slide.slide_id))[:n]
    return sorted(chosen, key=lambda slide: slide.slide_id)


def _subset_key(slide_id: str, seed: int) -> bytes:
    return hashlib.blake2b(slide_id.encode(), digest_size=16, key=str(seed).encode()).digest()


def absolute(source: str) -> str:
    """`source` (folder, glob, list or slide) as it is named from any folder."""
    path = Path(source).expanduser()
    return str(path if path.is_absolute() else Path.cwd() / path)


def _below(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, hidden ones left out; linked folders are entered, each real folder once."""
    visited: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(files) if not name.startswith("."))


def _from_paths(paths: Iterable[Path]) -> list[ListedSlide]:
    # A link that leads nowhere is listed too: it is reported as a slide that cannot be read, not left out in silence.
    found = {
        (p.stem, p.resolve()): None  # a pattern with two `**` meets a file more than once
        for p in paths
        if p.suffix.lower() in SUFFIXES and (p.is_file() or (p.is_symlink() and not p.exists()))
    }
    return [ListedSlide(slide_id, path) for slide_id, path in found]


def _from_table(path: Path) -> list[ListedSlide]:
    try:
        table = pl.read_csv(path, separator=_SEPARATORS[path.suffix.lower()], infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"slide list {path}: {' '.join(str(error).split())}") from None
    if "path" not in table.columns:
        raise UsageError(f"slide list {path} has the columns {', '.join(table.columns)}; expected one named path.")
    taken = RESERVED_COLUMNS - {"slide_id", "path", "mpp"}
    clash = sorted(taken & set(table.columns))
    if clash:
        raise UsageError(f"slide list {path}: slides.parquet has its own column {clash[0]!r}; rename yours.")
    table = table.with_columns(_plain_numbers(table[name]) for name in table.columns if name not in _TEXT_COLUMNS)
    slides = []
    for number, row in enumerate(table.iter_rows(named=True), start=2):
        if not row["path"]:
            raise UsageError(f"slide list {path}, line {number}: path is empty.")
        file = Path(row.pop("path")).expanduser()
        file = (file if file.is_absolute() else path.parent / file).resolve()
        slide_id = row.pop("slide_id", None) or file.stem
        slides.append(ListedSlide(slide_id, file, _mpp(path, number, row.pop("mpp", None)), row))
    return slides


def _plain_numbers(column: pl.Series) -> pl.Series:
    """A column of text as numbers where each of them is written plainly; `0042` is a name, not forty-two."""
    if column.null_count() == len(column):
        return column
    for pattern, kind in ((_WHOLE, pl.Int64), (_DECIMAL, pl.Float64)):
        if column.drop_nulls().str.contains(pattern).all():
            return column.cast(kind)
    return column


def _mpp(path: Path, number: int, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        mpp = float(value)
    except ValueError:
        mpp = math.nan
    if not (math.isfinite(mpp) and mpp > 0):
        raise UsageError(f"slide list {path}, line {number}: mpp={value}; expected um/px as a number above 0.")
    return mpp
