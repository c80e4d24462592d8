"""A store of embeddings, written slide by slide from any process; the one module that knows zarr.

A slide's folder appears by a rename, whole and durable, and never changes afterwards. store.json, written last, lists
the slides that readers see: a store to which slides are added stays what it was until it is finished again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.stores.checks import Array, checked_arrays, checked_rows, difference, float_dtype
from engine.stores.layout import (
    DIGESTED_FILES,
    FORMAT_VERSION,
    GROUP_FILE,
    ROWS_FILE,
    SLIDE_FILE,
    SLIDES,
    STORE_FILE,
    StoreDamagedError,
    commit_slide,
    content_digest,
    damaged,
    folder_name,
    read_file,
    read_meta,
    read_record,
    slide_folders,
    slide_id_of,
    sweep_slides,
    temporary_folder,
)
from engine.stores.merging import merge_rows, survey
from sharding.atomic import json_text, sweep_temporary, write_json
from sharding.dataset import file_sha256
from sharding.faults import fault_point
from sharding.index import write_parquet

if TYPE_CHECKING:
    import polars as pl

# An inner chunk: what one read of few rows costs, and the unit of compression and checksum.
_CHUNK_BYTES = 1 << 20
_FOREIGN = ("dataset.json", SLIDES, ROWS_FILE, STORE_FILE)


def begin_store(path: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a store, or check that what lies there was begun with the same identity.

    Args:
        identity: JSON; all that decides what an embedding is (encoder, digest of the weights, normalisation, spacing,
            source, versions, ...). Its `dtype`, float16 (the default) or float32, is that of all stored floats.

    What interrupted writers left is removed: hold the folder's lock (`sharding.lock.folder_lock`).
    Raises ValueError where the identity is another, or the folder holds something else.
    """
    given = {"format_version": FORMAT_VERSION, "identity": json.loads(json.dumps(dict(identity), allow_nan=False))}
    float_dtype(given["identity"])
    path.mkdir(parents=True, exist_ok=True)
    if (path / GROUP_FILE).exists():
        found = difference(_group_attributes(path), given)
        if found is not None:
            key, was, now = found
            raise ValueError(
                f"{path} was begun with {key} = {json.dumps(was)}, now it is {json.dumps(now)}: "
                "embeddings of two kinds do not go into one store; give another folder."
            )
    else:
        foreign = [name for name in _FOREIGN if (path / name).exists()]
        if foreign:
            raise ValueError(f"{path} holds {foreign[0]}, and is no store of embeddings: give another folder.")
        write_json(path / GROUP_FILE, _group(given))
    (path / SLIDES).mkdir(exist_ok=True)
    if not (path / SLIDES / GROUP_FILE).exists():
        write_json(path / SLIDES / GROUP_FILE, _group({}))
    sweep_temporary(path)
    sweep_slides(path)


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "node_type": "group", "zarr_format": 3}


def _group_attributes(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / GROUP_FILE).read_text(encoding="utf-8"))["attributes"])
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {GROUP_FILE}: call begin_store first.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamagedError(f"{folder / GROUP_FILE} is damaged: {error}") from None


def finished_slides(path: Path) -> set[str]:
    """The ids of the slides that are whole, whether store.json lists them already or not."""
    return {slide_id_of(folder) for folder in slide_folders(path)}


