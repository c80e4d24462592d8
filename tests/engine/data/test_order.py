from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.order import ORDER_VERSION, SampleStream, rank_positions

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 37, 100, 101, 997, 1024, 4093, 10007]


@pytest.mark.parametrize("num_rows", SIZES)
def test_each_epoch_holds_every_row_once(num_rows: int) -> None:
    epochs = SampleStream(num_rows, seed=5).rows(0, 3 * num_rows).reshape(3, num_rows)
    assert epochs.dtype == np.int64
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(num_rows))


@settings(deadline=None, max_examples=100)
@given(
    num_rows=st.integers(1, 500),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 10**12),
    count=st.integers(0, 1200),
    data=st.data(),
)
def test_any_range_equals_its_parts_and_epochs_stay_permutations(
    num_rows: int, seed: int, first: int, count: int, data: Any
) -> None:
    stream = SampleStream(num_rows, seed)
    rows = stream.rows(first, count)
    cut = data.draw(st.integers(0, count))
    assert np.array_equal(rows, np.concatenate([stream.rows(first, cut), stream.rows(first + cut, count - cut)]))
    epoch = first // num_rows
    assert len(set(stream.rows(epoch * num_rows, num_rows).tolist())) == num_rows


def test_a_row_at_a_time_equals_all_at_once() -> None:
    stream = SampleStream(37, seed=1)
    assert stream.rows(0, 150).tolist() == [int(stream.rows(p, 1)[0]) for p in range(150)]


def test_epochs_and_seeds_differ() -> None:
    stream = SampleStream(1000, seed=1)
    assert (stream.rows(0, 1000) == stream.rows(1000, 1000)).mean() < 0.02
    assert (stream.rows(0, 1000) == SampleStream(1000, seed=2).rows(0, 1000)).mean() < 0.02


@pytest.mark.parametrize("num_rows", [3, 4, 10, 50])
def test_places_and_successors_are_uniform(num_rows: int) -> None:
    epochs = SampleStream(num_rows, seed=3).rows(0, 5000 * num_rows).reshape(5000, num_rows)
    place_and_row = np.bincount((np.arange(num_rows) * num_rows + epochs).ravel(), minlength=num_rows**2)
    pairs = np.bincount((epochs[:, :-1] * num_rows + epochs[:, 1:]).ravel(), minlength=num_rows**2)
    pairs = pairs[~np.eye(num_rows, dtype=bool).ravel()]  # a row never follows itself inside an epoch
    for counts in (place_and_row, pairs):
        chi_square_per_cell = ((counts - counts.mean()) ** 2 / counts.mean()).mean()
        assert chi_square_per_cell < 1 + 5 * np.sqrt(2 / len(counts))


def test_two_billion_rows_need_no_memory() -> None:
    stream = SampleStream(2_000_000_000, seed=1)
    tracemalloc.start()
    rows = stream.rows(1_999_990_000, 20_000)  # crosses the end of an epoch
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20_000 * 8 * 40
    assert rows.min() >= 0
    assert rows.max() < 2_000_000_000
    assert len(np.unique(rows[:10_000])) == len(np.unique(rows[10_000:])) == 10_000
    assert abs(rows.mean() / 1e9 - 1) < 0.02


def test_the_order_of_this_version_never_changes() -> None:
    # A change here is a new ORDER_VERSION: checkpoints of the old one would go on with other samples.
    assert ORDER_VERSION == "feistel-1"
    assert SampleStream(1000, seed=42).rows(995, 10).tolist() == [686, 271, 361, 308, 685, 225, 783, 606, 997, 213]
    assert SampleStream(2_000_000_000, seed=0).rows(0, 4).tolist() == [1405722996, 953859868, 391507128, 777558473]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_a_step_in_equal_contiguous_parts(world_size: int) -> None:
    parts = [rank_positions(4, 6, rank, world_size) for rank in range(world_size)]
    batch = 6 * world_size
    assert [p for part in parts for p in part] == list(range(4 * batch, 5 * batch))
    assert {len(part) for part in parts} == {6}


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 does not exist"):
        rank_positions(0, 4, 2, 2)
    with pytest.raises(ValueError, match="rows"):
        SampleStream(0, seed=1)
    with pytest.raises(ValueError, match="seed"):
        SampleStream(5, seed=-1)
    with pytest.raises(ValueError, match="positions"):
        SampleStream(5, seed=1).rows(-1, 2)
