from __future__ import annotations

import numpy as np
import pytest

from engine.data.locality import LOCALITY_VERSION, Blocks, BlockStream


@pytest.mark.parametrize(("num_rows", "block_rows", "window_blocks"), [(10_000, 16, 8), (10_007, 50, 3), (90, 100, 2)])
def test_a_window_reads_few_contiguous_pieces(num_rows: int, block_rows: int, window_blocks: int) -> None:
    stream = BlockStream(num_rows, 3, Blocks(block_rows, window_blocks))
    for epoch in range(3):
        rows = stream.rows(epoch * num_rows, num_rows)
        pieces = 0
        for first in range(0, num_rows, block_rows * window_blocks):
            window = np.sort(rows[first : first + block_rows * window_blocks])
            pieces = max(pieces, 1 + int((np.diff(window) > 1).sum()))
        assert pieces <= window_blocks + 1  # one block may pass the last row


def test_the_rows_of_a_window_are_mixed_and_windows_spread_over_all_rows() -> None:
    stream = BlockStream(100_000, 3, Blocks(100, 50))
    rows = stream.rows(0, 100_000)
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.01
    batch = rows[:256]
    assert len(np.unique(batch // 100)) > 40  # of the 50 blocks in the window
    assert abs(rows[:5000].mean() / 50_000 - 1) < 0.2


def test_epochs_seeds_and_block_borders_differ() -> None:
    stream = BlockStream(1000, 1, Blocks(10, 4))
    first, second = stream.rows(0, 1000), stream.rows(1000, 1000)
    assert (first == second).mean() < 0.02
    assert (first == BlockStream(1000, 2, Blocks(10, 4)).rows(0, 1000)).mean() < 0.02
    starts = {int(stream.rows(1000 * epoch, 40).min()) % 10 for epoch in range(60)}
    assert len(starts) > 7


@pytest.mark.parametrize("num_rows", [12, 11, 5])
def test_every_row_is_at_every_place_equally_often(num_rows: int) -> None:
    epochs = BlockStream(num_rows, 3, Blocks(3, 2)).rows(0, 4000 * num_rows).reshape(4000, num_rows)
    counts = np.bincount((np.arange(num_rows) * num_rows + epochs).ravel(), minlength=num_rows**2)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).mean() < 1 + 5 * np.sqrt(2 / len(counts))


def test_the_order_of_this_version_never_changes() -> None:
    # A change here is a new LOCALITY_VERSION: checkpoints of the old one would go on with other samples.
    assert LOCALITY_VERSION == "blocks-1"
    stream = BlockStream(1000, 42, Blocks(8, 4))
    assert stream.rows(996, 8).tolist() == [533, 527, 532, 530, 677, 684, 503, 678]
    assert BlockStream(2 * 10**9, 0, Blocks()).rows(10**12, 4).tolist() == [
        1523993833,
        754140015,
        1082106312,
        1453059807,
    ]
    assert stream.order == {"version": "blocks-1", "block_rows": 8, "window_blocks": 4}


def test_wrong_requests_are_refused() -> None:
    for block_rows, window_blocks in ((0, 1), (1, 0), (2**40, 2**40)):
        with pytest.raises(ValueError, match="block_rows and window_blocks"):
            Blocks(block_rows, window_blocks)
    with pytest.raises(ValueError, match="rows"):
        BlockStream(0, 1, Blocks())
    with pytest.raises(ValueError, match="seed"):
        BlockStream(5, -1, Blocks())
    with pytest.raises(ValueError, match="positions"):
        BlockStream(5, 1, Blocks()).rows(0, -1)
