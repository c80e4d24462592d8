"""Keyed hashing of 64-bit words, vectorised.

Ids of samples, the order of shards, the order of training and every crop follow from it: a change of a constant is a
new version of the format and of the order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64Array = npt.NDArray[np.uint64]


def mix64(words: U64Array) -> U64Array:
    """splitmix64's finaliser, a bijection of 64-bit words that leaves 0 as it is; uint64 of any shape."""
    return mix64_in_place(words.copy())


def mix64_in_place(words: U64Array) -> U64Array:
    """`mix64`, written over its argument, which it returns: memory is what limits it."""
    shifted = words >> np.uint64(30)
    words ^= shifted
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= np.right_shift(words, np.uint64(27), out=shifted)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= np.right_shift(words, np.uint64(31), out=shifted)
    return words


def splitmix64(words: U64Array) -> U64Array:
    """Steele, Lea and Flood's splitmix64, a bijection of 64-bit words; uint64 of any shape."""
    return mix64_in_place(words + np.uint64(0x9E3779B97F4A7C15))


def order_keys(sample_id: U64Array, seed: int) -> U64Array:
    """The key that patches are sorted by: distinct for distinct ids, another order for every seed; uint64 [n]."""
    return splitmix64(sample_id ^ splitmix64(np.array([seed], np.uint64)))


def shard_numbers(keys: U64Array, num_shards: int) -> npt.NDArray[np.int64]:
    """floor(key * num_shards / 2^64), by the key's upper 32 bits: the product stays inside 64 bits; int64 [n]."""
    return ((keys >> np.uint64(32)) * np.uint64(num_shards) >> np.uint64(32)).astype(np.int64)
