"""White and blurred patches: by the rule as it is written, on painted and on real tissue, on glass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from sharding.filters import FLAG_BLURRED, FLAG_WHITE, patch_flags
from sharding.slide import Pixels, open_slide
from sharding.synth import SlideSpec, paint_slide
from sharding.tissue import find_tissue

PATCH = 256


def patches_of(path: Path, mpp: float) -> tuple[list[Pixels], list[Pixels]]:
    """The patches of level 0 that are at least half tissue, and those that are all glass."""
    tissue, glass = [], []
    with open_slide(path) as slide:
        mask, level = find_tissue(slide, mpp), slide.levels[0]
        for y in range(0, level.height_px - PATCH + 1, PATCH):
            for x in range(0, level.width_px - PATCH + 1, PATCH):
                (share,) = mask.fractions(np.array([float(x)]), np.array([float(y)]), PATCH, PATCH)
                if share >= 0.5:
                    tissue.append(slide.read(0, x, y, PATCH, PATCH))
                elif share == 0:
                    glass.append(slide.read(0, x, y, PATCH, PATCH))
    return tissue, glass


def blurred(pixels: Pixels, sigma_px: float) -> Pixels:
    return gaussian_filter(pixels, (sigma_px, sigma_px, 0))


def encoded(pixels: Pixels, quality: int) -> Pixels:
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444"))


def check(tissue: list[Pixels], glass: list[Pixels]) -> None:
    assert len(tissue) >= 10
    assert len(glass) >= 10
    assert {patch_flags(patch) for patch in tissue} == {0}
    assert {patch_flags(encoded(patch, 80)) for patch in tissue} == {0}
    assert {patch_flags(patch) for patch in glass} == {FLAG_WHITE}
    for sigma in (2, 3, 8):
        copies = [blurred(patch, sigma) for patch in tissue]
        assert {patch_flags(copy) for copy in copies} == {FLAG_BLURRED}, sigma
        assert {patch_flags(encoded(copy, 80)) for copy in copies} == {FLAG_BLURRED}, sigma


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_painted_tissue_is_sharp_its_blurred_copies_are_not_and_glass_is_white(mpp: float, tmp_path: Path) -> None:
    spec = SlideSpec(seed=31, width_px=2048, height_px=2048, mpp=mpp)
    paint_slide(spec, tmp_path)
    check(*patches_of(tmp_path / f"{spec.slide_id}.svs", mpp))


def test_real_tissue_is_sharp_its_blurred_copies_are_not_and_glass_is_white(shared: Path) -> None:
    check(*patches_of(shared / "slides" / "CMU-1-Small-Region.svs", 0.499))


def by_the_rule(pixels: Pixels) -> int:
    bends, slopes, white, total = [], [], 0, 0
    for row in pixels[::16].astype(int):
        for before, at, after in zip(row[:-2], row[1:-1], row[2:], strict=True):
            total += 1
            if min(at) >= 215:
                white += 1
                continue
            bends.append((before[1] - 2 * at[1] + after[1]) ** 2)
            slopes.append((after[1] - before[1]) ** 2)
    if white / total >= 0.9:
        return FLAG_WHITE
    return FLAG_BLURRED if np.mean(bends) < 4 + 0.13 * np.mean(slopes) else 0


@given(data=st.data(), height=st.integers(1, 40), width=st.integers(3, 40))
def test_any_patch_is_judged_by_the_rule_as_it_is_written(data: st.DataObject, height: int, width: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    noise = rng.normal(data.draw(st.floats(150, 250)), data.draw(st.floats(0, 60)), (height, width, 3))
    smooth = gaussian_filter(noise, (0, data.draw(st.floats(0, 3)), 0))
    pixels = np.clip(smooth, 0, 255).astype(np.uint8)
    assert patch_flags(pixels) == by_the_rule(pixels)


@pytest.mark.parametrize(("white_rows", "flags"), [(9, FLAG_WHITE), (8, 0)])
def test_nine_tenths_of_near_white_are_white(white_rows: int, flags: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (160, 64, 3), dtype=np.uint8)
    pixels[: 16 * white_rows] = 215
    assert patch_flags(pixels) == flags
    pixels[: 16 * white_rows, :, 2] = 214
    assert patch_flags(pixels) & FLAG_WHITE == 0


def test_the_strongest_edges_of_a_large_patch_overflow_nothing() -> None:
    stripes = np.zeros((1024, 4096, 3), np.uint8)
    stripes[:, ::2] = 214
    assert patch_flags(stripes) == 0
    steps = np.repeat(np.array([0, 214], np.uint8), 2)
    assert patch_flags(np.broadcast_to(np.tile(steps, 1024)[None, :, None], (1024, 4096, 3))) == 0


@given(seed=st.integers(0, 1000))
def test_a_view_is_judged_like_its_copy(seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    view: Any = picture[10:74, 5:69]
    assert patch_flags(view) == patch_flags(view.copy())
