"""Where things lie in a store of embeddings, and its records; FORMAT.md is the contract. None of it needs zarr."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sharding.atomic import TEMPORARY_PREFIX, fsync_folder, json_text
from sharding.faults import fault_point
from sharding.index import canonical_digest

FORMAT_VERSION = 1
STORE_FILE = "store.json"
ROWS_FILE = "rows.parquet"
GROUP_FILE = "zarr.json"
SLIDE_FILE = "slide.json"
SLIDES = "slides"
# Files of the store itself whose SHA-256 store.json holds.
DIGESTED_FILES = (GROUP_FILE, ROWS_FILE, f"{SLIDES}/{GROUP_FILE}")
_MAX_NAME_BYTES = 200


class StoreDamagedError(RuntimeError):
    """A store is not what was written."""


def folder_name(slide_id: str) -> str:
    """The name of a slide's folder below slides/: percent-escaped but for ASCII letters, digits, `_`, `-` and `.`.

    A leading dot is escaped too, so that no slide is taken for a temporary folder or a hidden file. A name has 1 to 200
    bytes; a longer one is cut and ends in `~` (which no other name holds) and a hash of the id, and the id is what the
    folder's slide.json says. Raises ValueError for an empty id, and for one that is no Unicode text.
    """
    try:
        name = quote(slide_id, safe="").replace("~", "%7E")
    except UnicodeEncodeError:
        raise ValueError(f"slide id {slide_id!r} is no valid Unicode text: give the slide another id.") from None
    if not name:
        raise ValueError("a slide has an empty id: give it one.")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _MAX_NAME_BYTES:
        ending = "~" + hashlib.blake2b(slide_id.encode(), digest_size=16).hexdigest()
        name = name[: _MAX_NAME_BYTES - len(ending)] + ending
    return name


def slide_id_of(folder: Path) -> str:
    """The slide whose folder this is: `folder_name` backwards."""
    return unquote(folder.name, errors="strict") if "~" not in folder.name else str(read_record(folder)[0]["slide_id"])


def damaged(folder: Path, reason: str) -> StoreDamagedError:
    """The error for a slide's folder that is not what was written."""
    return StoreDamagedError(
        f"{folder}: {reason}. Remove this folder and run the same `engine extract` again; "
        f"`engine verify {folder.parent.parent}` finds all damage."
    )


def read_file(folder: Path, name: str, sha256: str | None = None) -> bytes:
    """A file of a slide's folder. Raises StoreDamagedError where it is missing or has another SHA-256."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise damaged(folder, f"{name} cannot be read: {error.strerror}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise damaged(folder, f"{name} has changed since it was written (SHA-256)")
    return data


def read_record(folder: Path, sha256: str | None = None) -> tuple[dict[str, Any], str]:
    """What slide.json says, and its SHA-256. Raises StoreDamagedError."""
    data = read_file(folder, SLIDE_FILE, sha256)
    try:
        return dict(json.loads(data)), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        raise damaged(folder, f"{SLIDE_FILE} is no JSON: {error}") from None


def slide_folders(store: Path) -> list[Path]:
    """The folders of all whole slides, sorted by name."""
    return sorted(path for path in (store / SLIDES).iterdir() if not path.name.startswith(".") and path.is_dir())


def temporary_folder(store: Path) -> Path:
    """A new folder that is to become a slide's."""
    folder = store / SLIDES / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def sweep_slides(store: Path) -> None:
    """Remove what interrupted writers left. One that is still at work loses its folder and fails: no half is kept."""
    for path in (store / SLIDES).glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            doomed = temporary_folder(store)
            path.rename(doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink()


def commit_slide(temporary: Path, folder: Path) -> bool:
    """Make `temporary` durable and give it its name; False where `folder` is there already, which then stays."""
    for parent, _, names in os.walk(temporary, topdown=False):
        for name in names:
            fault_point("store.before_fsync")
            with open(Path(parent) / name, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))
    fault_point("store.before_rename")
    try:
        temporary.rename(folder)
    except OSError:
        if folder.is_dir():
            return False
        raise
    fault_point("store.after_rename")
    fsync_folder(folder.parent)
    return True


def is_store(path: Path) -> bool:
    """Whether a store was begun in this folder, or finished."""
    return (path / GROUP_FILE).exists() or (path / STORE_FILE).exists()


def content_digest(meta: dict[str, Any]) -> str:
    """The digest of a store: SHA-256 over all else that store.json says, hexadecimal."""
    return canonical_digest({key: value for key, value in meta.items() if key != "digest"})


def read_meta(store: Path) -> dict[str, Any]:
    """`store.json` as a dict, checked against its own digest and to the byte.

    Raises ValueError where there is no finished store or its format is newer than this program, StoreDamagedError where
    the file has changed since it was written.
    """
    path = store / STORE_FILE
    if not store.is_dir():
        raise ValueError(f"{store} is not a folder: expected a store written by `engine extract`.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{store} holds no {STORE_FILE}: it is no store, or `engine extract` has not finished it. "
            "Run the same `engine extract` again to finish it."
        ) from None
    try:
        meta = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreDamagedError(f"{path} is damaged: {error}") from None
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{store} has format version {version}, this program reads up to {FORMAT_VERSION}: update the engine."
        )
    if version is None or meta.get("digest") != content_digest(meta) or json_text(meta).encode() != data:
        raise StoreDamagedError(f"{path} is damaged: it does not agree with its own digest")
    return dict(meta)
