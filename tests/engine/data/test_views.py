from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.draws import DRAWS_VERSION, uniforms
from engine.data.views import CROP_DRAWS, CropView, crop_windows


def test_draws_do_not_depend_on_the_batch_or_on_how_many_are_drawn() -> None:
    positions = np.arange(10**12, 10**12 + 100)
    together = uniforms(7, positions, 1, 6)
    assert together.shape == (100, 6)
    assert np.array_equal(together, np.concatenate([uniforms(7, positions[i : i + 9], 1, 6) for i in range(0, 100, 9)]))
    assert np.array_equal(together[::-1], uniforms(7, positions[::-1], 1, 6))
    assert np.array_equal(together[:, :2], uniforms(7, positions, 1, 2))


def test_draws_are_uniform_and_unrelated() -> None:
    draws = uniforms(1, np.arange(20_000), 0, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, 50, (0, 1))[0]
        assert ((counts - 400) ** 2 / 400).mean() < 2
    columns = [*draws.T, uniforms(1, np.arange(20_000), 1, 1)[:, 0], uniforms(2, np.arange(20_000), 0, 1)[:, 0]]
    columns.append(np.roll(draws[:, 0], 1))
    related = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(related).max() < 0.04


def test_the_draws_of_this_version_never_change() -> None:
    assert DRAWS_VERSION == "splitmix-1"
    assert uniforms(42, np.array([0, 10**12]), 1, 2).tolist() == [
        [0.6151144901158643, 0.5704379626222995],
        [0.8261718449157929, 0.5605673653355255],
    ]


@settings(deadline=None)
@given(
    size_px=st.integers(1, 60),
    width_px=st.integers(60, 100),
    height_px=st.integers(60, 100),
    extreme=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
    centre=st.booleans(),
)
def test_windows_lie_inside_the_patch(
    size_px: int, width_px: int, height_px: int, extreme: float, centre: bool
) -> None:
    draws = np.concatenate([uniforms(1, np.arange(20), 0, CROP_DRAWS), np.full((1, CROP_DRAWS), extreme)])
    x0, y0, flip_x, flip_y, *_ = crop_windows(CropView(size_px, centre=centre), draws, width_px, height_px)
    assert x0.dtype == y0.dtype == flip_x.dtype == flip_y.dtype == np.int32
    assert x0.min() >= 0
    assert y0.min() >= 0
    assert (x0 + size_px).max() <= width_px
    assert (y0 + size_px).max() <= height_px
    assert set(flip_x) | set(flip_y) <= {0, 1}


def test_every_window_and_flip_occurs_equally_often() -> None:
    windows = crop_windows(CropView(8), uniforms(1, np.arange(12_000), 0, CROP_DRAWS), 10, 10)
    for field, values in zip(windows[:4], (3, 3, 2, 2), strict=True):
        counts = np.bincount(field, minlength=values)
        assert len(counts) == values
        assert np.abs(counts / 12_000 - 1 / values).max() < 0.03


def test_centre_and_unflipped_views_stay_put() -> None:
    windows = crop_windows(CropView(7, flips=False, centre=True), uniforms(1, np.arange(5), 0, CROP_DRAWS), 10, 20)
    assert windows.x0.tolist() == [1] * 5
    assert windows.y0.tolist() == [6] * 5
    assert not windows.flip_x.any()
    assert not windows.flip_y.any()


def test_a_crop_larger_than_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"11 px does not fit .* 20 x 10 px"):
        crop_windows(CropView(11), np.zeros((1, CROP_DRAWS)), 20, 10)


def test_impossible_views_are_refused() -> None:
    with pytest.raises(ValueError, match="size_px"):
        CropView(0)
    with pytest.raises(ValueError, match="output"):
        CropView(8, output="float64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std"):
        CropView(8, std=(1.0, 0.0, 1.0))


def test_a_view_survives_json() -> None:
    described = CropView(8, output="uint8").as_dict()
    assert json.loads(json.dumps(described)) == described
