"""Whether datasets hold what views show, and regions as samples: the n x n patches of one, in row-major order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.data.locality import Blocks
from engine.data.reading import patch_px
from engine.data.selection import Selection
from engine.data.views import CropView
from sharding.index import Dataset

BadSamples = Literal["fail", "replace"]


def check_views(
    datasets: Sequence[Dataset],
    views: Sequence[CropView],
    *,
    locality: Blocks | None = None,
    bad_samples: BadSamples = "fail",
) -> None:
    """Raise ValueError where the datasets' patches or regions are not what the views need. Nothing is read."""
    if not views:
        raise ValueError("views is empty: a loader delivers at least one view of each sample")
    side_px = patch_px(datasets)
    for view in views:
        view.check_fits(side_px, side_px)
    if patches_per_sample(datasets, views) > 1:
        if locality is not None:
            raise ValueError("locality is for patches: the patches of a region are read together as it is")
        if bad_samples == "replace" and views[0].region == "whole":
            raise ValueError(
                "bad_samples='replace' leaves bad patches out of their regions, and region='whole' takes none with "
                "gaps: use region='padded', or bad_samples='fail'"
            )


def patches_per_sample(datasets: Sequence[Dataset], views: Sequence[CropView]) -> int:
    """Return n * n for views of regions of n x n patches, 1 for views of patches.

    Raises ValueError where the views do not agree on which they are, or a dataset has no regions or others.
    """
    kinds = {view.region for view in views}
    if len(kinds) > 1:
        raise ValueError(f"views of one loader show the same: region is {[view.region for view in views]}")
    if kinds == {None}:
        return 1
    sides = [dataset.meta["recipe"].get("region_patches") for dataset in datasets]
    for dataset, side in zip(datasets, sides, strict=True):
        if side is None:
            raise ValueError(
                f"{dataset.name} has no regions: shard with region_patches, or leave out the views' region"
            )
        if side != sides[0]:
            raise ValueError(
                f"{dataset.name} has regions of {side} x {side} patches, {datasets[0].name} of {sides[0]} x {sides[0]}:"
                " datasets that are loaded together need one region_patches"
            )
    return int(sides[0]) ** 2


def region_rows(
    datasets: Sequence[Dataset], views: Sequence[CropView], selected: npt.NDArray[np.signedinteger] | None = None
) -> npt.NDArray[np.int64] | None:
    """Return the rows of every region, int64[regions, n * n], -1 where a patch is missing; None for views of patches.

    selected: the rows that may occur (see `selection.Selection`); a patch that is left out is missing, and a region of
    which all are does not occur. Regions are in the order of their numbers, dataset after dataset; 8 bytes a patch.
    Raises ValueError for partial regions, unless the views pad them.
    """
    per_region = patches_per_sample(datasets, views)
    if per_region == 1:
        return None
    parts, first = [], 0
    for dataset in datasets:
        part = _regions_of(dataset)
        parts.append(np.where(part < 0, -1, part + first))
        first += dataset.num_rows
    rows = np.concatenate(parts)
    if selected is not None:
        kept = np.zeros(first + 1, dtype=bool)
        kept[selected] = True  # and never the last, which -1 stands for
        rows = np.where(kept[rows], rows, -1)
        rows = rows[rows.max(axis=1) >= 0]
    num_partial = int((rows < 0).any(axis=1).sum())
    if num_partial and views[0].region == "whole":
        raise ValueError(
            f"{num_partial} of {len(rows)} regions of {', '.join(dataset.name for dataset in datasets)} lack "
            "patches (the slide ends inside them, patches are damaged, or `where` leaves them out): use "
            "region='padded', which says what is there"
        )
    return rows


def region_classes(regions: npt.NDArray[np.int64], selection: Selection, by: str) -> npt.NDArray[np.uint32]:
    """Return the class of each region, uint32[regions]: that of its patches. Raises ValueError where they disagree."""
    assert selection.classes is not None
    of_row = np.zeros(int(regions.max()) + 1, np.uint32)
    of_row[slice(None) if selection.rows is None else selection.rows] = selection.classes
    classes = of_row[regions]
    # What is missing takes the class of a patch that is there.
    own = of_row[regions.max(axis=1)]
    if num_mixed := int(((classes != own[:, None]) & (regions >= 0)).any(axis=1).sum()):
        raise ValueError(
            f"{num_mixed} of {len(regions)} regions hold patches of several values of {by!r}: balance regions by what "
            "holds for a whole region, a column of slides.parquet for example"
        )
    return own


def _regions_of(dataset: Dataset) -> npt.NDArray[np.int64]:
    import pyarrow.parquet as pq

    side = int(dataset.meta["recipe"]["region_patches"])
    table = pq.read_table(dataset.file("index.parquet"), columns=["region", "row", "col"])
    row, col = (table.column(name).to_numpy() % side for name in ("row", "col"))
    numbers, region = np.unique(table.column("region").to_numpy(), return_inverse=True)
    rows = np.full((len(numbers), side**2), -1, dtype=np.int64)
    rows[region, row * side + col] = np.arange(table.num_rows)
    return rows
