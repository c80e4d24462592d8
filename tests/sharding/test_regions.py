"""Regions: squares of patches that are kept, or left, as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sharding.index import FLAG_PARTIAL_REGION
from sharding.stage import SlideJob
from sharding.synth import SlideSpec, paint_slide
from sharding.verify import verify_dataset

MakeJob = Callable[..., SlideJob]
Regions = dict[int, list[dict[str, Any]]]


def regions_of(table: Any) -> Regions:
    found: Regions = {}
    for row in table.to_pylist():
        found.setdefault(row["region"], []).append(row)
    return found


def partial(rows: list[dict[str, Any]]) -> set[bool]:
    return {bool(row["flags"] & FLAG_PARTIAL_REGION) for row in rows}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 10 x 8 patches of 128 px: with regions of 4 its last two columns are half of a region."""
    folder = tmp_path_factory.mktemp("uneven")
    spec = SlideSpec(seed=12, width_px=1280, height_px=1024)
    paint_slide(spec, folder)
    return folder / f"{spec.slide_id}.svs"


@pytest.mark.parametrize("min_tissue", [0.0, 0.4])
def test_a_region_is_whole_or_flagged_and_lies_on_its_own_grid(
    min_tissue: float, uneven: Path, make_job: MakeJob, run_slide: Any, rows_of: Any, tmp_path: Path
) -> None:
    record = run_slide(make_job(uneven, tmp_path, region_patches=4, min_tissue=min_tissue))
    found = regions_of(rows_of(tmp_path, record))
    assert None not in found
    assert all(0 <= region < 2**63 for region in found)
    places = set()
    for rows in found.values():
        down, across = rows[0]["row"] // 4, rows[0]["col"] // 4
        places.add((down, across))
        columns = range(across * 4, min(across * 4 + 4, 10))
        assert {(row["row"], row["col"]) for row in rows} == {
            (r, c) for r in range(down * 4, down * 4 + 4) for c in columns
        }
        assert partial(rows) == {across == 2}
        # The region as a whole decides, each patch keeps its own share.
        assert sum(row["tissue_fraction"] for row in rows) / len(rows) >= min_tissue - 1e-6
    assert len(places) == len(found)
    if min_tissue == 0.0:
        assert places == {(down, across) for down in range(2) for across in range(3)}
        assert record.patches == 80
    else:
        assert 0 < len(places) < 6
        assert min(row["tissue_fraction"] for rows in found.values() for row in rows) < min_tissue


def test_without_regions_the_column_is_empty(
    slides: Any, make_job: MakeJob, run_slide: Any, rows_of: Any, tmp_path: Path
) -> None:
    table = rows_of(tmp_path, run_slide(make_job(slides["plain"], tmp_path)))
    assert table["region"].null_count == table.num_rows > 0
    assert partial(table.to_pylist()) == {False}


def test_regions_of_two_slides_and_of_two_sizes_have_other_ids(
    slides: Any, make_job: MakeJob, run_slide: Any, rows_of: Any, tmp_path: Path
) -> None:
    ids: list[set[int]] = []
    for number, (name, side) in enumerate([("plain", 4), ("single", 4), ("plain", 2), ("plain", 4)]):
        job = make_job(slides[name], tmp_path / str(number), region_patches=side, min_tissue=0.0)
        ids.append(set(rows_of(tmp_path / str(number), run_slide(job))["region"].to_pylist()))
    assert ids[0] == ids[3]
    assert not ids[0] & ids[1]
    assert not ids[0] & ids[2]


@pytest.mark.parametrize("options", [{"context_px": 128, "stride_px": 128}, {"context_px": 256, "stride_px": 256}])
def test_a_damaged_patch_flags_the_rest_of_its_region(
    options: dict[str, Any],
    slides: Any,
    make_job: MakeJob,
    run_slide: Any,
    rows_of: Any,
    damage_tile: Callable[..., Path],
    tmp_path: Path,
) -> None:
    side = 512 // options["context_px"]
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, "zeroed")
    job = make_job(path, tmp_path / "out", region_patches=side, min_tissue=0.0, **options)
    record = run_slide(job)
    assert record.patches_quarantined == (256 // options["context_px"]) ** 2
    found = regions_of(rows_of(tmp_path / "out", record))
    assert len(found) == 4
    for rows in found.values():
        # The damaged tile is in the lower left one.
        assert partial(rows) == {rows[0]["row"] // side == 1 and rows[0]["col"] // side == 0}


@pytest.mark.parametrize("how", ["no SOI", "no bytes"])
@pytest.mark.parametrize("permute", ["slide", "global"])
def test_a_patch_that_cannot_be_copied_flags_the_rest_of_its_region(
    how: str,
    permute: str,
    slides: Any,
    make_dataset: Any,
    damage_tile: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Whether it was seen when the slide was staged or not before it was copied."""
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, how)
    options: dict[str, Any] = {"context_px": 256, "stride_px": 256, "region_patches": 2, "min_tissue": 0.0}
    tables = []
    for checked in (True, False):
        out = tmp_path / str(checked)
        listed = {"bad": path, "whole": slides["single"]}
        make_dataset(out, listed, check_tiles=checked, patch_flags=False, permute=permute, **options)
        tables.append(pq.read_table(out / "index.parquet"))
        assert verify_dataset(out)["ok"]
    assert tables[0].equals(tables[1])
    rows = [row for row in tables[0].to_pylist() if row["slide_id"] == "bad"]
    broken = [row for row in rows if row["row"] // 2 == 1 and row["col"] // 2 == 0]
    assert len(broken) == 3
    assert partial(broken) == {True}
    assert partial([row for row in rows if row not in broken]) == {False}


@pytest.mark.parametrize("mode", ["group", "global"])
def test_how_patches_are_permuted_changes_no_region(
    mode: str, slides: Any, uneven: Path, make_dataset: Any, tmp_path: Path
) -> None:
    listed = {"a": slides["plain"], "b": slides["single"], "c": uneven}
    options: dict[str, Any] = {"region_patches": 4, "min_tissue": 0.3, "group_slides": 2}
    columns = ["sample_id", "slide_id", "row", "col", "region", "flags", "tissue_fraction"]
    tables = []
    for permute in ("slide", mode):
        make_dataset(tmp_path / permute, listed, permute=permute, **options)
        table = pq.read_table(tmp_path / permute / "index.parquet", columns=columns)
        tables.append(table.sort_by("sample_id"))
    assert tables[0].equals(tables[1])
    assert tables[0].num_rows > 30
