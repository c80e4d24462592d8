"""The order for classes of unequal size: each class gets its share of positions, whatever its number of rows.

Positions are counted in rounds. A round holds every class exactly `share` times, in an order of its own (a keyed
permutation), so the shares hold over any stretch of training and not only on average. The k-th time that a class comes,
it delivers member k of its own endless stream: passes, each of them a keyed permutation of the class's rows. A row is
never repeated before all others of its class have come; small classes pass more often than large ones.

Both k and the class follow from the position alone: nothing is counted, and any position is computed by itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import nearest
from engine.data.hashing import absorb, seed_state
from engine.data.order import Int64, check_stream, in_portions, permuted, position_range, round_keys, runs, split

WEIGHTED_VERSION = "weighted-1"
"""Names the algorithm below. It is stored in checkpoints: the same version always means the same order."""

_DOMAIN_ROUNDS = 4
_DOMAIN_MEMBERS = 5
_ROUND = 1 << 16  # positions of a round, about, where weights are no whole numbers
_TABLE_SLOTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Balance:
    """Balance a loader by the values of a column of index.parquet or slides.parquet: class, slide, patient, site.

    weights: how often each value comes, relative to the others; by default all come equally often. A value of weight 0
    never comes. Whole numbers hold exactly, others to 1/65536 of a round.
    """

    by: str
    weights: Mapping[str, float] | None = None


class WeightedStream:
    """The endless sequence of rows of weighted classes; interface of `order.Stream`.

    classes: integers [num_rows], the class of each row. shares: int64[number of classes], positions of a class in each
    round. Memory: 4 bytes a row (8 from 2**31 rows on), 32 bytes a class, and up to 8 MiB. `by` and `weights` are for
    `order` alone.
    """

    def __init__(
        self,
        classes: npt.NDArray[np.integer[Any]],
        shares: Int64,
        seed: int,
        *,
        by: str = "class",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        check_stream(len(classes), seed)
        self._num_rows, self._seed, self._shares = len(classes), seed, shares
        self._sizes = np.bincount(classes, minlength=len(shares)).astype(np.int64)
        if len(self._sizes) != len(shares) or shares.min() < 0 or shares.sum() == 0 or (shares[self._sizes == 0]).any():
            raise ValueError("shares hold one number from 0 on per class, at least one above 0, and 0 for an empty one")
        dtype = np.int32 if len(classes) < 2**31 else np.int64
        # numpy sorts 16 bits by radix, several times as fast.
        sortable = classes.astype(np.uint16) if len(shares) <= 1 << 16 else classes
        self._members = np.argsort(sortable, kind="stable").astype(dtype)
        self._member_firsts = np.cumsum(self._sizes) - self._sizes
        self._slot_ends = np.cumsum(shares)
        # A table is far faster than a search, where it is small.
        self._slot_classes = np.repeat(np.arange(len(shares)), shares) if shares.sum() <= _TABLE_SLOTS else None
        digest = hashlib.blake2b(classes.astype("<u4").tobytes(), digest_size=16)
        digest.update(shares.astype("<i8").tobytes())
        self._order = {
            "version": WEIGHTED_VERSION,
            "by": by,
            "weights": None if weights is None else dict(weights),
            "classes": digest.hexdigest(),
        }

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def order(self) -> dict[str, Any]:
        """Version, column, weights, and the BLAKE2b of every row's class and every class's share."""
        return self._order

    def rows(self, first: int, count: int) -> Int64:
        """Return the rows at positions [first, first + count), int64[count]; the range may cross rounds."""
        return self.rows_at(position_range(first, count))

    def rows_at(self, positions: Int64) -> Int64:
        """See `order.Stream.rows_at`."""
        return in_portions(self._portion, positions)

    def _portion(self, positions: Int64) -> Int64:
        rounds, places = split(positions, int(self._slot_ends[-1]))
        distinct, which = runs(rounds)
        round_states = absorb(seed_state(self._seed, _DOMAIN_ROUNDS), distinct.astype(np.uint64))
        slots = permuted(places, self._slot_ends[-1:], round_keys(round_states)[:, which])

        classes = self._class_of_slot(slots)
        shares, sizes = self._shares[classes], self._sizes[classes]
        turns = rounds * shares + slots - (self._slot_ends[classes] - shares)
        passes = turns // sizes
        pass_states = absorb(seed_state(self._seed, _DOMAIN_MEMBERS), classes.astype(np.uint64))
        pass_states = absorb(pass_states, passes.astype(np.uint64))
        members = permuted(turns - passes * sizes, sizes, round_keys(pass_states))
        return self._members[self._member_firsts[classes] + members].astype(np.int64)

    def _class_of_slot(self, slots: Int64) -> Int64:
        if self._slot_classes is not None:
            return self._slot_classes[slots]
        return np.searchsorted(self._slot_ends, slots, side="right")


def class_shares(labels: Sequence[str], weights: Mapping[str, float] | None) -> Int64:
    """Return the positions of each class in a round, int64[len(labels)]: whole numbers in the ratio of the weights.

    Raises ValueError for a class without weight, a weight without class, and weights that are negative or all 0.
    """
    if weights is None:
        return np.ones(len(labels), dtype=np.int64)
    known = set(labels)
    for label, weight in weights.items():
        if label not in known:
            raise ValueError(f"weights name {label!r}, which no selected row has{nearest(label, sorted(known))}")
        if not (math.isfinite(weight) and 0 <= weight <= 1 << 32):
            raise ValueError(f"the weight of {label!r} is {weight}; it has to be between 0 and 2**32")
    if missing := [label for label in labels if label not in weights]:
        raise ValueError(
            f"weights name no weight for {', '.join(map(repr, missing[:5]))}: give each class one, 0 for never"
        )
    values = [weights[label] for label in labels]
    total = sum(values)
    if total == 0:
        raise ValueError("all weights are 0: nothing would ever come")
    if all(float(value).is_integer() for value in values):
        whole = [int(value) for value in values]
        divisor = math.gcd(*whole)
        return np.array([value // divisor for value in whole], dtype=np.int64)
    return np.array([max(round(value / total * _ROUND), value > 0) for value in values], dtype=np.int64)
