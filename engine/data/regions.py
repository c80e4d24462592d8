"""Regions as samples: the n x n patches of one region, in row-major order, where a dataset was sharded in regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.data.views import CropView
from sharding.index import Dataset


def patches_per_sample(dataset: Dataset, views: Sequence[CropView]) -> int:
    """Return n * n for views of regions of n x n patches, 1 for views of patches.

    Raises ValueError where the views do not agree on which they are, or the dataset has no regions.
    """
    kinds = {view.region for view in views}
    if len(kinds) > 1:
        raise ValueError(f"views of one loader show the same: region is {[view.region for view in views]}")
    if kinds == {None}:
        return 1
    side = dataset.meta["recipe"].get("region_patches")
    if side is None:
        raise ValueError(f"{dataset.name} has no regions: shard with region_patches, or leave out the views' region")
    return int(side) ** 2


def region_rows(dataset: Dataset, views: Sequence[CropView]) -> npt.NDArray[np.int64] | None:
    """Return the rows of every region, int64[regions, n * n], -1 where a patch is missing; None for views of patches.

    Regions are in the order of their numbers; 8 bytes a patch. Raises ValueError for partial regions, unless the
    views pad them.
    """
    per_region = patches_per_sample(dataset, views)
    if per_region == 1:
        return None
    import pyarrow.parquet as pq

    side = int(dataset.meta["recipe"]["region_patches"])
    table = pq.read_table(dataset.file("index.parquet"), columns=["region", "row", "col"])
    row, col = (table.column(name).to_numpy() % side for name in ("row", "col"))
    numbers, region = np.unique(table.column("region").to_numpy(), return_inverse=True)
    rows = np.full((len(numbers), per_region), -1, dtype=np.int64)
    rows[region, row * side + col] = np.arange(table.num_rows)
    num_partial = int((rows < 0).any(axis=1).sum())
    if num_partial and views[0].region == "whole":
        raise ValueError(
            f"{num_partial} of {len(rows)} regions of {dataset.name} lack patches (the slide ends inside them, or "
            "patches are damaged): use region='padded', which says what is there"
        )
    return rows
