"""`engine export`: a store in the layouts that other programs read. FORMAT.md says what is in each."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.console import progress
from engine.figures import as_count
from engine.stores.checks import Array, difference
from engine.stores.layout import ROWS_FILE, folder_name
from engine.stores.zarr_store import SlideEmbeddings, Store, open_store
from sharding.atomic import atomic_path, sweep_temporary, write_json
from sharding.index import canonical_digest
from sharding.lock import folder_lock

Format = Literal["hipt_pt", "hipt_region_pt", "clam_h5", "parquet"]
Order = Literal["store", "name"]
FORMATS: tuple[Format, ...] = get_args(Format)
ORDERS: tuple[Order, ...] = get_args(Order)
RECORD_FILE = "export.json"
PARQUET_FILE = "embeddings.parquet"
_BUFFER_BYTES = 1 << 28
# Spacings below these (um/px) are taken for these magnifications: TRIDENT's rule.
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


def run(
    store: Path,
    out: Path,
    *,
    format: str,
    slides: Iterable[str] | None = None,
    array: str = "embedding",
    order: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write slides of a store into the folder `out`; run again, it goes on where it stopped.

    Args:
        format: hipt_pt, hipt_region_pt, clam_h5 or parquet.
        slides: ids; None is all.
        array: which array of the store.
        order: of a slide's rows: `store`, or `name`, the alphabetical order of "X_Y" (level-0 pixels), by which HIPT's
            readers join; None is `name` for hipt_pt, else `store`.
        overwrite: replace what another export left in `out`.

    Returns {store, format, out, slides, files}; `files` counts those with embeddings.
    Raises ValueError for a wrong name, an array of the wrong shape, or an `out` that holds something else.
    """
    if format not in FORMATS:
        raise ValueError(f"--format {format}: expected {', '.join(FORMATS)}.")
    order = order or ("name" if format == "hipt_pt" else "store")
    if order not in ORDERS:
        raise ValueError(f"--order {order}: expected {' or '.join(ORDERS)}.")
    opened = open_store(store)
    names = _chosen(opened, slides)
    _check(opened[names[0]], format, array)
    settings = {"format": format, "array": array, "order": order, "identity": canonical_digest(opened.meta)}
    if format == "parquet":
        settings["slides"] = canonical_digest([[name, opened[name].sha256] for name in names])
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out), progress("export", len(names), "slides") as advance:
        _begin(out, settings, overwrite)
        each = _told(opened, names, format, array, advance)
        if format == "parquet":
            files = _write_parquet(each, out, pq.read_schema(store / ROWS_FILE), array, order)
        elif format == "clam_h5":
            files = sum(_write_h5(slide, opened, out, array, order) for slide in each)
        elif format == "hipt_pt":
            files = sum(_write_pt(slide, out, array, order) for slide in each)
            places = _places(map(opened.__getitem__, names), order)
            _write_csv(out / "regions.csv", ("slide_id", "row", "x", "y"), places)
        else:
            files = sum(_write_region_pt(slide, out, array) for slide in each)
            places = _region_files(map(opened.__getitem__, names))
            _write_csv(out / "region_features.csv", ("feature_path", "slide_id", "x", "y"), places)
    return {"store": str(store), "format": format, "out": str(out), "slides": len(names), "files": files}


