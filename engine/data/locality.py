"""The order for storage without fast random reads: blocks of neighbouring rows, shuffled inside a bounded window.

An epoch shifts all rows by a number of its own (modulo the number of rows) and cuts them into blocks of `block_rows`,
so that blocks begin elsewhere in every epoch. The blocks are visited in a keyed permutation, one that is shorter last.
`window_blocks` successive ones are a window, and the rows of a window are permuted together. Hence each epoch is a
permutation of all rows, a position is computed alone, in O(1) memory, and a window reads `window_blocks` contiguous
pieces (one more where a block passes the end of the rows or of a shard).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.hashing import absorb, seed_state
from engine.data.order import Int64, check_stream, in_portions, permuted, position_range, round_keys, split
from sharding.hashing import U64Array

LOCALITY_VERSION = "blocks-1"
"""Names the algorithm below. It is stored in checkpoints: the same version always means the same order."""

_DOMAIN = 3
_BLOCKS, _SHIFT, _WINDOWS = 0, 1, 2  # what the keys of an epoch are for


@dataclass(frozen=True, slots=True)
class Blocks:
    """How near to each other rows are read: block_rows in one piece, window_blocks pieces at a time.

    A batch mixes rows of window_blocks places of the dataset. Larger blocks read faster, larger windows shuffle better.
    """

    block_rows: int = 256
    window_blocks: int = 64

    def __post_init__(self) -> None:
        if self.block_rows < 1 or self.window_blocks < 1 or self.block_rows * self.window_blocks > 1 << 62:
            raise ValueError(
                f"block_rows and window_blocks are {self.block_rows} and {self.window_blocks}; each has to be at least "
                "1, and their product at most 2**62"
            )


@dataclass(frozen=True, slots=True)
class BlockStream:
    """The endless sequence of `num_rows` rows, neighbours near each other; interface of `order.Stream`."""

    num_rows: int
    seed: int
    blocks: Blocks

    def __post_init__(self) -> None:
        check_stream(self.num_rows, self.seed)

    @property
    def order(self) -> dict[str, Any]:
        return {
            "version": LOCALITY_VERSION,
            "block_rows": self.blocks.block_rows,
            "window_blocks": self.blocks.window_blocks,
        }

    def rows(self, first: int, count: int) -> Int64:
        """Return the rows at positions [first, first + count), int64[count]; the range may cross epochs."""
        return self.rows_at(position_range(first, count))

    def rows_at(self, positions: Int64) -> Int64:
        """See `order.Stream.rows_at`."""
        return in_portions(self._portion, positions)

    def _portion(self, positions: Int64) -> Int64:
        epochs, places = split(positions, self.num_rows)
        block_rows, window_blocks = self.blocks.block_rows, self.blocks.window_blocks
        windows = places // (block_rows * window_blocks)
        # A window's keys are made once: its positions follow each other.
        starts = np.ones(len(positions), dtype=bool)
        starts[1:] = (windows[1:] != windows[:-1]) | (epochs[1:] != epochs[:-1])
        which = np.cumsum(starts) - 1
        epoch_states = absorb(seed_state(self.seed, _DOMAIN), epochs[starts].astype(np.uint64))
        window_states = absorb(_state_for(epoch_states, _WINDOWS), windows[starts].astype(np.uint64))

        window_firsts = windows * (block_rows * window_blocks)
        window_sizes = np.minimum(self.num_rows - window_firsts, block_rows * window_blocks)
        within = permuted(places - window_firsts, window_sizes, round_keys(window_states)[:, which])

        turns = windows * window_blocks + within // block_rows
        full_blocks = self.num_rows // block_rows
        block_keys = round_keys(_state_for(epoch_states, _BLOCKS))[:, which]
        blocks = permuted(np.minimum(turns, max(full_blocks - 1, 0)), np.array([max(full_blocks, 1)]), block_keys)
        blocks[turns == full_blocks] = full_blocks  # the shorter block keeps its turn, the last one
        shifts = (_state_for(epoch_states, _SHIFT) % np.uint64(self.num_rows)).astype(np.int64)[which]
        return (blocks * block_rows + within % block_rows + shifts) % self.num_rows


def _state_for(epoch_states: U64Array, purpose: int) -> U64Array:
    return absorb(epoch_states, np.array([purpose], dtype=np.uint64))
