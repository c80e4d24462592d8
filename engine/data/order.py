"""The order of training: an endless stream of samples, computed and never stored.

Position p lies in epoch p // num_rows; each epoch is a keyed permutation of all rows. The permutation is a Feistel
network over mixed radices: a row is written as (left, right) with left < a, right < b and a * b just above num_rows,
so that one evaluation per row is nearly always enough (a network over a power of two needs up to four), and memory
does not depend on the number of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.data.hashing import absorb, seed_state
from sharding.hashing import U64Array, mix64

ORDER_VERSION = "feistel-1"
"""Names the algorithm below. It is stored in checkpoints: the same version always means the same order."""

_DOMAIN = 1
_ROUNDS = 8  # four leave small permutations visibly uneven
_MAX_ROWS = 1 << 62  # keeps both radices below 2**32, which _below relies on


def _below(hashes: U64Array, bound: int) -> U64Array:
    """Map hashes to [0, bound) by multiply and shift; bound < 2**32, and the bias, bound / 2**32, cannot be seen."""
    return ((hashes >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The endless sequence of rows that `num_rows` samples and a seed stand for."""

    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_rows <= _MAX_ROWS:
            raise ValueError(f"a stream needs between 1 and 2**62 rows, not {self.num_rows}")
        seed_state(self.seed, _DOMAIN)  # refuses a seed out of range

    def rows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the rows at positions [first, first + count), int64[count]; the range may cross epochs."""
        if first < 0 or count < 0:
            raise ValueError(f"positions start at 0: asked for {count} positions from {first}")
        positions = np.arange(first, first + count, dtype=np.int64)
        if count == 0:
            return positions
        epochs = positions // self.num_rows
        places = (positions - epochs * self.num_rows).astype(np.uint64)
        first_epoch, last_epoch = int(epochs[0]), int(epochs[-1])
        keys = self._round_keys(first_epoch, last_epoch)
        # One epoch is the common case, and scalars broadcast faster than a key per position.
        per_place = keys if first_epoch == last_epoch else keys[:, epochs - first_epoch]
        return self._permute(places, per_place).astype(np.int64)

    def _round_keys(self, first_epoch: int, last_epoch: int) -> U64Array:
        """Return one key per round and epoch, uint64[_ROUNDS, epochs]."""
        epochs = np.arange(first_epoch, last_epoch + 1, dtype=np.uint64)
        state = absorb(seed_state(self.seed, _DOMAIN), epochs)
        return absorb(state[None, :], np.arange(_ROUNDS, dtype=np.uint64)[:, None])

    def _permute(self, places: U64Array, keys: U64Array) -> U64Array:
        """Permute places (uint64[n], each < num_rows) under keys (uint64[_ROUNDS, n or 1])."""
        permuted = self._feistel(places, keys)
        outside = np.flatnonzero(permuted >= self.num_rows)
        # Walk the cycle: going on from a value outside [0, num_rows) must come back inside, because the network
        # permutes [0, a * b); and no two walks end in the same row.
        while outside.size:
            outside_keys = keys if keys.shape[1] == 1 else keys[:, outside]
            permuted[outside] = self._feistel(permuted[outside], outside_keys)
            outside = outside[permuted[outside] >= self.num_rows]
        return permuted

    def _feistel(self, values: U64Array, keys: U64Array) -> U64Array:
        """Apply the network to values (uint64[n], each < a * b) under keys (uint64[_ROUNDS, n or 1])."""
        radix_left = math.isqrt(self.num_rows - 1) + 1  # rounded up: at 1, three rows would only ever rotate
        radix_right = -(-self.num_rows // radix_left)
        left = values // np.uint64(radix_right)
        right = values - left * np.uint64(radix_right)
        for number, key in enumerate(keys):
            # Each round adds to one half a function of the other one, modulo the half's own radix: a bijection.
            if number % 2 == 0:
                left += _below(mix64(right ^ key), radix_left)
                left -= (left >= radix_left) * np.uint64(radix_left)
            else:
                right += _below(mix64(left ^ key), radix_right)
                right -= (right >= radix_right) * np.uint64(radix_right)
        return left * np.uint64(radix_right) + right


def rank_positions(step: int, batch_size_per_rank: int, rank: int, world_size: int, *, first: int = 0) -> range:
    """Return the positions that a rank reads in a step: its equal, contiguous part of [step * B, (step + 1) * B).

    B = batch_size_per_rank * world_size is the global batch. `first` is the position at which step 0 starts, for a run
    that goes on from any number of samples. Raises ValueError for a rank outside [0, world_size).
    """
    if step < 0 or first < 0:
        raise ValueError(f"step and first position start at 0, not at {step} and {first}")
    if batch_size_per_rank < 1:
        raise ValueError(f"batch_size_per_rank is {batch_size_per_rank}; it has to be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist among world_size={world_size} ranks")
    start = first + (step * world_size + rank) * batch_size_per_rank
    return range(start, start + batch_size_per_rank)
