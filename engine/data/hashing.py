"""Keyed hashing of seeds and positions: the source of every random choice of the loader.

Part of the format: a change here changes the order of training and every crop, so it needs a new `ORDER_VERSION` and
`DRAWS_VERSION`.
"""

from __future__ import annotations

import numpy as np

from sharding.hashing import U64Array, splitmix64


def seed_state(seed: int, domain: int) -> U64Array:
    """Return the uint64[1] state that a seed in [0, 2**64) and a domain number stand for.

    The domain keeps the order of the samples and the draws of a sample apart although both use the same seed.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it has to be a whole number in [0, 2**64)")
    # Arrays of one element, not scalars: numpy wraps arrays silently and warns about scalars.
    return absorb(splitmix64(np.array([seed], np.uint64)), np.array([domain], np.uint64))


def absorb(state: U64Array, words: U64Array) -> U64Array:
    """Fold words into states (uint64 arrays of broadcastable shapes); for one state, different words never collide."""
    return splitmix64(state ^ words)
