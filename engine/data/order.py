"""The order of training: an endless stream of samples, computed and never stored.

Position p lies in epoch p // num_rows; each epoch is a keyed permutation of all rows. The permutation is a Feistel
network over mixed radices: a row is written as (left, right) with left < a, right < b and a * b just above num_rows,
so that one evaluation per row is nearly always enough (a network over a power of two needs up to four), and memory
does not depend on the number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.data.hashing import absorb, seed_state
from sharding.hashing import U64Array, mix64_in_place

Int64 = npt.NDArray[np.int64]

ORDER_VERSION = "feistel-1"
"""Names the algorithm below. It is stored in checkpoints: the same version always means the same order."""

_DOMAIN = 1
_DOMAIN_SUBSTITUTES = 6
_ROUNDS = 8  # four leave small permutations visibly uneven
_PORTION = 1 << 15
_MAX_ROWS = 1 << 62  # keeps both radices below 2**32, which _below relies on


class Stream(Protocol):
    """An endless order of samples: position p holds the same row whoever asks, in whatever portions."""

    @property
    def num_rows(self) -> int:
        """Rows are in [0, num_rows)."""
        ...

    @property
    def seed(self) -> int: ...

    @property
    def order(self) -> str | dict[str, Any]:
        """The algorithm's version and settings, as JSON holds them: what a checkpoint stores of the order."""
        ...

    def rows(self, first: int, count: int) -> Int64:
        """Return the rows at positions [first, first + count), int64[count]. Raises ValueError for a negative one."""
        ...

    def rows_at(self, positions: Int64) -> Int64:
        """Return the rows at positions (int64[n], each >= 0, ascending), int64[n]."""
        ...


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The endless sequence of rows that `num_rows` samples and a seed stand for."""

    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        check_stream(self.num_rows, self.seed)

    @property
    def order(self) -> str:
        return ORDER_VERSION

    def rows(self, first: int, count: int) -> Int64:
        """Return the rows at positions [first, first + count), int64[count]; the range may cross epochs."""
        return self.rows_at(position_range(first, count))

    def rows_at(self, positions: Int64) -> Int64:
        """See `Stream.rows_at`."""
        return in_portions(self._portion, positions)

    def _portion(self, positions: Int64) -> Int64:
        epochs, places = split(positions, self.num_rows)
        # Ascending positions lie in few epochs: their keys are made once each, and one alone broadcasts faster.
        distinct, which = runs(epochs)
        keys = round_keys(absorb(seed_state(self.seed, _DOMAIN), distinct.astype(np.uint64)))
        return permuted(places, np.array([self.num_rows]), keys[:, which] if keys.shape[1] > 1 else keys)


@dataclass(frozen=True, slots=True)
class SubsetStream:
    """A stream over the rows of a subset: `stream` orders places in `subset` (int32 or int64[num_rows])."""

    stream: Stream
    subset: npt.NDArray[np.signedinteger]

    def __post_init__(self) -> None:
        assert self.stream.num_rows == len(self.subset)

    @property
    def num_rows(self) -> int:
        return len(self.subset)

    @property
    def seed(self) -> int:
        return self.stream.seed

    @property
    def order(self) -> str | dict[str, Any]:
        return self.stream.order

    def rows(self, first: int, count: int) -> Int64:
        """Return the rows of the whole at positions [first, first + count), int64[count]."""
        return self.subset[self.stream.rows(first, count)].astype(np.int64)

    def rows_at(self, positions: Int64) -> Int64:
        """See `Stream.rows_at`."""
        return self.subset[self.stream.rows_at(positions)].astype(np.int64)


def check_stream(num_rows: int, seed: int) -> None:
    """Raise ValueError where no stream of so many rows or with such a seed can be."""
    if not 1 <= num_rows <= _MAX_ROWS:
        raise ValueError(f"a stream needs between 1 and 2**62 rows, not {num_rows}")
    seed_state(seed, _DOMAIN)  # refuses a seed out of range


def position_range(first: int, count: int) -> Int64:
    """Return the positions [first, first + count), int64[count]. Raises ValueError for a negative one."""
    if first < 0 or count < 0:
        raise ValueError(f"positions start at 0: asked for {count} positions from {first}")
    return np.arange(first, first + count, dtype=np.int64)


def in_portions(rows_of: Callable[[Int64], Int64], positions: Int64) -> Int64:
    """Apply `rows_of` to portions whose intermediate results stay in a core's cache; int64[len(positions)]."""
    if len(positions) <= _PORTION:
        return rows_of(positions)
    rows = np.empty(len(positions), np.int64)
    for start in range(0, len(positions), _PORTION):
        rows[start : start + _PORTION] = rows_of(positions[start : start + _PORTION])
    return rows


