"""`engine verify`: is a dataset still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.console import progress
from engine.figures import as_count
from sharding.index import DatasetDamagedError, read_meta
from sharding.verify import verify_dataset

_SHOWN = 20


def run(dataset: Path) -> dict[str, Any]:
    """{"ok", "samples", "bad": [{"shard", "key", "reason"}]}; ValueError where there is no dataset."""
    try:
        total = len(read_meta(dataset)["shards"])
    except DatasetDamagedError:
        return verify_dataset(dataset)
    with progress("verify", total, "shards") as advance:
        return verify_dataset(dataset, on_shard=lambda: advance(1, ""))


def describe(result: dict[str, Any], dataset: Path) -> str:
    """The result for a person."""
    if result["ok"]:
        return f"{dataset}: all {result['samples']} samples are as they were written."
    lines = [f"{dataset}: {as_count(len(result['bad']), 'defect')} in {as_count(result['samples'], 'sample')}:"]
    for bad in result["bad"][:_SHOWN]:
        where = " ".join(filter(None, (bad["shard"], bad["key"]))) or "dataset"
        lines.append(f"  {where}: {bad['reason']}")
    if len(result["bad"]) > _SHOWN:
        lines.append(f"  ... and {len(result['bad']) - _SHOWN} more (--json lists all)")
    lines.append("Restore the named files, or shard the slides again into a new folder.")
    return "\n".join(lines)
