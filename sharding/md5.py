"""The MD5 of a file: what GDC and `md5sum` record. It tells rot, not tampering."""

from __future__ import annotations

import hashlib
from functools import partial

from sharding.atomic import naming


def md5_of(path: str) -> str:
    """MD5 of a file's content, 32 lower-case hexadecimal digits, read in pieces. Raises OSError."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