def describe(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    return (
        f"{as_count(result['slides'], 'slide')} of {result['store']} as {result['format']}: "
        f"{as_count(result['files'], 'file')} in {result['out']}"
    )


def slide_names(text: str) -> list[str]:
    """The ids in `text`: with commas between, or those of a CSV file's column slide_id."""
    if not text.endswith(".csv"):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        with open(text, newline="", encoding="utf-8-sig") as file:
            return [row["slide_id"] for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise ValueError(f"--slides {text}: there is no such file.") from None
    except KeyError:
        raise ValueError(f"--slides {text}: it has no column slide_id.") from None


def _told(
    store: Store, names: list[str], format: str, array: str, advance: Callable[[int, str], None]
) -> Iterator[SlideEmbeddings]:
    for name in names:
        slide = store[name]
        _check(slide, format, array)
        yield slide
        advance(1, name)


def _chosen(store: Store, slides: Iterable[str] | None) -> list[str]:
    names = list(store) if slides is None else list(dict.fromkeys(slides))
    unknown = [name for name in names if name not in store]
    if unknown:
        raise ValueError(f"--slides: {store.path} has no slide {unknown[0]} ({len(unknown)} of {len(names)} unknown).")
    if not names:
        raise ValueError(f"{store.path}: there is no slide to export.")
    return names


def _check(slide: SlideEmbeddings, format: str, array: str) -> None:
    """Refuse an array that is not there, or that the format cannot hold."""
    fits = {"hipt_pt": (2, 3), "hipt_region_pt": (3,), "clam_h5": (2,), "parquet": (2, 3)}[format]
    shapes = {name: slide.shape(name) for name in slide.names}
    if len(shapes.get(array, ())) not in fits:
        found = f"{array} is {list(shapes[array])}" if array in shapes else f"there is no array {array}"
        others = [name for name, shape in shapes.items() if len(shape) in fits and name not in ("xy0", "present")]
        advice = f"give --array {' or '.join(others)}" if others else "no array of the store fits, use another format"
        raise ValueError(
            f"slide {slide.slide_id}: {found}, {format} takes {' or '.join(map(str, fits))} dimensions: {advice}."
        )


def _begin(out: Path, settings: dict[str, str], overwrite: bool) -> None:
    """Make sure that what lies in `out` is a part of this export; refuse anything else, or remove another export."""
    record = out / RECORD_FILE
    if record.exists():
        other = difference(json.loads(record.read_text(encoding="utf-8")), settings)
        if overwrite:
            for pattern in ("*.pt", "*.h5", "*.csv", PARQUET_FILE):
                for path in out.glob(pattern):
                    path.unlink()
        elif other is not None:
            key, found, expected = other
            raise ValueError(
                f"{out} holds another export ({key} was {found}, now it is {expected}): give another --out, or "
                "--overwrite to replace it."
            )
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} holds files that are no export of a store: give another --out.")
    write_json(record, settings)
    sweep_temporary(out)


def _ordered(slide: SlideEmbeddings, order: str) -> npt.NDArray[np.int64]:
    """The positions of a slide's rows in the order that is asked for."""
    xy0 = slide.xy0
    if order == "store":
        return np.arange(len(xy0))
    return np.array(sorted(range(len(xy0)), key=lambda row: f"{xy0[row, 0]}_{xy0[row, 1]}"), np.int64)


def _write_pt(slide: SlideEmbeddings, out: Path, array: str, order: str) -> int:
    path = out / f"{folder_name(slide.slide_id)}.pt"
    if not path.exists():
        _save_tensor(slide.array(array)[_ordered(slide, order)], path)
    return 1


def _write_region_pt(slide: SlideEmbeddings, out: Path, array: str) -> int:
    paths = [out / name for name in _region_names(slide)]
    missing = [row for row, path in enumerate(paths) if not path.exists()]
    values = slide.array(array) if missing else None
    for row in missing:
        assert values is not None
        _save_tensor(values[row], paths[row])
    return len(paths)


def _region_names(slide: SlideEmbeddings) -> list[str]:
    names = [f"{folder_name(slide.slide_id)}_{x}_{y}.pt" for x, y in slide.xy0.tolist()]
    if len(set(names)) < len(names):
        raise ValueError(f"slide {slide.slide_id}: two of its rows lie at the same place, their files would be one.")
    return names


def _save_tensor(values: Array, path: Path) -> None:
    import torch

    # By way of a file: given a path, torch writes its name, which is a temporary one, into the file.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(torch.from_numpy(values.astype(np.float32)), file)


def _write_h5(slide: SlideEmbeddings, store: Store, out: Path, array: str, order: str) -> int:
    import h5py

    path = out / f"{folder_name(slide.slide_id)}.h5"
    if path.exists():
        return 1
    rows = _ordered(slide, order)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        features = file.create_dataset("features", data=slide.array(array)[rows].astype(np.float32))
        features.attrs.update({"name": slide.slide_id, "encoder": _encoder_name(store)})
        coords = file.create_dataset("coords", data=slide.xy0[rows].astype(np.int64))
        coords.attrs.update({"name": slide.slide_id, **_patch_attributes(slide, store.meta)})
    return 1


def _encoder_name(store: Store) -> str:
    encoder = store.meta.get("encoder", "")
    return encoder if isinstance(encoder, str) else json.dumps(encoder, sort_keys=True)


def _patch_attributes(slide: SlideEmbeddings, identity: Mapping[str, Any]) -> dict[str, int]:
    """What CLAM and TRIDENT say of a slide's patches, as far as attributes, rows and the store's identity tell."""
    known, table = slide.attributes, slide.table
    values = {
        name: table[name].unique().to_pylist() for name in ("level", "read_px", "mpp") if name in table.schema.names
    }
    read = {name: found[0] for name, found in values.items() if len(found) == 1}
    recipe = (identity.get("patches") or {}).get("recipe") or {}
    context_px, stride_px = recipe.get("context_px"), recipe.get("stride_px")
    is_region = "patches" in table.schema.names
    if is_region and stride_px and recipe.get("region_patches"):
        step_px = patch_px = stride_px * recipe["region_patches"]
    else:
        step_px, patch_px = stride_px, context_px or (None if is_region else read.get("read_px"))
    patch_px = known.get("patch_px", patch_px)
    patch_px0 = known.get("patch_px0")
    if patch_px0 is None:
        step_px0 = _step_px0(slide)
        if step_px0 and step_px and patch_px:
            patch_px0 = step_px0 * patch_px / step_px
        elif read.get("level") == 0 and not is_region:
            patch_px0 = read.get("read_px")
    mpp, mpp0 = read.get("mpp"), known.get("mpp0")
    if mpp0 is None and mpp and patch_px and patch_px0:
        mpp0 = mpp * patch_px / patch_px0
    found = {
        "patch_size": patch_px,
        "patch_size_level0": patch_px0,
        # CLAM reads patch_size pixels of patch_level: that holds where nothing was resampled.
        "patch_level": read.get("level") if read.get("read_px") == (context_px or patch_px) else None,
        "overlap": known.get("overlap_px", patch_px - step_px if patch_px and step_px else None),
        "target_magnification": _magnification(mpp),
        "level0_magnification": _magnification(mpp0),
        "level0_width": known.get("width_px0"),
        "level0_height": known.get("height_px0"),
    }
    return {name: round(value) for name, value in found.items() if value is not None}


def _step_px0(slide: SlideEmbeddings) -> float | None:
    """Level-0 pixels from a cell of the grid to the next; None where the rows tell no cells, or only one."""
    table, xy0 = slide.table, slide.xy0
    for name, axis in (("col", 0), ("row", 1)):
        if name in table.schema.names and len(xy0):
            cells = table[name].to_numpy()
            first, last = cells.argmin(), cells.argmax()
            if cells[last] > cells[first]:
                return float(xy0[last, axis] - xy0[first, axis]) / float(cells[last] - cells[first])
    return None


def _magnification(mpp: float | None) -> int | None:
    return next((power for limit, power in _MAGNIFICATIONS if mpp is not None and mpp < limit), None)


def _write_parquet(slides: Iterable[SlideEmbeddings], out: Path, rows: pa.Schema, array: str, order: str) -> int:
    """One file of all slides. `rows` are the columns of the store's rows."""
    path = out / PARQUET_FILE
    if path.exists():
        return 1
    with atomic_path(path) as temporary, contextlib.ExitStack() as stack:
        writer = None
        waiting, waiting_bytes = [], 0
        for slide in slides:
            table = _as_table(slide, rows, array, order)
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd"))
            waiting.append(table)
            waiting_bytes += table.nbytes
            if waiting_bytes >= _BUFFER_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, waiting_bytes = [], 0
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting))
    return 1


