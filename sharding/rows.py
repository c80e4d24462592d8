"""The rows of patches on their way from plan to shard: what a patch is, and where its bytes lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# One patch, 64 bytes. `source` numbers the files that bytes come from. A payload is head number `head` of its source
# followed by the `length` bytes at `offset` of its file, and `crc32` is the payload's. With head RAW these bytes are a
# TIFF tile as it lies in the slide; where it was not looked at yet crc32 is 0. `region` is -1 where there is none.
ROW = np.dtype(
    [
        ("sample_id", "<u8"),
        ("offset", "<u8"),
        ("region", "<i8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("source", "<u4"),
        ("head", "<u4"),
        ("x0", "<i4"),
        ("y0", "<i4"),
        ("row", "<i4"),
        ("col", "<i4"),
        ("tissue_fraction", "<f4"),
        ("flags", "<u4"),
    ]
)
Rows = npt.NDArray[np.void]

RAW = 0xFFFFFFFF
NO_REGION = -1
