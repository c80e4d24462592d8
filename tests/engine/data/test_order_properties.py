"""What holds for every order, over sizes, seeds, portions, ranks and restarts."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.locality import Blocks, BlockStream
from engine.data.order import (
    SampleStream,
    Stream,
    SubsetStream,
    planned_rows,
    rank_positions,
    substitute_position,
)
from engine.data.weighted import WeightedStream

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


RUNS = st.lists(  # (world size, batch per rank, steps) between restarts
    st.tuples(st.integers(1, 64), st.integers(1, 200), st.integers(0, 3)), min_size=1, max_size=4
)


def deliver(stream: Stream, runs: list[tuple[int, int, int]], *, at_once: int) -> Any:
    """Return what all ranks deliver together, in the order of positions; each run goes on where the last one ended."""
    seen, delivered = 0, [np.empty(0, np.int64)]
    for world_size, size, steps in runs:
        planned = [
            list(itertools.islice(planned_rows(stream, size, rank, world_size, first=seen, at_once=at_once), steps))
            for rank in range(world_size)
        ]
        for step in range(steps):
            positions = np.concatenate([of_rank[step][0] for of_rank in planned])
            assert {len(of_rank[step][1]) for of_rank in planned} == {size}  # nobody has a sample more
            assert np.array_equal(positions, np.arange(seen, seen + world_size * size))
            parts = [rank_positions(0, size, rank, world_size, first=seen) for rank in range(world_size)]
            assert [of_rank[step][0][0] for of_rank in planned] == [part.start for part in parts]
            delivered += [of_rank[step][1] for of_rank in planned]
            seen += world_size * size
    return np.concatenate(delivered)


def assert_each_row_once_per_epoch(stream: Stream, delivered: Any) -> None:
    whole = len(delivered) // stream.num_rows
    epochs = np.sort(delivered[: whole * stream.num_rows].reshape(whole, stream.num_rows), axis=1)
    assert np.array_equal(epochs, np.broadcast_to(rows_of(stream), epochs.shape))


@settings(deadline=None, max_examples=400)
@given(stream=streams(st.integers(1, 2000)), runs=RUNS, at_once=st.integers(1, 2000))
def test_restarts_with_any_world_size_and_batch_deliver_the_stream(
    stream: Stream, runs: list[tuple[int, int, int]], at_once: int
) -> None:
    delivered = deliver(stream, runs, at_once=at_once)
    assert np.array_equal(delivered, stream.rows(0, len(delivered)))
    assert_each_row_once_per_epoch(stream, delivered)


@settings(deadline=None, max_examples=30)
@given(
    stream=streams(st.integers(20_000, 1_000_000)),
    shapes=st.lists(st.tuples(st.integers(1, 64), st.integers(32, 2000)), min_size=1, max_size=4),
)
def test_large_epochs_are_whole_whatever_world_sizes_they_are_read_with(
    stream: Stream, shapes: list[tuple[int, int]]
) -> None:
    # Together one epoch and a little more, the world size changing inside it.
    runs = [(ranks, size, stream.num_rows // (len(shapes) * ranks * size) + 1) for ranks, size in shapes]
    delivered = deliver(stream, runs, at_once=1 << 13)
    assert len(delivered) >= stream.num_rows
    assert_each_row_once_per_epoch(stream, delivered)


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    data=st.data(),
    seed=SEEDS,
    runs=RUNS,
    at_once=st.integers(1, 2000),
)
def test_weighted_classes_keep_their_shares_over_restarts(
    sizes: list[int], data: Any, seed: int, runs: list[tuple[int, int, int]], at_once: int
) -> None:
    shares = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes))), np.int64)
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.uint32)
    stream = WeightedStream(classes, shares, seed)
    delivered = deliver(stream, runs, at_once=at_once)
    assert np.array_equal(delivered, stream.rows(0, len(delivered)))
    length = int(shares.sum())
    rounds = len(delivered) // length
    for each in classes[delivered[: rounds * length]].reshape(rounds, length):
        assert np.array_equal(np.bincount(each, minlength=len(sizes)), shares)
    # Turn after turn a class passes through its members: none comes twice before all others have.
    for number, share in enumerate(shares):
        passes = rounds * share // sizes[number]
        counts = np.bincount(delivered[: rounds * length], minlength=len(classes))[classes == number]
        assert passes <= counts.min() <= counts.max() <= passes + 1


@settings(deadline=None, max_examples=200)
@given(stream=streams(st.integers(1, 10_000)), data=st.data())
def test_rows_at_any_positions_are_those_of_the_stream(stream: Stream, data: Any) -> None:
    positions = np.array(sorted(data.draw(st.lists(st.integers(0, 10**12), max_size=40))), np.int64)
    rows = stream.rows_at(positions)
    assert rows.dtype == np.int64
    assert rows.tolist() == [int(stream.rows(position, 1)[0]) for position in positions.tolist()]


@pytest.mark.parametrize("stream", [SampleStream(2 * 10**9, 1), BlockStream(2 * 10**9, 1, Blocks())])
def test_a_million_rows_of_two_billion_take_the_memory_of_the_result(stream: Stream) -> None:
    tracemalloc.start()
    rows = stream.rows(2 * 10**9 - 500_000, 1_000_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * rows.nbytes + (32 << 20)  # positions, rows, and the intermediate results of a portion


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
