from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch

from engine.data import Augment, Balance, Blocks, CropView, Ect, SampleStream, open_loader
from engine.data.draws import uniforms
from engine.data.views import CROP_DRAWS, crop_windows

SIDE = 2
# (row, col) of each patch: three regions of 2 x 2 cells, shuffled; the middle one lacks its lower left patch.
CELLS = [(1, 3), (0, 0), (5, 4), (1, 1), (0, 2), (4, 5), (1, 0), (0, 3), (4, 4), (0, 1), (5, 5)]
REGIONS = {(0, 0): 70, (0, 1): 20, (2, 2): 50}
MISSING = (1, 2)
ORDERED = [  # by region number, row by row
    [4, 7, -1, 0],  # 20
    [8, 5, 2, 10],  # 50
    [1, 9, 6, 3],  # 70
]


def write_index(path: Path, cells: list[tuple[int, int]]) -> None:
    regions = [REGIONS[row // SIDE, col // SIDE] for row, col in cells]
    columns = {
        "row": pa.array([row for row, _ in cells], pa.int32()),
        "col": pa.array([col for _, col in cells], pa.int32()),
        "region": pa.array(regions, pa.int64()),
    }
    pq.write_table(pa.table(columns), path / "index.parquet")
    meta = json.loads((path / "dataset.json").read_text())
    del meta["digest"]
    meta["recipe"]["region_patches"] = SIDE
    digested = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    meta["digest"] = hashlib.sha256(digested.encode()).hexdigest()
    (path / "dataset.json").write_text(json.dumps(meta))


@pytest.fixture
def regions(make_dataset: Any, paint: Any) -> Any:
    made = make_dataset([paint(row, 96) for row in range(len(CELLS))])
    write_index(made.path, CELLS)
    return made


def open_regions(dataset: Any, backend: Any, views: Any, batch_size: int = 2, **options: Any) -> Any:
    merged: dict[str, Any] = {"seed": 4, "threads": 2, "device": "cpu"} | options
    return open_loader(dataset.path, batch_size_per_rank=batch_size, views=views, backend=backend, **merged)


def test_a_sample_is_a_region_row_by_row(regions: Any, backend: Any) -> None:
    view = CropView(40, output="uint8", region="padded")
    with open_regions(regions, backend, [view]) as loader:
        batches = [next(loader) for _ in range(3)]
        assert loader.seen == 6
    order = SampleStream(3, seed=4).rows(0, 6)
    assert torch.cat([batch.rows for batch in batches]).tolist() == [ORDERED[region] for region in order]
    windows = crop_windows(view, uniforms(4, np.arange(6), 0, CROP_DRAWS), 96, 96)
    for number, batch in enumerate(batches):
        assert batch.images[0].shape == (2, 4, 3, 40, 40)
        assert torch.equal(batch.present, batch.rows >= 0)
        for inside, rows in enumerate(batch.rows.tolist()):
            position = 2 * number + inside
            x0, y0 = windows.x0[position], windows.y0[position]
            axes = [axis for axis, flip in ((2, windows.flip_x), (1, windows.flip_y)) if flip[position]]
            for image, sample_id, row in zip(
                batch.images[0][inside], batch.sample_ids[inside].tolist(), rows, strict=True
            ):
                if row < 0:
                    assert sample_id == 0
                    assert not image.any()
                    continue
                assert sample_id == int(regions.keys[row], 16)
                patch = torch.from_numpy(simplejpeg.decode_jpeg(regions.payloads[row])).permute(2, 0, 1)
                assert torch.equal(image, patch[:, y0 : y0 + 40, x0 : x0 + 40].flip(axes))


def test_the_patches_of_a_region_are_changed_alike(regions: Any, make_dataset: Any, paint: Any, backend: Any) -> None:
    view = CropView(40, rotations=True, ect=Ect(), augment=Augment(jitter=1.0), region="padded")
    same = make_dataset([paint(1, 96)] * len(CELLS))
    write_index(same.path, CELLS)
    with open_regions(same, backend, [view], 3) as loader:
        batch = next(loader)
    for images, present in zip(batch.images[0], batch.present, strict=True):
        assert all(torch.equal(images[0], image) for image in images[present])
    assert not torch.equal(batch.images[0][0, 0], batch.images[0][1, 0])


def test_ranks_together_deliver_the_same_regions(regions: Any, backend: Any) -> None:
    view = CropView(40, region="padded")
    with open_regions(regions, backend, [view]) as loader:
        alone = [next(loader) for _ in range(3)]
    for rank in range(2):
        with open_regions(regions, backend, [view], 1, rank=rank, world_size=2, seen=2) as loader:
            for batch in alone[1:]:
                part = next(loader)
                assert part.rows.tolist() == batch.rows[rank : rank + 1].tolist()
                assert torch.equal(part.images[0], batch.images[0][rank : rank + 1])


def test_partial_regions_are_refused_unless_they_are_padded(regions: Any, make_dataset: Any, paint: Any) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 regions .* lack patches"):
        open_regions(regions, "torch", [CropView(40, region="whole")])
    cells = [*CELLS, MISSING]
    whole = make_dataset([paint(row, 96) for row in range(len(cells))])
    write_index(whole.path, cells)
    with open_regions(whole, "torch", [CropView(40, region="whole")], 3) as loader:
        assert next(loader).present.all()


def test_impossible_requests_are_refused(regions: Any, dataset: Any) -> None:
    with pytest.raises(ValueError, match="has no regions"):
        open_regions(dataset, "torch", [CropView(40, region="padded")])
    with pytest.raises(ValueError, match="views of one loader show the same"):
        open_regions(regions, "torch", [CropView(40), CropView(40, region="padded")])
    with pytest.raises(ValueError, match="'whole' or 'padded'"):
        CropView(40, region="half")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"where": "row > 0"}, {"bad_samples": "replace"}, {"locality": Blocks()}, {"balance": Balance("region")}],
    ids=lambda options: next(iter(options)),
)
def test_regions_go_with_no_other_choice_of_rows(options: dict[str, Any], regions: Any, backend: Any) -> None:
    with pytest.raises(ValueError, match="views of regions take one dataset as it is"):
        open_regions(regions, backend, [CropView(40, region="padded")], **options)
