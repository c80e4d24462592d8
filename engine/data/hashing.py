"""Keyed 64-bit hashing with numpy: the source of every random choice of the loader.

Part of the format: changing a constant here changes the order of training and every crop, so it needs a new
`ORDER_VERSION` and `DRAWS_VERSION`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def mix64(words: U64) -> U64:
    """Scramble every word by splitmix64's finaliser, a bijection of 64-bit words (uint64 in, uint64 out)."""
    mixed = words ^ (words >> np.uint64(30))
    mixed *= _MULTIPLY_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MULTIPLY_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


def seed_state(seed: int, domain: int) -> U64:
    """Return the uint64[1] state that a seed in [0, 2**64) and a domain number stand for.

    The domain keeps the order of the samples and the draws of a sample apart although both use the same seed.
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed is {seed}; it has to be in [0, 2**64)")
    # Arrays of one element, not scalars: numpy wraps arrays silently and warns about scalars.
    state = mix64(np.array([seed], dtype=np.uint64) + _GAMMA)
    return absorb(state, np.array([domain], dtype=np.uint64))


def absorb(state: U64, words: U64) -> U64:
    """Fold words into states (uint64 arrays of broadcastable shapes); for one state, different words never collide."""
    return mix64((state ^ words) + _GAMMA)
