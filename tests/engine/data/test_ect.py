from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.data.draws import uniforms
from engine.data.ect import Ect
from engine.data.finish import resize, turn
from engine.data.views import CROP_DRAWS, CropView, crop_windows

EDGE = 1 - 2**-53  # the largest draw there is


@settings(deadline=None, max_examples=300)
@given(
    size_px=st.integers(1, 300),
    spare_px=st.integers(0, 3),
    scale=st.tuples(st.floats(0.2, 1), st.floats(1, 1.5)),
    aspect=st.tuples(st.floats(0.5, 1), st.floats(1, 2)),
    scale_is=st.sampled_from(["area", "side"]),
)
def test_the_largest_window_is_reached_and_lies_inside(
    size_px: int, spare_px: int, scale: tuple[float, float], aspect: tuple[float, float], scale_is: str
) -> None:
    view = CropView(size_px, ect=Ect(scale, aspect, scale_is))  # type: ignore[arg-type]
    assert view.ect is not None
    largest_px = view.ect.largest_px(size_px, 1, 1)
    patch_px = max(largest_px) + spare_px
    corners = np.array(
        [[u, v, 0, 0, 0, s, a] for u in (0, EDGE) for v in (0, EDGE) for s in (0, EDGE) for a in (0, EDGE)]
    )
    draws = np.concatenate([corners, uniforms(1, np.arange(50), 0, CROP_DRAWS)])
    windows = crop_windows(view, draws, patch_px, patch_px)
    assert (windows.width.max(), windows.height.max()) == largest_px
    assert min(windows.x0.min(), windows.y0.min()) == 0
    assert (windows.x0 + windows.width).max() <= patch_px
    assert (windows.y0 + windows.height).max() <= patch_px
    assert min(windows.width.min(), windows.height.min()) >= 1
    with pytest.raises(ValueError, match=f"up to {largest_px[0]} x {largest_px[1]} px .* do not fit"):
        crop_windows(view, draws, max(largest_px) - 1, max(largest_px) - 1)


@settings(deadline=None, max_examples=100)
@given(width_px=st.integers(1, 400), height_px=st.integers(1, 400), seed=st.integers(0, 99))
def test_windows_by_the_area_of_the_patch_always_fit(width_px: int, height_px: int, seed: int) -> None:
    view = CropView(7, ect=Ect((0.05, 1.0), (3 / 4, 4 / 3), "patch_area"))
    draws = np.concatenate([uniforms(seed, np.arange(30), 0, CROP_DRAWS), np.full((1, CROP_DRAWS), EDGE)])
    windows = crop_windows(view, draws, width_px, height_px)
    assert (windows.x0 + windows.width).max() <= width_px
    assert (windows.y0 + windows.height).max() <= height_px


def test_windows_have_the_areas_and_aspects_that_were_asked_for() -> None:
    draws = uniforms(3, np.arange(20_000), 0, CROP_DRAWS)
    wide = crop_windows(CropView(224, ect=Ect()), draws, 392, 392)
    area, aspect = wide.width * wide.height / 392**2, wide.width / wide.height
    assert (area.min(), area.max()) == pytest.approx((0.294, 0.359), abs=0.002)
    assert area.mean() == pytest.approx((224 / 392) ** 2, rel=0.002)
    assert (aspect.min(), aspect.max()) == pytest.approx((0.95, 1.05), abs=0.006)
    assert np.log(aspect).mean() == pytest.approx((math.log(0.95) + math.log(1.05)) / 2, abs=0.001)
    place_x, place_y = wide.x0 / (392 - wide.width), wide.y0 / (392 - wide.height)
    assert np.abs(np.corrcoef([area, aspect, place_x, place_y]) - np.eye(4)).max() < 0.03
    by_side = crop_windows(CropView(224, ect=Ect(scale_is="side")), draws, 392, 392)
    area = by_side.width * by_side.height / 224**2
    assert (area.min(), area.max()) == pytest.approx((0.81, 1.21), abs=0.01)


def test_views_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"up to 241 x 241 px \(ECT of 224 px .* patches of 240 x 240 px"):
        CropView(224, ect=Ect()).check_fits(240, 240)
    CropView(224, ect=Ect()).check_fits(241, 241)


def test_impossible_settings_are_refused() -> None:
    for wrong, match in (
        ({"scale": (1.1, 0.9)}, "scale"),
        ({"scale": (0.0, 0.9)}, "scale"),
        ({"aspect": (1.0, math.inf)}, "aspect"),
        ({"scale_is": "volume"}, "scale_is"),
        ({"scale_is": "patch_area"}, "at most 1"),
    ):
        with pytest.raises(ValueError, match=match):
            Ect(**wrong)
    with pytest.raises(ValueError, match="centre"):
        CropView(8, centre=True, ect=Ect())


@pytest.mark.parametrize("size", [(32, 32), (29, 35), (35, 29), (64, 20), (1, 1), (90, 90)])
def test_resizing_is_linear_and_antialiased(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    resized = resize(torch.from_numpy(pixels), 32).numpy()
    assert resized.dtype == np.uint8
    assert np.abs(resized - expected).max() <= 1


def test_rotations_and_flips_give_every_orientation_equally_often() -> None:
    windows = crop_windows(CropView(4, rotations=True), uniforms(2, np.arange(16_000), 0, CROP_DRAWS), 9, 9)
    orientation = windows.transpose * 4 + windows.flip_x * 2 + windows.flip_y
    assert np.abs(np.bincount(orientation, minlength=8) / 16_000 - 1 / 8).max() < 0.01


def test_a_rotation_is_a_quarter_turn() -> None:
    draws = np.zeros((4, CROP_DRAWS))
    draws[:, 4] = np.arange(4) / 4
    windows = crop_windows(CropView(5, flips=False, rotations=True), draws, 5, 5)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    turned = turn(torch.from_numpy(np.stack([pixels] * 4)), windows)
    for quarters in range(4):
        assert np.array_equal(turned[quarters].numpy(), np.rot90(pixels, quarters))