def split(positions: Int64, length: int) -> tuple[Int64, Int64]:
    """Split positions, int64[n], into epochs of `length` and places within them, each int64[n]."""
    epochs = positions // length
    return epochs, positions - epochs * length


def runs(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Int64]:
    """Return the value of each run of equal neighbours, and for each element the number of its run, int64[n]."""
    starts = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return values[starts], np.cumsum(starts) - 1


def round_keys(states: U64Array) -> U64Array:
    """Return the keys of one permutation per state (uint64[n]), uint64[rounds, n], as `permuted` takes them."""
    return absorb(states[None, :], np.arange(_ROUNDS, dtype=np.uint64)[:, None])


def permuted(places: Int64, sizes: Int64, keys: U64Array) -> Int64:
    """Permute each place within [0, its size) under its keys, int64[n].

    places: int64[n], each in [0, size). sizes: int64[n], or [1] for all of them, in [1, 2**62]. keys: uint64[rounds, n
    or 1]. Places of one size and one key never collide.
    """
    values, bounds = places.astype(np.uint64), sizes.astype(np.uint64)
    result = _feistel(values, bounds, keys)
    outside = np.flatnonzero(result >= bounds)
    # Walk the cycle: going on from a value outside [0, size) must come back inside, because the network permutes
    # [0, a * b); and no two walks end in the same row.
    while outside.size:
        outside_bounds = bounds if len(bounds) == 1 else bounds[outside]
        outside_keys = keys if keys.shape[1] == 1 else keys[:, outside]
        result[outside] = _feistel(result[outside], outside_bounds, outside_keys)
        outside = outside[result[outside] >= outside_bounds]
    return result.astype(np.int64)


def _feistel(values: U64Array, sizes: U64Array, keys: U64Array) -> U64Array:
    """Apply the network to values (uint64[n], each < a * b) of sizes (uint64[n or 1])."""
    radix_left = _ceil_sqrt(sizes)  # rounded up: at 1, three rows would only ever rotate
    radix_right = -(-sizes.astype(np.int64) // radix_left.astype(np.int64)).astype(np.uint64)
    left = values // radix_right
    right = values - left * radix_right
    for number, key in enumerate(keys):
        # Each round adds to one half a function of the other one, modulo the half's own radix: a bijection.
        if number % 2 == 0:
            _add_below(left, right ^ key, radix_left)
        else:
            _add_below(right, left ^ key, radix_right)
    left *= radix_right
    left += right
    return left


def _add_below(half: U64Array, words: U64Array, radix: U64Array) -> None:
    """Add to `half`, modulo its radix, a hash of `words` in [0, radix); both arrays are overwritten.

    The hash comes by multiply and shift: radix < 2**32, and the bias, radix / 2**32, cannot be seen.
    """
    hashes = mix64_in_place(words)
    hashes >>= np.uint64(32)
    hashes *= radix
    hashes >>= np.uint64(32)
    half += hashes
    # Where it is below the radix the difference wraps to a huge number, and the smaller of both is right.
    np.minimum(half, np.subtract(half, radix, out=hashes), out=half)


def _ceil_sqrt(sizes: U64Array) -> U64Array:
    """Return the smallest whole number whose square is at least the size, exactly; sizes in [1, 2**62]."""
    root = np.sqrt(sizes.astype(np.float64)).astype(np.uint64)  # wrong by at most 1 above 2**52
    root -= root * root >= sizes
    root += root * root < sizes
    return root


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


def planned_rows(
    stream: Stream, batch_size_per_rank: int, rank: int, world_size: int, *, first: int = 0, at_once: int = 1 << 15
) -> Iterator[tuple[Int64, Int64]]:
    """Yield positions and rows of a rank's batches, int64[batch_size_per_rank] each, step after step, without end.

    The positions are those of `rank_positions`. at_once: how many are computed together, about; the result is the
    same, and a stream is some ten times as fast as by 256.
    """
    steps = np.arange(max(1, at_once // batch_size_per_rank))[:, None]
    for done in itertools.count(0, len(steps)):
        starts = first + ((done + steps) * world_size + rank) * batch_size_per_rank
        positions = starts + np.arange(batch_size_per_rank)
        yield from zip(positions, stream.rows_at(positions.reshape(-1)).reshape(positions.shape), strict=True)


def substitute_position(seed: int, position: int, attempt: int) -> int:
    """Return the position, in [0, 2**62), whose row stands in for a bad sample: a hash, so that no other row moves.

    attempt: 0 at first, 1 where that row is bad too, and so on.
    """
    state = absorb(seed_state(seed, _DOMAIN_SUBSTITUTES), np.array([position], dtype=np.uint64))
    return int(absorb(state, np.array([attempt], dtype=np.uint64))[0]) >> 2
