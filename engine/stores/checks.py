"""What may go into a store: one identity for all, arrays that fit together, and values that its dtype can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]

# An array is an attribute of `SlideEmbeddings`, which has these besides.
RESERVED_NAMES = frozenset({"array", "attributes", "folder", "names", "rows", "sha256", "shape", "slide_id", "table"})


def difference(found: Any, expected: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    """(key, found, expected) of the first value that differs in JSON, keys sorted; None where all are equal."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            inner = difference(found.get(key), expected.get(key), f"{prefix}.{key}" if prefix else key)
            if inner is not None:
                return inner
        return None
    return None if found == expected else (prefix.removeprefix("identity."), found, expected)


def float_dtype(identity: Mapping[str, Any]) -> np.dtype[Any]:
    """What floats are stored as. Raises ValueError for anything but float16 and float32."""
    name = identity.get("dtype", "float16")
    if name not in ("float16", "float32"):
        raise ValueError(f"dtype {name}: embeddings are stored as float16 or float32.")
    return np.dtype(name)


def checked_arrays(slide_id: str, arrays: Mapping[str, Array], num_rows: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    """The arrays as they are stored: floats as `dtype`. Raises ValueError; see `write_slide`."""
    missing = {"embedding", "xy0"} - arrays.keys()
    if missing:
        raise ValueError(f"slide {slide_id}: there is no array {min(missing)}; expected embedding and xy0 at least.")
    stored = {}
    for name, values in arrays.items():
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in RESERVED_NAMES:
            raise ValueError(f"slide {slide_id}: an array cannot be called {name!r}.")
        if values.ndim == 0 or len(values) != num_rows:
            raise ValueError(f"slide {slide_id}: {name} has shape {list(values.shape)}, expected {num_rows} rows.")
        if values.dtype.kind not in "fiub":
            raise ValueError(f"slide {slide_id}: {name} is {values.dtype}, expected floats, integers or booleans.")
        stored[name] = values if values.dtype.kind != "f" else _rounded(slide_id, name, values, dtype)
    xy0 = stored["xy0"]
    if xy0.dtype != np.int32 or xy0.shape != (num_rows, 2):
        raise ValueError(f"slide {slide_id}: xy0 is {xy0.dtype} {list(xy0.shape)}, expected int32 [{num_rows}, 2].")
    return stored


def _rounded(slide_id: str, name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
        place = tuple(int(index[0]) for index in np.nonzero(~np.isfinite(rounded)))
        value = values[place]
        what = f"overflows {dtype} (dtype=float32 holds it)" if np.isfinite(value) else "is not finite"
        raise ValueError(f"slide {slide_id}: {name}{list(place)} = {value} {what}.")
    return rounded


def checked_rows(slide_id: str, rows: pa.Table) -> pa.Table:
    """`rows` with the slide's id as first column."""
    if "slide_id" in rows.column_names:
        if set(rows.column("slide_id").unique().to_pylist()) - {slide_id}:
            raise ValueError(f"slide {slide_id}: its rows name another slide in their column slide_id.")
        rows = rows.drop_columns("slide_id")
    ids = pa.array([slide_id] * rows.num_rows, pa.string())
    return rows.add_column(0, "slide_id", ids).replace_schema_metadata(None).combine_chunks()
