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

from engine.data import Augment, BadSampleError, Balance, Blocks, CropView, Ect, SampleStream, open_loader
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


def describe(path: Path, cells: list[tuple[int, int]], *, prefix: str = "") -> None:
    """Add slides, one per region, to the tables: "20" and "70" of split train, classes x and y."""
    regions = [REGIONS[row // SIDE, col // SIDE] for row, col in cells]
    table = pq.read_table(path / "index.parquet")
    table = table.append_column("slide_id", pa.array([f"{prefix}{region}" for region in regions]))
    pq.write_table(table.append_column("tissue", pa.array(list(range(len(cells))))), path / "index.parquet")
    slides = [{"slide_id": prefix + name, "split": split, "class": of} for name, split, of in SLIDES]
    pq.write_table(pa.Table.from_pylist(slides), path / "slides.parquet")


SLIDES = [("20", "train", "x"), ("50", "test", "x"), ("70", "train", "y")]
PADDED = CropView(40, output="uint8", region="padded")


@pytest.fixture
def described(make_dataset: Any, paint: Any) -> Any:
    made = make_dataset([paint(row, 96) for row in range(len(CELLS))])
    write_index(made.path, CELLS)
    describe(made.path, CELLS)
    return made


def test_a_condition_selects_regions_and_their_patches(described: Any, backend: Any) -> None:
    with open_regions(described, backend, [PADDED], where="split = 'train'") as loader:
        rows = torch.cat([next(loader).rows for _ in range(2)]).tolist()
    of_train = [ORDERED[0], ORDERED[2]]
    assert rows == [of_train[place] for place in SampleStream(2, seed=4).rows(0, 4)]
    # One patch of region 20 is left, all of 70 but one, none of 50: the others are missing.
    left = [[-1, 7, -1, -1], [1, 9, 6, 3]]
    with open_regions(described, backend, [PADDED], where="tissue IN (7, 1, 9, 6, 3)") as loader:
        batch = next(loader)
    assert batch.rows.tolist() == [left[place] for place in SampleStream(2, seed=4).rows(0, 2)]
    assert torch.equal(batch.present, batch.rows >= 0)
    with pytest.raises(ValueError, match=r"1 of 2 regions .* `where` leaves them out"):
        open_regions(described, backend, [CropView(40, region="whole")], where="tissue IN (7, 1, 9, 6, 3)")


def test_regions_of_several_datasets_are_numbered_through(described: Any, make_dataset: Any, paint: Any) -> None:
    cells = [(1, 1), (0, 0), (0, 1), (1, 0)]
    other = make_dataset([paint(50 + row, 96) for row in range(4)])
    write_index(other.path, cells)
    describe(other.path, cells, prefix="other-")
    options: dict[str, Any] = {"batch_size_per_rank": 4, "views": [PADDED], "seed": 4, "device": "cpu"}
    with open_loader([described.path, other.path], backend="torch", **options) as loader:
        batch = next(loader)
    regions = [*ORDERED, [12, 13, 14, 11]]
    assert batch.rows.tolist() == [regions[place] for place in SampleStream(4, seed=4).rows(0, 4)]
    keys = described.keys + other.keys
    expected = [[int(keys[row], 16) if row >= 0 else 0 for row in region] for region in batch.rows.tolist()]
    assert batch.sample_ids.tolist() == expected
    meta = json.loads((other.path / "dataset.json").read_text())
    meta["recipe"]["region_patches"] = 4
    del meta["digest"]
    digested = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (other.path / "dataset.json").write_text(
        json.dumps(meta | {"digest": hashlib.sha256(digested.encode()).hexdigest()})
    )
    with pytest.raises(ValueError, match=r"regions of 4 x 4 patches, .* of 2 x 2"):
        open_loader([described.path, other.path], **options)


def test_regions_are_balanced_by_what_holds_for_all_of_their_patches(described: Any) -> None:
    with open_regions(described, "torch", [PADDED], 4, balance=Balance("class", {"x": 1, "y": 3})) as loader:
        batches = [sorted(next(loader).rows[:, 1].tolist()) for _ in range(2)]
    assert sorted(batches) == [[5, 9, 9, 9], [7, 9, 9, 9]]  # three times region 70, and 50 and 20 in turn
    with pytest.raises(ValueError, match="3 of 3 regions hold patches of several values of 'tissue'"):
        open_regions(described, "torch", [PADDED], balance=Balance("tissue"))


@pytest.mark.parametrize("found_by", ["reader", "decoder"])
def test_bad_patches_are_absent_from_their_regions_and_reported(
    described: Any, make_dataset: Any, backend: Any, found_by: str
) -> None:
    views = [PADDED, CropView(32, ect=Ect(), region="padded")]
    with open_regions(described, backend, views, 3) as loader:
        sound = [next(loader) for _ in range(2)]
    gone = {5, *ORDERED[2]}  # one of region 50, and region 70 altogether
    if found_by == "reader":
        for row in gone:
            described.overwrite(row, 100, bytes(200))
    else:  # with the right crc32
        whole = described.payloads
        described = make_dataset([data[: len(data) // 3] if row in gone else data for row, data in enumerate(whole)])
        write_index(described.path, CELLS)
        describe(described.path, CELLS)
    with open_regions(described, backend, views, 3) as loader, pytest.raises(BadSampleError):
        next(loader)
    with open_regions(described, backend, views, 3, bad_samples="replace") as loader:
        batches = [next(loader) for _ in range(2)]
        assert loader.seen == 6
        reported = [(each.position, each.row, each.substitute) for each in loader.replacements]
    epochs = SampleStream(3, seed=4).rows(0, 6).tolist()
    expected = [(at, row, None) for at, region in enumerate(epochs) for row in sorted(gone & set(ORDERED[region]))]
    assert reported == expected
    assert len(reported) == 10
    for batch, other in zip(batches, sound, strict=True):
        there = other.present & ~torch.isin(other.rows, torch.tensor(sorted(gone)))
        assert torch.equal(batch.present, there)
        assert torch.equal(batch.rows, torch.where(there, other.rows, -1))
        assert np.array_equal(batch.sample_ids, np.where(there, other.sample_ids, 0))
        for images, other_images in zip(batch.images, other.images, strict=True):
            assert torch.equal(images[there], other_images[there])
            assert not images[~there].any()


def test_what_regions_cannot_be_is_refused(described: Any, backend: Any) -> None:
    with pytest.raises(ValueError, match="locality is for patches"):
        open_regions(described, backend, [PADDED], locality=Blocks())
    with pytest.raises(ValueError, match="use region='padded', or bad_samples='fail'"):
        open_regions(described, backend, [CropView(40, region="whole")], bad_samples="replace")
