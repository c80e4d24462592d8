"""Files that appear whole or not at all: a temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.faults import fault_point

TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error it becomes `path`, durably."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        fault_point("atomic.before_write")
        yield temporary
        fault_point("atomic.before_fsync")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        fault_point("atomic.before_rename")
        temporary.replace(path)
        fault_point("atomic.after_rename")
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Say in an OSError which file it is about: one of reading does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_text`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """`value` as JSON for a file: one text for equal values, whatever the order of their keys."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def sweep_temporary(folder: Path, *, older_than_s: float = 0.0) -> int:
    """Remove what interrupted writers left in `folder` (not below it).

    The caller holds the folder's lock, or leaves alone what another may be writing: files not `older_than_s`.
    """
    removed = 0
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if older_than_s and time.time() - path.stat().st_mtime < older_than_s:
                continue
            path.unlink()
            removed += 1
    return removed
