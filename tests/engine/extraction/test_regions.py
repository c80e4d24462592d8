"""hipt_4k: patches and regions equal the published way of computing them, and lie where their tissue lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import extract
from engine.extraction.regions import grouped
from engine.stores import open_store
from models.hipt import HIPT4K

SIDE = 3
CONFIG = {"patch": {"variant": "tiny", "depth": 1}, "region": {"in_dim": 192, "depth": 1}}
ENCODER = (
    "encoder.patch.variant=tiny",
    "encoder.patch.depth=1",
    "encoder.region.in_dim=192",
    "encoder.region.depth=1",
    "encoder.pos_interpolation=given",
    "weights=random",
    "outputs=global,local,mean256,concat",
)


def _whole_regions(patches: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """(row, col) of a region -> its pixels, white where a patch is missing, and which patches are there."""
    found = {}
    for down, across in sorted({(row // SIDE, col // SIDE) for row, col in patches}):
        pixels = np.full((SIDE * 256, SIDE * 256, 3), 255, np.uint8)
        present = np.zeros((SIDE, SIDE), bool)
        for i in range(SIDE):
            for j in range(SIDE):
                if (patch := patches.get((down * SIDE + i, across * SIDE + j))) is not None:
                    pixels[i * 256 : (i + 1) * 256, j * 256 : (j + 1) * 256] = patch
                    present[i, j] = True
        found[down, across] = pixels, present
    return found


def test_a_dry_run_reckons_with_regions_of_one_slide_each(
    regions_of: Path, make_extract: Any, plain: Any, tmp_path: Path
) -> None:
    result = extract.dry_run(
        make_extract(tmp_path / "store", *ENCODER, "outputs=global", dataset=regions_of, recipe="extract/hipt_4k")
    )
    least = sum(-(-len(patches) // SIDE**2) for patches in plain.stored_patches(regions_of).values())
    assert result["bytes"] == least * result["embedding"][0] * 2
    assert least > -(-result["patches"] // SIDE**2)  # else this would not tell it from regions across slides


@pytest.mark.parametrize("partial", ["mask", "pad", "drop"])
def test_regions_are_those_of_hipt_4k_on_their_pixels(
    partial: str, regions_of: Path, make_extract: Any, run_here: Any, plain: Any, tmp_path: Path
) -> None:
    recipe = make_extract(
        tmp_path / "store", *ENCODER, f"regions.partial={partial}", dataset=regions_of, recipe="extract/hipt_4k"
    )
    result = run_here(recipe)
    assert result["slides"]["quarantined"] == 0
    model = cast(HIPT4K, plain.model("hipt_4k", pos_interpolation="given", **CONFIG))
    num_partial = 0
    for slide_id, slide in open_store(tmp_path / "store").items():
        regions = _whole_regions(plain.stored_patches(regions_of)[slide_id])
        num_partial += sum(not present.all() for _, present in regions.values())
        if partial == "drop":
            regions = {place: region for place, region in regions.items() if region[1].all()}
        rows = slide.rows.to_dicts()
        assert [(row["row"], row["col"]) for row in rows] == sorted(regions)
        assert [row["patches"] for row in rows] == [int(present.sum()) for _, present in regions.values()]
        for number, (place, (pixels, present)) in enumerate(regions.items()):
            masked = partial == "mask" and not present.all()
            with torch.inference_mode():
                exact = model.features(
                    plain.normalised(pixels), mask=torch.from_numpy(present)[None] if masked else None
                )
            concat = np.concatenate([exact["cls4k"], exact["mean256"]], axis=1)
            plain.is_rounded(slide.embedding[number], exact["cls4k"][0].numpy())
            plain.is_rounded(slide.local[number], exact["cls256"][0].numpy())
            plain.is_rounded(slide.array("mean256")[number], exact["mean256"][0].numpy())
            plain.is_rounded(slide.array("concat")[number], concat[0])
            assert slide.array("present")[number].tolist() == present.flatten().tolist()
            down, across = place
            assert slide.xy0[number].tolist() == [across * SIDE * 256, down * SIDE * 256]
    assert num_partial > 0


def test_the_array_embedding_is_the_first_output(
    regions_of: Path, make_extract: Any, run_here: Any, tmp_path: Path
) -> None:
    recipe = make_extract(tmp_path / "store", *ENCODER, "outputs=local", dataset=regions_of, recipe="extract/hipt_4k")
    run_here(recipe)
    slide = next(iter(open_store(tmp_path / "store").values()))
    assert slide.shape("embedding") == (len(slide), SIDE**2, 192)
    assert set(slide.names) == {"embedding", "present", "xy0"}


def test_a_real_slide_in_regions(
    real_slide: Path, make_extract: Callable[..., Any], run_here: Any, tmp_path: Path
) -> None:
    """2220 x 2967 px hold 8 x 11 whole patches of 256 px: the last row of regions of 4 x 4 is partial."""
    settings = (*ENCODER, "patches.region_patches=4", "outputs=local,global")
    run_here(make_extract(tmp_path / "store", *settings, slides=real_slide, recipe="extract/hipt_4k"))
    (slide,) = open_store(tmp_path / "store").values()
    assert slide.shape("embedding") == (len(slide), 16, 192)
    assert slide.shape("global") == (len(slide), 192)
    present = slide.array("present")
    rows = slide.rows
    assert present.sum(axis=1).tolist() == rows["patches"].to_list()
    assert {16, 12} == set(rows["patches"].to_list())
    assert slide.xy0.tolist() == [[col * 1024, row * 1024] for row, col in rows.select("row", "col").rows()]
    embedding = slide.embedding.astype(np.float32)
    assert (np.abs(embedding).sum(axis=2) > 0).tolist() == present.tolist()


def _patches(cells: list[tuple[int, int]], step: float) -> tuple[pa.Table, np.ndarray]:
    row, col = np.array(cells, np.int32).T
    count = len(cells)
    table = pa.table(
        {
            "row": row,
            "col": col,
            "level": np.zeros(count, np.uint8),
            "read_px": np.full(count, 256, np.int32),
            "mpp": np.full(count, 0.5),
            "tissue_fraction": np.linspace(0, 1, count, dtype=np.float32),
            "flags": np.zeros(count, np.uint32),
            "region": np.arange(count),
        }
    )
    xy0 = np.floor(np.stack([col, row], axis=1) * step + 0.5).astype(np.int32)
    return table, xy0


def test_a_region_whose_first_patches_are_missing_begins_where_they_would() -> None:
    """Of levels whose downsample is no whole number, too."""
    for step in (256.0, 1024.03, 1011.7):
        cells = [(1, 2), (2, 1), (5, 5), (4, 5), (3, 9)]
        found = grouped(*_patches(sorted(cells), step), SIDE, "mask")
        places = [
            (row, col) for row, col in zip(*(found.rows.column(n).to_pylist() for n in ("row", "col")), strict=True)
        ]
        exact = np.array([[col * SIDE * step, row * SIDE * step] for row, col in places])
        assert np.abs(found.xy0 - exact).max() <= 1


def test_rows_of_regions_sum_up_their_patches() -> None:
    found = grouped(*_patches([(0, 0), (0, 1), (4, 4)], 256), SIDE, "mask")
    assert found.rows.column("patches").to_pylist() == [2, 1]
    assert found.rows.column("tissue_fraction").to_pylist() == [0.25, 1.0]
    assert found.places[0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1, -1]
    assert found.rows.column("flags").to_pylist() == [8, 8]
