"""Does a store still hold what was written? Every byte of every file is read and compared with its SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.stores.layout import (
    DIGESTED_FILES,
    ROWS_FILE,
    SLIDE_FILE,
    SLIDES,
    StoreDamagedError,
    folder_name,
    read_meta,
)
from sharding.atomic import TEMPORARY_PREFIX
from sharding.dataset import file_sha256

Bad = dict[str, str | None]


def verify_store(path: Path, on_slide: Callable[[], None] | None = None) -> dict[str, Any]:
    """Check a finished store completely: {"ok": bool, "samples": int, "bad": [{"shard", "key", "reason"}]}.

    `shard` is a slide's folder and `key` an array, or `rows` for its rows.parquet; both are None for what concerns the
    store as a whole. `samples` counts the rows of the slides that are whole. Raises ValueError where there is no
    finished store to check.
    """
    try:
        meta = read_meta(path)
    except StoreDamagedError as error:
        return {"ok": False, "samples": 0, "bad": [_bad(None, None, f"{error}; nothing else can be judged")]}
    bad = list(_check_store(path, meta))
    samples = 0
    for slide in meta["slides"]:
        found = list(_check_slide(path / SLIDES / folder_name(slide["slide_id"]), slide))
        samples += 0 if found else slide["rows"]
        bad += found
        if on_slide is not None:
            on_slide()
    return {"ok": not bad, "samples": samples, "bad": bad}


def _bad(shard: str | None, key: str | None, reason: str) -> Bad:
    return {"shard": shard, "key": key, "reason": reason}


def _check_store(path: Path, meta: Mapping[str, Any]) -> Iterator[Bad]:
    listed = {folder_name(slide["slide_id"]) for slide in meta["slides"]} | {Path(DIGESTED_FILES[-1]).name}
    slides = path / SLIDES
    names = {file.name for file in slides.iterdir()} if slides.is_dir() else set()
    extra = sorted(name for name in names - listed if not name.startswith(TEMPORARY_PREFIX))
    hint = "; run the same `engine extract` again to finish the store" if extra else ""
    for name in DIGESTED_FILES:
        if not (path / name).is_file():
            yield _bad(None, None, f"{name} is missing")
        elif file_sha256(path / name) != meta["files"][name]:
            yield _bad(None, None, f"{name} has changed since it was written (SHA-256){hint}")
    for name in extra:
        yield _bad(name, None, f"it is not listed in store.json{hint}")


def _check_slide(folder: Path, slide: Mapping[str, Any]) -> Iterator[Bad]:
    name = folder.name
    try:
        data = (folder / SLIDE_FILE).read_bytes()
    except OSError as error:
        missing = "its folder is missing" if not folder.is_dir() else f"{SLIDE_FILE} cannot be read: {error.strerror}"
        yield _bad(name, None, missing)
        return
    if hashlib.sha256(data).hexdigest() != slide["sha256"]:
        yield _bad(name, None, f"{SLIDE_FILE} has changed since it was written (SHA-256)")
        return
    recorded = json.loads(data)["files"]
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    for file in sorted(present | recorded.keys()):
        if file == SLIDE_FILE:
            continue
        if file not in recorded:
            yield _bad(name, _key(file), f"{file} was not written by the engine")
        elif file not in present:
            yield _bad(name, _key(file), f"{file} is missing")
        else:
            reason = _compare(folder / file, recorded[file])
            if reason is not None:
                yield _bad(name, _key(file), f"{file} {reason}")


def _compare(file: Path, recorded: Mapping[str, Any]) -> str | None:
    try:
        size = file.stat().st_size
        if size != recorded["bytes"]:
            return f"has {size} bytes, expected {recorded['bytes']}"
        changed = file_sha256(file) != recorded["sha256"]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "has changed since it was written (SHA-256)" if changed else None


def _key(file: str) -> str | None:
    """The array that a file belongs to; `rows` for the rows."""
    if file == ROWS_FILE:
        return "rows"
    return file.partition("/")[0] if "/" in file else None