def _as_table(slide: SlideEmbeddings, rows: pa.Schema, array: str, order: str) -> pa.Table:
    """slide_id, x0, y0, what else the rows say, and the embedding as fixed-size lists of float32."""
    table = pa.concat_tables([rows.empty_table(), slide.table], promote_options="permissive")
    xy0 = slide.xy0
    values = slide.array(array)
    lists = pa.array(values.astype(np.float32).ravel())
    for size in reversed(values.shape[1:]):
        lists = pa.FixedSizeListArray.from_arrays(lists, size)
    columns = {"slide_id": table["slide_id"], "x0": pa.array(xy0[:, 0]), "y0": pa.array(xy0[:, 1])}
    columns |= {name: table[name] for name in table.column_names if name not in (*columns, array)}
    return pa.table({**columns, array: lists}).take(pa.array(_ordered(slide, order)))


def _write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _places(slides: Iterable[SlideEmbeddings], order: str) -> Iterator[tuple[Any, ...]]:
    for slide in slides:
        for row, (x, y) in enumerate(slide.xy0[_ordered(slide, order)].tolist()):
            yield slide.slide_id, row, x, y


def _region_files(slides: Iterable[SlideEmbeddings]) -> Iterator[tuple[Any, ...]]:
    for slide in slides:
        for name, (x, y) in zip(_region_names(slide), slide.xy0.tolist(), strict=True):
            yield name, slide.slide_id, x, y
