"""The picture of a slide for quality control: what is drawn where, the same bytes every time, and its file's name."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sharding.plan import SlidePlan, plan_slide
from sharding.qc import DAMAGED_RGB, STORED_RGB, TISSUE_RGB, qc_name, qc_picture
from sharding.slide import Pixels, fingerprint, open_slide
from sharding.tissue import _read_mean

GLASS = 240


def _draw(**changes: Any) -> np.ndarray:
    """A 64 x 48 picture of glass; tissue in its right half; four patches of 8 cells from (16, 16), one damaged."""
    mask = np.zeros((48, 64), bool)
    mask[:, 32:] = True
    arguments: dict[str, Any] = {
        "picture": np.full((48, 64, 3), GLASS, np.uint8),
        "mask": mask,
        "x0": np.array([256.0, 384.0, 256.0, 384.0]),
        "y0": np.array([256.0, 256.0, 384.0, 384.0]),
        "cell_x_px0": 16.0,
        "cell_y_px0": 16.0,
        "width_px0": 128.0,
        "height_px0": 128.0,
        "damaged": np.array([False, False, False, True]),
        "max_px": 64,
        **changes,
    }
    data = qc_picture(**arguments)
    assert data == qc_picture(**arguments)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(int)


def _near(pixel: np.ndarray, rgb: tuple[int, int, int], tolerance: int = 60) -> bool:
    return bool(np.abs(pixel - np.array(rgb)).max() <= tolerance)


def _is_glass(pixel: np.ndarray) -> bool:
    return _near(pixel, (GLASS, GLASS, GLASS), 20)


def test_tissue_patches_and_damage_lie_where_they_are() -> None:
    drawn = _draw()
    assert drawn.shape == (48, 64, 3)
    assert _near(drawn[5, 32], TISSUE_RGB)
    assert _is_glass(drawn[5, 28])
    assert _is_glass(drawn[5, 40])  # inside tissue nothing is drawn
    red, green, blue = (int(0.55 * c + 0.45 * GLASS) for c in STORED_RGB)
    for y, x in ((16, 20), (20, 16), (20, 24), (32, 20)):
        assert _near(drawn[y, x], (red, green, blue)), (y, x)
    assert _is_glass(drawn[20, 20])  # the inside of a stored patch is left alone
    for y, x in ((24, 28), (28, 24), (28, 28), (26, 26), (26, 30)):
        assert _near(drawn[y, x], DAMAGED_RGB, 80), (y, x)


def test_without_damage_nothing_is_red() -> None:
    drawn = _draw(damaged=np.zeros(4, bool))
    assert not ((drawn[..., 0] - drawn[..., 1]) > 60).any()


def test_no_patch_and_no_tissue_is_the_slide_itself() -> None:
    nothing = np.zeros(0)
    drawn = _draw(mask=np.zeros((48, 64), bool), x0=nothing, y0=nothing, damaged=np.zeros(0, bool))
    assert all(_is_glass(pixel) for pixel in drawn.reshape(-1, 3))


@pytest.mark.parametrize(
    ("max_px", "size"), [(1024, (96, 128)), (128, (96, 128)), (127, (48, 64)), (63, (24, 32)), (20, (12, 16))]
)
def test_the_longer_side_is_bounded_and_a_small_picture_is_doubled(max_px: int, size: tuple[int, int]) -> None:
    drawn = _draw(max_px=max_px)
    assert drawn.shape[:2] == size
    assert _near(drawn[size[0] // 8, size[1] // 2], TISSUE_RGB)


def test_cells_of_unequal_sides_keep_their_places() -> None:
    drawn = _draw(cell_x_px0=32.0, width_px0=256.0, x0=np.array([512.0, 768.0, 512.0, 768.0]))
    assert np.abs(drawn - _draw()).max() == 0


def test_many_small_patches_leave_the_slide_to_be_seen() -> None:
    y, x = (a.ravel() * 32.0 for a in np.mgrid[4:20, 4:12])
    drawn = _draw(x0=x, y0=y, width_px0=32.0, height_px0=32.0, damaged=np.zeros(len(x), bool))
    assert _is_glass(drawn[24, 16])
    assert not _is_glass(drawn[24, 8])


def test_one_small_damaged_patch_is_crossed_large_enough_to_be_seen() -> None:
    drawn = _draw(x0=np.array([160.0]), y0=np.array([160.0]), width_px0=16.0, height_px0=16.0, damaged=np.array([True]))
    red = (drawn[..., 0] - drawn[..., 1]) > 100
    assert red.sum() >= 30
    assert np.abs(np.argwhere(red).mean(axis=0) - 10.5).max() < 1.5


def test_a_patch_that_reaches_beyond_the_slide_is_clipped() -> None:
    drawn = _draw(x0=np.array([-64.0]), y0=np.array([700.0]), damaged=np.array([False]))
    assert not _is_glass(drawn[45, 0])


def test_the_jpeg_holds_no_metadata() -> None:
    picture = np.full((8, 8, 3), GLASS, np.uint8)
    data = qc_picture(
        picture,
        np.zeros((8, 8), bool),
        np.zeros(0),
        np.zeros(0),
        cell_x_px0=16,
        cell_y_px0=16,
        width_px0=16,
        height_px0=16,
        damaged=np.zeros(0, bool),
    )
    with Image.open(io.BytesIO(data)) as image:
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert not image.getexif()


def test_a_painted_slide_shows_its_lattice_on_tissue(slides: dict[str, Path], make_options: Any) -> None:
    path = slides["plain"]
    with open_slide(path) as slide:
        plan = plan_slide(slide, fingerprint(path), make_options(), mpp_override=None)
        picture = _read_mean(slide, 0, 16)[0]
    assert picture.shape[:2] == plan.mask.mask.shape
    damaged = np.zeros(plan.num_patches, bool)
    damaged[0] = True
    with Image.open(io.BytesIO(_picture_of(plan, picture, damaged))) as image:
        drawn = np.asarray(image).astype(int)
    assert drawn.shape[:2] == (picture.shape[0] * 2, picture.shape[1] * 2)
    red = np.argwhere((drawn[..., 0] > 180) & (drawn[..., 1] < 60))
    # 128 px at 16 px a cell and two pixels a cell: 16 pixels a patch.
    first = np.array([plan.rows["row"][0], plan.rows["col"][0]]) * 16
    assert (red.min(axis=0) >= first - 2).all()
    assert (red.max(axis=0) <= first + 18).all()


def _picture_of(plan: SlidePlan, picture: Pixels, damaged: np.ndarray) -> bytes:
    return qc_picture(
        picture,
        plan.mask.mask,
        plan.rows["x0"].astype(np.float64),
        plan.rows["y0"].astype(np.float64),
        cell_x_px0=plan.mask.cell_x_px0,
        cell_y_px0=plan.mask.cell_y_px0,
        width_px0=128.0,
        height_px0=128.0,
        damaged=damaged,
    )


@pytest.mark.parametrize(
    ("slide_id", "name"),
    [
        ("TCGA-A1.2_x", "TCGA-A1.2_x.jpg"),
        ("a b/ä~%", "a%20b%2F%C3%A4%7E%25.jpg"),
        (".hidden", "%2Ehidden.jpg"),
        ("", "%.jpg"),
        ("..", "%2E..jpg"),
    ],
)
def test_a_name_is_the_escaped_id(slide_id: str, name: str) -> None:
    assert qc_name(slide_id) == name


def test_a_long_id_ends_in_a_hash_and_stays_unique() -> None:
    longest = "x" * 196
    assert qc_name(longest) == f"{longest}.jpg"
    names = {qc_name(longest + ending) for ending in ("y", "z", "yy")}
    assert len(names) == 3
    assert {len(name) for name in names} == {200}


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), max_size=250), min_size=2, max_size=5))
def test_names_are_safe_and_differ_for_any_ids(ids: set[str]) -> None:
    names = {qc_name(slide_id) for slide_id in ids}
    assert len(names) == len(ids)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_%-][A-Za-z0-9._%~-]*\.jpg|%\.jpg", name)
        assert len(name.encode()) <= 200