def write_slide(
    path: Path, slide_id: str, arrays: Mapping[str, Array], rows: pa.Table, attributes: Mapping[str, Any]
) -> None:
    """Add one slide to a store that was begun; callable from any process.

    Args:
        arrays: name -> [M, ...]; `embedding` and `xy0` int32 [M, 2] (top left, level-0 pixels) at least. Floats are
            stored in the store's dtype, rounded to nearest even; integers and booleans as they are.
        rows: M rows, row i describes row i of every array.
        attributes: JSON about the slide.

    Whoever is first wins: a slide that is there already stays as it is, and nothing is written.
    Raises ValueError where shapes or dtypes do not fit, or a value is not finite or overflows the store's dtype.
    """
    folder = path / SLIDES / folder_name(slide_id)
    if folder.is_dir():
        _check_same_slide(folder, slide_id)
        return
    dtype = float_dtype(_group_attributes(path)["identity"])
    stored = checked_arrays(slide_id, arrays, rows.num_rows, dtype)
    table = checked_rows(slide_id, rows)
    temporary = temporary_folder(path)
    try:
        fault_point("store.before_write")
        (temporary / GROUP_FILE).write_text(json_text(_group(attributes)), encoding="utf-8")
        for name, values in stored.items():
            _write_array(temporary, name, values)
            fault_point("store.after_array")
        write_parquet(table, temporary / ROWS_FILE)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        record = {
            "slide_id": slide_id,
            "rows": rows.num_rows,
            "arrays": {name: {"dtype": str(v.dtype), "shape": list(v.shape)} for name, v in stored.items()},
            "files": {
                file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in files
            },
        }
        (temporary / SLIDE_FILE).write_text(json_text(record), encoding="utf-8")
        if not commit_slide(temporary, folder):
            _check_same_slide(folder, slide_id)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_same_slide(folder: Path, slide_id: str) -> None:
    # A file system that ignores case takes the folders of "a" and "A" for one.
    found = read_record(folder)[0]["slide_id"]
    if found != slide_id:
        raise ValueError(f"{folder} is that of slide {found!r}, not of {slide_id!r}: this file system ignores case.")


