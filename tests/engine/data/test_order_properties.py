"""What holds for every order, over sizes, seeds, portions, ranks and restarts."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.locality import Blocks, BlockStream
from engine.data.order import SampleStream, Stream, SubsetStream, rank_positions, substitute_position

SEEDS = st.integers(0, 2**64 - 1)


def streams(num_rows: Any) -> Any:
    """Streams of every kind whose epoch is a permutation, with the rows that they order."""
    blocks = st.builds(Blocks, st.integers(1, 300), st.integers(1, 40))
    orders = st.one_of(
        st.builds(SampleStream, num_rows, SEEDS),
        st.builds(BlockStream, num_rows, SEEDS, blocks),
    )
    # A subset of every third row, so that none of its rows is its own place.
    subsets = orders.map(lambda order: SubsetStream(order, np.arange(order.num_rows, dtype=np.int32) * 3 + 5))
    return st.one_of(orders, subsets)


def rows_of(stream: Stream) -> Any:
    return stream.subset if isinstance(stream, SubsetStream) else np.arange(stream.num_rows)


@settings(deadline=None, max_examples=700)
@given(stream=streams(st.integers(1, 2000)), epoch=st.integers(0, 10**9))
def test_each_epoch_holds_each_row_once(stream: Stream, epoch: int) -> None:
    rows = stream.rows(epoch * stream.num_rows, stream.num_rows)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), rows_of(stream))


@settings(deadline=None, max_examples=20)
@given(stream=streams(st.integers(100_000, 1_000_000)))
def test_large_epochs_hold_each_row_once(stream: Stream) -> None:
    portions = [stream.rows(first, min(65_536, stream.num_rows - first)) for first in range(0, stream.num_rows, 65_536)]
    assert np.array_equal(np.sort(np.concatenate(portions)), rows_of(stream))


@settings(deadline=None, max_examples=700)
@given(
    stream=streams(st.integers(1, 1_000_000)),
    first=st.integers(0, 10**12),
    count=st.integers(0, 700),
    cut=st.floats(0, 1),
)
def test_any_portion_equals_its_parts(stream: Stream, first: int, count: int, cut: float) -> None:
    rows = stream.rows(first, count)
    part = int(cut * count)
    assert np.array_equal(rows, np.concatenate([stream.rows(first, part), stream.rows(first + part, count - part)]))
    assert count == 0 or rows[-1] == stream.rows(first + count - 1, 1)[0]


@settings(deadline=None, max_examples=700)
@given(
    stream=streams(st.integers(1, 500)),
    runs=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_restarts_with_any_world_size_and_batch_deliver_the_stream(
    stream: Stream, runs: list[tuple[int, int, int]]
) -> None:
    seen, delivered = 0, []
    for world_size, batch_size_per_rank, steps in runs:
        for step in range(steps):
            parts = [
                rank_positions(step, batch_size_per_rank, rank, world_size, first=seen) for rank in range(world_size)
            ]
            assert {len(part) for part in parts} == {batch_size_per_rank}  # nobody has a step or a sample more
            batch = [position for part in parts for position in part]
            first = seen + step * world_size * batch_size_per_rank
            assert batch == list(range(first, first + world_size * batch_size_per_rank))
            delivered.append(stream.rows(batch[0], len(batch)))
        seen += steps * world_size * batch_size_per_rank
    together = np.concatenate([np.empty(0, np.int64), *delivered])
    assert np.array_equal(together, stream.rows(0, seen))
    whole = seen // stream.num_rows
    epochs = np.sort(together[: whole * stream.num_rows].reshape(whole, stream.num_rows), axis=1)
    assert np.array_equal(epochs, np.broadcast_to(rows_of(stream), epochs.shape))


@pytest.mark.parametrize("stream", [SampleStream(2 * 10**9, 1), BlockStream(2 * 10**9, 1, Blocks())])
def test_two_billion_rows_need_no_memory(stream: Stream) -> None:
    tracemalloc.start()
    rows = stream.rows(2 * 10**9 - 5000, 10_000)  # crosses the end of an epoch
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000 * 8 * 60
    assert rows.min() >= 0
    assert rows.max() < 2 * 10**9
    assert len(np.unique(rows[:5000])) == len(np.unique(rows[5000:])) == 5000


def test_a_substitute_has_a_position_of_its_own() -> None:
    found = {
        substitute_position(seed, position, attempt) for seed in (0, 1) for position in (7, 8) for attempt in (0, 1)
    }
    assert len(found) == 8
    assert all(0 <= position < 2**62 for position in found)
    # The same bad sample has the same substitute after a restart, and in later versions.
    assert substitute_position(42, 7, 1) == 2851400444076415816
