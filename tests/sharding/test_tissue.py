"""Where the tissue is: against the painted truth, against sums done by hand, and on damaged levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from sharding import tissue
from sharding.plan import plan_slide
from sharding.slide import DamagedTileError, Level, Pixels, Slide, Spacing, fingerprint, make_levels, open_slide
from sharding.synth import SlideSpec, paint_slide
from sharding.tissue import TissueMask, find_tissue, saturation, tissue_of

PEN = 3


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("pen", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_mask_and_the_planned_cells_match_the_painted_truth(
    hole: bool, pen: bool, index: int, truth_of: Any, make_options: Any, tmp_path: Path
) -> None:
    spec = SlideSpec(seed=21, index=index, width_px=2048, height_px=1536, hole=hole, pen=pen)
    paint_slide(spec, tmp_path)
    path = tmp_path / f"{spec.slide_id}.svs"
    true, classes = truth_of(path)
    with open_slide(path) as slide:
        # 8 um at 0.5 um/px: the mask has the truth's own cells of 16 px.
        found = find_tissue(slide, 0.5)
        plan = plan_slide(slide, fingerprint(path), make_options(context_px=256, stride_px=256), mpp_override=None)
    assert (found.cell_x_px0, found.cell_y_px0) == (16.0, 16.0)
    judged = classes != PEN
    assert (found.mask & true & judged).sum() / ((found.mask | true) & judged).sum() >= 0.95
    assert bool((classes == PEN).any()) == pen
    # Ink alone is no tissue.
    ink_on_glass = (classes == PEN) & ~true
    assert (found.mask & ink_on_glass).sum() <= 0.05 * ink_on_glass.sum()

    share = (true & judged).reshape(6, 16, 8, 16).mean(axis=(1, 3))
    ink = (classes == PEN).reshape(6, 16, 8, 16).any(axis=(1, 3))
    planned = np.zeros((6, 8), bool)
    planned[plan.rows["row"], plan.rows["col"]] = True
    # An edge that crosses the patch and lies one mask cell (of 16 a side) elsewhere changes its share by 1/16.
    band = 1 / 16
    assert planned[(share >= 0.5 + band) & ~ink].all()
    assert not planned[(share < 0.5 - band) & ~ink].any()
    assert 0 < planned.sum() < planned.size


@pytest.mark.parametrize("colour", [(243, 242, 244), (250, 246, 238), (255, 255, 255), (200, 196, 198), (0, 0, 0)])
def test_a_blank_slide_has_no_tissue(
    colour: tuple[int, int, int], make_job: Callable[..., Any], run_slide: Any, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (1024, 1024, 3))
    picture = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path = tmp_path / "blank.tif"
    tifffile.imwrite(
        path,
        picture,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    record = run_slide(make_job(path, tmp_path / "dataset"))
    assert (record.status, record.patches, record.shards) == ("done", 0, [])
    assert record.reason == "no patch holds enough tissue"


@given(data=st.data(), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_fractions_are_the_exact_share_of_the_covered_area(data: st.DataObject, rows: int, columns: int) -> None:
    mask = np.random.default_rng(data.draw(st.integers(0, 1000))).random((rows, columns)) < 0.5
    cell_x, cell_y = data.draw(st.floats(1.0, 40.0)), data.draw(st.floats(1.0, 40.0))
    width, height = data.draw(st.floats(0.5, 300.0)), data.draw(st.floats(0.5, 300.0))
    origins = data.draw(st.lists(st.tuples(st.floats(-50, 400), st.floats(-50, 400)), min_size=1, max_size=4))
    x0, y0 = (np.array(values) for values in zip(*origins, strict=True))
    got = bare(mask, cell_x, cell_y).fractions(x0, y0, width, height)
    assert got.dtype == np.float32
    for x, y, fraction in zip(x0, y0, got, strict=True):
        across = overlaps(x, x + width, cell_x, columns)
        down = overlaps(y, y + height, cell_y, rows)
        assert fraction == pytest.approx(float(down @ mask @ across) / (width * height), abs=1e-5)


def bare(mask: np.ndarray, cell_x_px0: float, cell_y_px0: float) -> TissueMask:
    return TissueMask(mask, cell_x_px0, cell_y_px0, 20, np.full((*mask.shape, 3), 255, np.uint8))


def overlaps(start: float, stop: float, cell: float, count: int) -> np.ndarray:
    edges = np.arange(count + 1) * cell
    return np.maximum(0.0, np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1]))


def test_fractions_of_whole_cells_are_plain_counts() -> None:
    mask = np.random.default_rng(1).random((32, 48)) < 0.3
    y, x = (a.ravel() * 8.0 for a in np.mgrid[0:4, 0:6])
    got = bare(mask, 1.0, 1.0).fractions(x, y, 8.0, 8.0)
    assert np.array_equal(got, mask.reshape(4, 8, 6, 8).mean(axis=(1, 3)).ravel().astype(np.float32))


def pink(shape: tuple[int, int], where: np.ndarray) -> Pixels:
    picture = np.full((*shape, 3), 243, np.uint8)
    picture[where] = (210, 120, 170)
    return picture


def test_specks_are_dropped_and_small_holes_filled_by_their_area() -> None:
    where = np.zeros((80, 80), bool)
    where[20:60, 20:60] = True
    where[2, 2:5] = True  # 3 cells of 64 um2: a speck
    where[70:74, 2:6] = True  # 16 cells = 1024 um2: kept
    where[30:33, 30:33] = False  # 9 cells = 576 um2: a lumen, filled
    where[40:52, 40:52] = False  # 144 cells = 9216 um2: glass
    mask, _ = tissue_of(pink((80, 80), where), cell_um2=64.0)
    expected = where.copy()
    expected[2, 2:5] = False
    expected[30:33, 30:33] = True
    assert np.array_equal(mask, expected)
    unscaled, _ = tissue_of(pink((80, 80), where), cell_um2=None)
    assert np.array_equal(unscaled, where)


def test_the_speck_and_hole_rules_can_be_given() -> None:
    where = np.zeros((80, 80), bool)
    where[20:60, 20:60] = True
    where[2, 2:5] = True  # 192 um2
    where[40:52, 40:52] = False  # 9216 um2
    kept, _ = tissue_of(pink((80, 80), where), cell_um2=64.0, min_object_um2=192.0, max_hole_um2=9216.0)
    assert np.array_equal(kept, where)
    dropped, _ = tissue_of(pink((80, 80), where), cell_um2=64.0, min_object_um2=193.0, max_hole_um2=9217.0)
    expected = np.zeros_like(where)
    expected[20:60, 20:60] = True
    assert np.array_equal(dropped, expected)


def by_clam(picture: Pixels) -> np.ndarray:
    """Median over 7 x 7, above 8, closed with a square of 4 x 4: each as it is defined, cell by cell."""
    value = np.pad(saturation(picture), 3, mode="edge")
    above = np.median(np.lib.stride_tricks.sliding_window_view(value, (7, 7)), axis=(2, 3)) > 8
    windows = np.lib.stride_tricks.sliding_window_view
    # Closed: what no square of 4 x 4 reaches that touches nothing. Beyond the border the picture goes on as it ends.
    padded = np.pad(above, 8, mode="edge")
    free = ~windows(padded, (4, 4)).any(axis=(2, 3))
    reached = windows(np.pad(free, 3, constant_values=False), (4, 4)).any(axis=(2, 3))
    return ~reached[8:-8, 8:-8]


@given(seed=st.integers(0, 10_000), rows=st.integers(5, 40), columns=st.integers(5, 40), share=st.floats(0.05, 0.6))
def test_clams_recipe_is_median_threshold_and_closing(seed: int, rows: int, columns: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.random((-(-rows // 5), -(-columns // 5))) < share
    where = np.kron(coarse, np.ones((5, 5))).astype(bool)[:rows, :columns] ^ (rng.random((rows, columns)) < 0.1)
    picture = pink((rows, columns), where)
    mask, threshold = tissue_of(picture, cell_um2=None, recipe="clam")
    assert threshold == 8
    assert np.array_equal(mask, by_clam(picture))


def test_clam_keeps_what_hangs_together_by_a_corner_and_otsu_does_not() -> None:
    where = np.zeros((60, 60), bool)
    where[10:25, 10:25] = where[25:40, 25:40] = True
    picture = pink((60, 60), where)
    alone = tissue_of(picture, cell_um2=1.0, min_object_um2=300.0, max_hole_um2=0.0)[0]
    joined = tissue_of(picture, cell_um2=1.0, recipe="clam", min_object_um2=300.0, max_hole_um2=0.0)[0]
    assert not alone.any()
    assert (joined & where).sum() > 0.9 * where.sum()


def test_clam_finds_the_painted_tissue(slides: Any, truth_of: Any) -> None:
    true, _ = truth_of(slides["plain"])
    with open_slide(slides["plain"]) as slide:
        mask = find_tissue(slide, 0.5, recipe="clam")
        nothing = find_tissue(slide, 0.5, recipe="clam", min_object_um2=1e9)
    assert mask.picture.shape == (*mask.mask.shape, 3)
    assert (mask.mask & true).sum() / (mask.mask | true).sum() >= 0.9
    assert not nothing.mask.any()


@pytest.mark.parametrize("ink", [(30, 60, 140), (40, 140, 70), (20, 20, 22)])
def test_ink_is_no_tissue(ink: tuple[int, int, int]) -> None:
    where = np.zeros((80, 80), bool)
    where[20:60, 20:40] = True
    picture = pink((80, 80), where)
    picture[10:70, 60:70] = ink
    mask, _ = tissue_of(picture, cell_um2=64.0)
    assert np.array_equal(mask, where)


class FakeReader:
    """Levels given as arrays; reading a level in `broken` raises."""

    name = "fake"
    spacing: Spacing | None = None

    def __init__(self, pictures: list[Pixels], broken: set[int] | None = None) -> None:
        self._pictures = pictures
        self._broken = broken or set()
        self.levels: tuple[Level, ...] = make_levels([(p.shape[1], p.shape[0]) for p in pictures])
        self.read_levels: list[int] = []

    def read(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
        self.read_levels.append(level)
        if level in self._broken:
            raise DamagedTileError("broken")
        return self._pictures[level][y_px : y_px + height_px, x_px : x_px + width_px]

    def close(self) -> None:
        pass


def test_the_mask_is_that_of_exact_means_however_the_level_is_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    where = np.kron(rng.random((23, 31)) < 0.5, np.ones((9, 9))).astype(bool)[:203, :277]
    picture = pink((203, 277), where)
    picture = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
    rows, columns = -(-203 // 16), -(-277 // 16)
    means = np.empty((rows, columns, 3), np.uint8)
    for i in range(rows):
        for j in range(columns):
            cell = picture[i * 16 : i * 16 + 16, j * 16 : j * 16 + 16].reshape(-1, 3)
            means[i, j] = (2 * cell.sum(axis=0, dtype=np.int64) + len(cell)) // (2 * len(cell))
    expected, threshold = tissue_of(means, cell_um2=64.0)
    assert 0.05 < expected.mean() < 0.95
    for square_px in (1024, 64, 16):
        monkeypatch.setattr(tissue, "_SQUARE_PX", square_px)
        found = find_tissue(Slide(Path("x"), FakeReader([picture]), None), 0.5)
        assert (found.cell_x_px0, found.cell_y_px0, found.threshold) == (16.0, 16.0, threshold)
        assert np.array_equal(found.picture, means)
        assert np.array_equal(found.mask, expected), square_px


def test_the_coarsest_level_that_is_fine_enough_is_read_alone() -> None:
    pictures = [np.full((side, side, 3), 243, np.uint8) for side in (1024, 256, 64, 16)]
    for mpp0, level in ((0.5, 2), (0.49, 2), (0.25, 2), (2.0, 1), (4.1, 0), (None, 2)):
        reader = FakeReader(pictures)
        mask = find_tissue(Slide(Path("x"), reader, None), mpp0)
        assert set(reader.read_levels) == {level}, mpp0
        assert mask.cell_x_px0 >= reader.levels[level].downsample_x


def test_a_slide_coarser_than_the_mask_is_read_at_level_0() -> None:
    """8.4 to 50 um/px are plausible spacings too."""
    where = np.zeros((64, 64), bool)
    where[10:40, 10:40] = True
    mask = find_tissue(Slide(Path("x"), FakeReader([pink((64, 64), where)]), None), 10.0)
    assert (mask.cell_x_px0, mask.cell_y_px0) == (1.0, 1.0)
    assert np.array_equal(mask.mask, where)


@pytest.mark.parametrize("how", ["zeroed", "scrambled scan", "no bytes"])
@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_a_damaged_overview_loses_no_tissue(
    how: str, reader: Any, slides: Any, truth_of: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    path = damage_tile(slides["plain"], tmp_path / "bad.svs", 1, 0, 0, how)
    true, _ = truth_of(slides["plain"])
    with open_slide(path, reader) as slide:
        mask = find_tissue(slide, 0.5)
    assert (mask.mask & true).sum() / (mask.mask | true).sum() >= 0.95


def test_damage_on_level_0_counts_as_tissue_where_it_is_and_nowhere_else(
    slides: Any, truth_of: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    """A slide of one level: its picture has to be taken from the level that is damaged."""
    true, _ = truth_of(slides["single"])
    path = damage_tile(slides["single"], tmp_path / "bad.svs", 0, 1, 1, "zeroed")
    with open_slide(path) as slide:
        mask = find_tissue(slide, 0.5).mask
    assert mask[16:32, 16:32].all()
    elsewhere = np.ones_like(true)
    elsewhere[16:32, 16:32] = False
    assert (mask & true & elsewhere).sum() / ((mask | true) & elsewhere).sum() >= 0.95


def test_a_larger_slide_paints_the_same_share(tmp_path: Path) -> None:
    spec = SlideSpec(seed=2, width_px=1024, height_px=1024)
    shares = []
    for number, mpp in enumerate((0.5, 0.25)):
        truth = paint_slide(replace(spec, mpp=mpp), tmp_path / str(number))
        with open_slide(tmp_path / str(number) / "synth-0000.svs") as slide:
            mask = find_tissue(slide, mpp)
        # The cell is about 8 um on the slide, whatever its spacing.
        assert mask.cell_x_px0 * mpp == 8.0
        shares.append(abs(mask.mask.mean() - truth["tissue_share"]))
    assert max(shares) < 0.03
