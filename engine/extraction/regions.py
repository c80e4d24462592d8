"""Patches of a slide, grouped into its regions: which patch lies where in which region, and where the region lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sharding.index import FLAG_PARTIAL_REGION


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of a slide, by (row, col) of the grid of regions.

    places: int64 [R, side^2], row-major: the patch that lies there, -1 where there is none. xy0: int32 [R, 2], the top
    left of the region. rows: R rows: region, row, col (of the grid of regions), patches, and of its patches level,
    read_px, mpp, flags (all of theirs together) and tissue_fraction (the mean).
    """

    places: npt.NDArray[np.int64]
    xy0: npt.NDArray[np.int32]
    rows: pa.Table


def grouped(rows: pa.Table, xy0: npt.NDArray[np.int32], side: int, partial: Literal["mask", "pad", "drop"]) -> Regions:
    """Group patches (`rows` with their columns, `xy0` int32 [M, 2]) into regions of side x side.

    A region is a cell of the grid of patches divided by `side`; partial ones are left out with partial=drop.
    """
    row, col, ids = (rows.column(name).to_numpy(zero_copy_only=False) for name in ("row", "col", "region"))
    cells = np.stack([row // side, col // side], axis=1)
    found, number = np.unique(cells, axis=0, return_inverse=True)
    number = number.reshape(-1)
    places = np.full((len(found), side**2), -1, np.int64)
    places[number, row % side * side + col % side] = np.arange(len(row))
    if partial == "drop":
        whole = (places >= 0).all(axis=1)
        found, places = found[whole], places[whole]
    step = _step(col, xy0[:, 0]) or _step(row, xy0[:, 1]) or float(rows.column("read_px")[0].as_py())
    corner = np.stack(
        [_at(found[:, 1] * side, col, xy0[:, 0], step), _at(found[:, 0] * side, row, xy0[:, 1], step)], axis=1
    )
    present = places >= 0
    counts = present.sum(axis=1)
    first = places.max(axis=1)  # any patch of the region

    def of_patches(name: str) -> npt.NDArray[np.float64]:
        values = rows.column(name).to_numpy(zero_copy_only=False)[places].astype(np.float64)
        return np.where(present, values, 0)

    flags = np.where(present, rows.column("flags").to_numpy()[places], 0)
    table = pa.table(
        {
            "region": pa.array(ids[first].astype(np.int64)),
            "row": pa.array(found[:, 0].astype(np.int32)),
            "col": pa.array(found[:, 1].astype(np.int32)),
            "patches": pa.array(counts.astype(np.int32)),
            **{name: rows.column(name).combine_chunks().take(pa.array(first)) for name in ("level", "read_px", "mpp")},
            "tissue_fraction": pa.array((of_patches("tissue_fraction").sum(axis=1) / counts).astype(np.float32)),
            "flags": pa.array(np.bitwise_or.reduce(flags, axis=1).astype(np.uint32)),
        }
    )
    missing = counts < side**2
    stated = np.where(missing, table.column("flags").to_numpy() | FLAG_PARTIAL_REGION, table.column("flags").to_numpy())
    at = table.schema.get_field_index("flags")
    return Regions(places, corner, table.set_column(at, "flags", pa.array(stated.astype(np.uint32))))


def _step(cells: npt.NDArray[np.int32], px0: npt.NDArray[np.int32]) -> float | None:
    """Level-0 pixels between neighbouring lines of the grid; None where there is one line."""
    first, last = cells.argmin(), cells.argmax()
    return float((px0[last] - px0[first]) / (cells[last] - cells[first])) if cells[last] > cells[first] else None


def _at(
    wanted: npt.NDArray[np.int32], cells: npt.NDArray[np.int32], px0: npt.NDArray[np.int32], step: float
) -> npt.NDArray[np.int32]:
    """Level-0 coordinates of grid lines: those of patches that begin there, else counted from the nearest such line."""
    known, where = np.unique(cells, return_index=True)
    nearest = np.abs(known[None, :] - wanted[:, None]).argmin(axis=1)
    exact = px0[where[nearest]] + step * (wanted - known[nearest])
    return np.floor(exact + 0.5).astype(np.int32)