def _write_array(folder: Path, name: str, values: Array) -> None:
    """One zarr array, all of it in one object of the sharding codec; each inner chunk has a checksum of its own."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    row_bytes = max(1, values.itemsize * int(np.prod(values.shape[1:], dtype=np.int64)))
    chunk = max(1, min(len(values), _CHUNK_BYTES // row_bytes))
    shard = max(1, -(-len(values) // chunk)) * chunk
    zarr.create_array(
        folder / name,
        data=values,
        chunks=(chunk, *values.shape[1:]),
        shards=(shard, *values.shape[1:]),
        compressors=[BloscCodec(cname="zstd", clevel=3), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def finish_store(path: Path, *, failures: Iterable[Mapping[str, str]] = ()) -> dict[str, Any]:
    """Merge the slides' rows into rows.parquet and write store.json, last; returns the latter's content.

    Args:
        failures: {slide_id, reason} of each slide that could not be embedded.

    A hundred thousand rows are in memory at a time. A store that is finished already, and to which nothing was added,
    is left alone. Hold the folder's lock.
    """
    slides, schema = survey(path)
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "identity": _group_attributes(path)["identity"],
        "slides": slides,
        "failures": sorted((dict(failure) for failure in failures), key=lambda failure: failure["slide_id"]),
    }
    meta["counts"] = {
        "slides": len(slides),
        "rows": sum(slide["rows"] for slide in slides),
        "failures": len(meta["failures"]),
    }
    finished = _finished_meta(path)
    if finished is not None and all(finished[key] == value for key, value in meta.items()):
        return finished
    merge_rows(path, [slide["slide_id"] for slide in slides], schema)
    meta["files"] = {name: file_sha256(path / name) for name in DIGESTED_FILES}
    meta["digest"] = content_digest(meta)
    write_json(path / STORE_FILE, meta)
    return meta


def _finished_meta(path: Path) -> dict[str, Any] | None:
    """store.json where it is whole, and the files that it names are."""
    try:
        meta = read_meta(path)
        whole = all(file_sha256(path / name) == digest for name, digest in meta["files"].items())
    except (ValueError, StoreDamagedError, FileNotFoundError):
        return None
    return meta if whole else None


class SlideEmbeddings:
    """The embeddings of one slide. Every array is an attribute, read from disk at each access.

    `embedding` is [M, ...] in the store's dtype, `xy0` int32 [M, 2] the top left of what was embedded, level-0 pixels.
    Raises StoreDamagedError where what lies on the disk is not what was written.
    """

    def __init__(self, folder: Path, slide_id: str, sha256: str) -> None:
        self.folder = folder
        self.slide_id = slide_id
        self.sha256 = sha256

    @cached_property
    def _record(self) -> dict[str, Any]:
        return read_record(self.folder, self.sha256)[0]

    def _read(self, name: str) -> bytes:
        return read_file(self.folder, name, self._record["files"][name]["sha256"])

    def __len__(self) -> int:
        """M."""
        return int(self._record["rows"])

    def __repr__(self) -> str:
        return f"SlideEmbeddings({self.slide_id!r}, {', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(self._record["arrays"])

    @property
    def attributes(self) -> dict[str, Any]:
        """What was said of the slide when it was written."""
        return dict(json.loads(self._read(GROUP_FILE))["attributes"])

    @property
    def table(self) -> pa.Table:
        """M rows; row i describes row i of every array."""
        return pq.read_table(pa.BufferReader(self._read(ROWS_FILE)))

    @property
    def rows(self) -> pl.DataFrame:
        """`table` for polars."""
        import polars as pl

        return pl.DataFrame(pl.from_arrow(self.table))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, without reading it."""
        return tuple(self._record["arrays"][name]["shape"])

    def array(self, name: str, rows: slice = slice(None)) -> Array:
        """One array, or some rows of it: only the chunks that hold them are read. Raises KeyError for a wrong name."""
        import zarr

        if name not in self._record["arrays"]:
            raise KeyError(f"{name}: slide {self.slide_id} has {', '.join(self.names)}")
        self._read(f"{name}/{GROUP_FILE}")
        # zarr takes a missing object for zeros.
        for file, recorded in self._record["files"].items():
            if file.startswith(f"{name}/"):
                path = self.folder / file
                size = path.stat().st_size if path.is_file() else -1
                if size != recorded["bytes"]:
                    found = f"has {size} bytes" if size >= 0 else "is missing"
                    raise damaged(self.folder, f"{file} {found}, expected {recorded['bytes']} bytes")
        try:
            return np.asarray(zarr.open_array(self.folder / name, mode="r", zarr_format=3)[rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise damaged(self.folder, f"{name} cannot be read: {error}") from error

    if TYPE_CHECKING:
        embedding: Array
        xy0: Array

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name not in self._record["arrays"]:
            raise AttributeError(f"{type(self).__name__} has no attribute or array {name!r}")
        return self.array(name)


class Store(Mapping[str, SlideEmbeddings]):
    """A finished store: slide_id -> its embeddings, in the order of the ids.

    `meta` is the identity it was begun with: encoder, digest of the weights, normalisation, spacing, source, versions.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.meta: dict[str, Any] = content["identity"]
        self.digest: str = content["digest"]
        self.failures: list[dict[str, str]] = content["failures"]
        self.num_rows: int = content["counts"]["rows"]
        self._slides = {slide["slide_id"]: slide for slide in content["slides"]}

    def __getitem__(self, slide_id: str) -> SlideEmbeddings:
        if slide_id not in self._slides:
            reasons = [failure["reason"] for failure in self.failures if failure["slide_id"] == slide_id]
            raise KeyError(f"{slide_id}: {reasons[0] if reasons else 'no such slide'} ({self.path})")
        folder = self.path / SLIDES / folder_name(slide_id)
        return SlideEmbeddings(folder, slide_id, self._slides[slide_id]["sha256"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._slides)

    def __len__(self) -> int:
        return len(self._slides)

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self._slides

    @property
    def rows(self) -> pl.DataFrame:
        """The rows of all slides, one after the other."""
        import polars as pl

        path = self.path / ROWS_FILE
        try:
            rows = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise StoreDamagedError(f"{path} cannot be read: {error}") from None
        if len(rows) > self.num_rows:  # slides are being added
            rows = rows.filter(pl.col("slide_id").is_in(list(self._slides)))
        if len(rows) != self.num_rows:
            raise StoreDamagedError(f"{path} has {len(rows)} rows, {STORE_FILE} says {self.num_rows}")
        return rows


def open_store(path: Path | str) -> Store:
    """Open a finished store for reading.

    Raises ValueError where it is unfinished or of a newer format, StoreDamagedError where store.json is damaged.
    """
    return Store(Path(path), read_meta(Path(path)))
