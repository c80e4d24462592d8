"""Numbers and histograms as they stand on a page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.figures import as_count, as_duration, as_number, as_share, as_size, binned, histogram


@given(st.lists(st.floats(0, 1e9) | st.integers(0, 10**7), min_size=1, max_size=50))
def test_a_histogram_counts_every_value_in_few_bins(values: list[float]) -> None:
    edges, counts = binned(values)
    assert counts.sum() == len(values)
    assert 1 <= len(counts) <= 26
    assert edges[0] >= 0
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0, "0 %"), (0.00001, "< 0.1 %"), (0.5, "50 %"), (0.99999, "> 99.9 %"), (1, "100 %")],
)
def test_a_share_that_is_not_all_does_not_look_like_all(value: float | None, said: str) -> None:
    assert as_share(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (25_300_000, "25.3 MB"), (10**18, "1,000 PB")]
)
def test_sizes(value: int, said: str) -> None:
    assert as_size(value) == said


@pytest.mark.parametrize(("value", "said"), [(0.04, "0.04 s"), (90, "90 s"), (600, "10 min"), (36e5, "1,000 h")])
def test_durations(value: float, said: str) -> None:
    assert as_duration(value) == said


@pytest.mark.parametrize(("value", "said"), [(None, "–"), (5, "5"), (0.49912, "0.4991"), (1234.5, "1,234")])
def test_numbers(value: float | None, said: str) -> None:
    assert as_number(value) == said


def test_a_histogram_draws_its_bars_to_scale() -> None:
    drawn = histogram("Patches a slide", "slide", np.array([0.0, 10.0, 20.0]), np.array([1, 4]))
    assert drawn.bars == [(0, 50, 25, "0 to 10: 1 slide"), (50, 50, 100, "10 to 20: 4 slides")]
    assert drawn.ticks == [(0, "0"), (50, "10"), (100, "20")]
    assert drawn.highest == "up to 4 slides"
    assert drawn.summary == "Histogram of 5 slides; the highest bar is 10 to 20: 4 slides."


def test_a_histogram_of_nothing_has_no_bars() -> None:
    assert histogram("Patches a slide", "slide", *binned([])).bars == []


def test_patches_have_a_plural_of_their_own() -> None:
    assert (as_count(1, "patch"), as_count(2000, "patch")) == ("1 patch", "2,000 patches")
