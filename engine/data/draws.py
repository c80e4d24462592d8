"""Random numbers that belong to a sample, not to a process.

A draw is a pure function of (seed, position, view, draw index): the same whatever the batch, rank, thread or restart.
This is part of the format, named by `DRAWS_VERSION`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.data.hashing import absorb, seed_state

DRAWS_VERSION = "splitmix-1"
"""Names the algorithm below. It is stored in checkpoints: the same version always means the same draws."""

_DOMAIN = 2


def uniforms(seed: int, positions: npt.NDArray[np.int64], view: int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` uniform numbers for each stream position, float64[len(positions), count] in [0, 1).

    positions: int64[n], each >= 0. view: index of the view, so that the views of a sample draw independently. Draw j of
    a sample does not change when `count` does.
    """
    state = absorb(seed_state(seed, _DOMAIN), positions.astype(np.uint64))
    state = absorb(state, np.array([view], dtype=np.uint64))
    bits = absorb(state[:, None], np.arange(count, dtype=np.uint64)[None, :])
    # The upper 53 bits are all that a float64 in [0, 1) can hold; the result cannot round up to 1.
    return (bits >> np.uint64(11)) * 2.0**-53
