"""`engine verify`: is a dataset, or a store of embeddings, still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.console import progress
from engine.figures import as_count
from engine.stores.layout import StoreDamagedError, is_store
from engine.stores.layout import read_meta as read_store_meta
from engine.stores.verify import verify_store
from sharding.index import DatasetDamagedError, read_meta
from sharding.verify import verify_dataset

_SHOWN = 20


def run(path: Path) -> dict[str, Any]:
    """{"ok", "samples", "bad": [{"shard", "key", "reason"}]}; ValueError where there is neither dataset nor store.

    Of a store, a shard is a slide's folder, a key an array, and samples are embeddings.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: expected a dataset (`engine shard`) or a store (`engine extract`).")
    if is_store(path):
        try:
            total = len(read_store_meta(path)["slides"])
        except StoreDamagedError:
            return verify_store(path)
        with progress("verify", total, "slides") as advance:
            return verify_store(path, on_slide=lambda: advance(1, ""))
    try:
        total = len(read_meta(path)["shards"])
    except DatasetDamagedError:
        return verify_dataset(path)
    with progress("verify", total, "shards") as advance:
        return verify_dataset(path, on_shard=lambda: advance(1, ""))


def describe(result: dict[str, Any], path: Path) -> str:
    """The result for a person."""
    store = is_store(path)
    samples = as_count(result["samples"], "embedding" if store else "sample")
    if result["ok"]:
        return f"{path}: all {samples} are as they were written."
    lines = [f"{path}: {as_count(len(result['bad']), 'defect')} in {samples}:"]
    for bad in result["bad"][:_SHOWN]:
        where = " ".join(filter(None, (bad["shard"], bad["key"]))) or ("store" if store else "dataset")
        lines.append(f"  {where}: {bad['reason']}")
    if len(result["bad"]) > _SHOWN:
        lines.append(f"  ... and {len(result['bad']) - _SHOWN} more (--json lists all)")
    if store:
        lines.append("Restore the named files, or remove the named folders and run the same `engine extract` again.")
    else:
        lines.append("Restore the named files, or shard the slides again into a new folder.")
    return "\n".join(lines)
