"""Which level is read, where the grid lies: pure geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.grid import SPACING_TOLERANCE, Geometry, choose_geometry, grid_cells
from sharding.slide import Level, Spacing, SpacingError, make_levels

APERIO = make_levels([(40_000, 32_000), (10_000, 8_000), (2_500, 2_000)])


def choose(mpp0: float | None, mpp: float | None, levels: tuple[Level, ...] = APERIO) -> Geometry:
    spacing = None if mpp0 is None else Spacing(mpp0, mpp0, "aperio")
    return choose_geometry(levels, spacing, mpp=mpp, context_px=256, stride_px=256)


@pytest.mark.parametrize("mpp0", [0.25, 0.2527, 0.263 * 0.97, 0.25 / 0.96, 0.24])
def test_a_level_within_the_tolerance_is_stored_as_it_is_with_its_own_spacing(mpp0: float) -> None:
    geometry = choose(mpp0, 0.25)
    assert (geometry.level, geometry.scale, geometry.read_px) == (0, 1.0, 256)
    assert geometry.mpp == mpp0
    upper = choose(mpp0, 1.0)
    assert (upper.level, upper.scale, upper.mpp) == (1, 1.0, mpp0 * 4)


def test_the_tolerance_ends_at_five_percent() -> None:
    assert SPACING_TOLERANCE == 0.05
    assert choose(0.2376, 0.25).scale == 1.0
    finer = choose(0.2374, 0.25)
    assert (finer.level, finer.mpp) == (0, 0.25)
    assert finer.scale == pytest.approx(0.25 / 0.2374)
    assert choose(0.2624, 0.25).scale == 1.0
    with pytest.raises(SpacingError, match=r"0\.2626 um/px at its finest.*never enlarged"):
        choose(0.2626, 0.25)


def test_the_nearest_of_several_levels_within_the_tolerance_is_taken() -> None:
    levels = make_levels([(10_000, 10_000), (9_700, 9_700), (9_400, 9_400)])
    assert choose(0.5, 0.5 * 10 / 9.65, levels).level == 1
    assert choose(0.5, 0.5, levels).level == 0


@pytest.mark.parametrize(
    ("mpp", "level", "scale"), [(0.75, 0, 3.0), (0.45, 0, 1.8), (3.0, 1, 3.0), (7.0, 2, 1.75), (64.0, 2, 16.0)]
)
def test_else_the_window_comes_from_the_coarsest_finer_level(mpp: float, level: int, scale: float) -> None:
    geometry = choose(0.25, mpp)
    assert (geometry.level, geometry.mpp) == (level, mpp)
    assert geometry.scale == pytest.approx(scale)
    assert geometry.read_px == round(256 * scale)


@pytest.mark.parametrize(
    ("mpp0", "mpp", "level", "scale"),
    [(0.25, 0.5, 0, 2.0), (0.2527, 0.5, 0, 2.0), (0.2376, 0.5, 0, 2.0), (0.25, 2.0, 1, 2.0), (0.25, 32.0, 2, 8.0)],
)
def test_a_level_whose_doubled_spacing_matches_is_halved_and_keeps_its_own(
    mpp0: float, mpp: float, level: int, scale: float
) -> None:
    geometry = choose(mpp0, mpp)
    assert (geometry.level, geometry.scale, geometry.read_px) == (level, scale, round(256 * scale))
    assert geometry.mpp == mpp0 * APERIO[level].downsample_x * scale


def test_a_level_as_it_is_goes_before_a_halved_one_and_the_smaller_factor_first() -> None:
    levels = make_levels([(10_000, 10_000), (5_000, 5_000), (2_400, 2_400)])
    assert choose(0.25, 0.5, levels) == Geometry(1, 1.0, 0.5, 256, 256)
    # 0.263 x 2 is 5.2 % off; 0.263 x 4 too: neither matches, so the window is resampled.
    assert choose(0.263, 0.5).scale == pytest.approx(0.5 / 0.263)
    assert choose(0.25, 2.0, levels) == Geometry(2, 2.0, 0.25 * 10_000 / 2_400 * 2, 256, 256)
    # Of two levels that match, the coarser is read.
    close = make_levels([(10_000, 10_000), (9_800, 9_800)])
    assert choose(0.25, 0.5, close).level == 1


@given(mpp0=st.floats(0.1, 2.0), mpp=st.floats(0.1, 16.0))
def test_no_patch_is_ever_enlarged_beyond_the_tolerance(mpp0: float, mpp: float) -> None:
    try:
        geometry = choose(mpp0, mpp)
    except SpacingError:
        assert mpp < mpp0
        return
    assert geometry.scale >= 1.0
    level = APERIO[geometry.level]
    read_mpp = mpp0 * level.downsample_x * geometry.scale
    assert geometry.mpp == pytest.approx(read_mpp)
    assert abs(read_mpp / mpp - 1) <= SPACING_TOLERANCE + 1e-9


def test_without_spacing_only_native_is_possible() -> None:
    with pytest.raises(SpacingError, match="states no spacing"):
        choose(None, 0.5)
    assert choose(None, None) == Geometry(0, 1.0, None, 256, 256)
    assert choose(0.3, None) == Geometry(0, 1.0, 0.3, 256, 256)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    stride=st.integers(16, 600),
    more=st.integers(0, 300),
    scale=st.sampled_from([1.0, 2.0, 1.0526315789, 0.5 / 0.2374, 3.999]),
    shrink=st.sampled_from([1, 4, 4.0008]),
)
def test_cells_lie_inside_apart_and_are_as_many_as_fit(
    width: int, height: int, stride: int, more: int, scale: float, shrink: float
) -> None:
    level = Level(width, height, shrink, shrink * 1.0004)
    geometry = Geometry(0, scale, 0.5, stride + more, stride)
    cells = grid_cells(level, geometry)
    step, side = stride * scale, (stride + more) * scale
    columns, rows = int(width / step + 1e-9), int(height / step + 1e-9)
    # Raster order, all of them, once: so they neither overlap nor leave a gap.
    assert list(zip(cells.row.tolist(), cells.col.tolist(), strict=True)) == [
        (row, col) for row in range(rows) for col in range(columns)
    ]
    margin = (side - step) / 2
    assert np.allclose(cells.window_x + margin, cells.col * step)
    assert np.allclose(cells.window_y + margin, cells.row * step)
    assert np.all((cells.col + 1) * step <= width + 1e-5)
    assert np.all((cells.row + 1) * step <= height + 1e-5)
    assert np.abs(cells.x0 - cells.window_x * level.downsample_x).max(initial=0) <= 0.5 + 1e-6
    assert np.abs(cells.y0 - cells.window_y * level.downsample_y).max(initial=0) <= 0.5 + 1e-6
    beyond = (cells.window_x < -1e-6) | (cells.window_x + side > width + 1e-6)
    beyond |= (cells.window_y < -1e-6) | (cells.window_y + side > height + 1e-6)
    assert np.array_equal(cells.outside, beyond)


def test_the_grid_is_anchored_at_the_origin() -> None:
    cells = grid_cells(Level(1000, 600, 1.0, 1.0), Geometry(0, 1.0, 0.5, 256, 256))
    assert cells.x0.tolist() == [0, 256, 512] * 2
    assert cells.y0.tolist() == [0] * 3 + [256] * 3
    assert not cells.outside.any()


def test_a_larger_context_is_centred_on_its_cell_and_says_where_it_leaves_the_slide() -> None:
    cells = grid_cells(Level(1024, 1024, 4.0, 4.0), Geometry(1, 1.0, 0.5, 320, 256))
    assert sorted(set(cells.window_x.tolist())) == [-32, 224, 480, 736]
    assert sorted(set(cells.x0.tolist())) == [-128, 896, 1920, 2944]
    border = (cells.row == 0) | (cells.row == 3) | (cells.col == 0) | (cells.col == 3)
    assert np.array_equal(cells.outside, border)


def test_half_pixels_of_level_0_are_rounded_up_on_both_sides_of_the_origin() -> None:
    cells = grid_cells(Level(300, 100, 1.0, 1.0), Geometry(0, 1.0, 0.5, 101, 100))
    assert cells.window_x.tolist() == [-0.5, 99.5, 199.5]
    assert cells.x0.tolist() == [0, 100, 200]


def test_a_level_smaller_than_a_cell_has_none() -> None:
    assert len(grid_cells(Level(255, 1000, 1.0, 1.0), Geometry(0, 1.0, 0.5, 256, 256)).row) == 0
    assert len(grid_cells(Level(256, 256, 1.0, 1.0), Geometry(0, 1.0, 0.5, 256, 256)).row) == 1


def test_a_cell_that_fits_but_for_rounding_is_kept() -> None:
    # 256 * (0.5 / 0.1666...) is 768.0000000000001 or so.
    scale = 0.5 / (1 / 6)
    assert len(grid_cells(Level(768, 1536, 1.0, 1.0), Geometry(0, scale, 0.5, 256, 256)).row) == 2
