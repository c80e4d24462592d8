"""A dataset as a whole: its slide list, its digest, and the last step that makes it a dataset."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from sharding.atomic import write_json
from sharding.index import FORMAT_VERSION, canonical_digest, content_digest, write_index, write_table
from sharding.plan import ShardOptions
from sharding.slide import environment_versions
from sharding.stage import SlideRecord
from sharding.writer import ShardRecord

_SLIDE_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("slide_id", pa.string()),
    ("path", pa.string()),
    ("fingerprint", pa.string()),
    ("status", pa.string()),
    ("reason", pa.string()),
    ("reader", pa.string()),
    ("mpp", pa.float64()),
    ("mpp_source", pa.string()),
    ("width_px0", pa.int64()),
    ("height_px0", pa.int64()),
    ("levels", pa.int32()),
    ("tissue_fraction", pa.float64()),
    ("patches", pa.int64()),
    ("patches_copied", pa.int64()),
    ("patches_quarantined", pa.int64()),
]
DIGESTED_FILES = ("index.parquet", "rows.bin", "slides.parquet")
RESERVED_COLUMNS = frozenset(name for name, _ in _SLIDE_COLUMNS)


def options_digest(options: ShardOptions) -> str:
    """Hash of a recipe's content (places and worker counts are no part of it)."""
    return canonical_digest(options.as_dict())


def finish_dataset(
    dataset: Path,
    options: ShardOptions,
    records: list[SlideRecord],
    shards: list[ShardRecord],
    user_columns: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Merge the index and write slides.parquet and, last, dataset.json; returns the latter's content.

    Args:
        records: one per slide.
        shards: one per committed shard.
        user_columns: slide_id -> further columns of the user's slide list.
    """
    records = sorted(records, key=lambda record: record.slide_id)
    shards = sorted(shards, key=lambda shard: shard.name)
    num_rows = write_index(dataset, [shard.name for shard in shards])
    write_table(_slides_table(records, user_columns), dataset / "slides.parquet")
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "recipe": options.as_dict(),
        "recipe_digest": options_digest(options),
        "versions": environment_versions(),
        "counts": _counts(records, shards),
        "slides": [
            {
                "slide_id": r.slide_id,
                "fingerprint": r.fingerprint,
                "status": r.status,
                "mpp_override": r.mpp_override,
                "patches": r.patches,
                "patches_copied": r.patches_copied,
                "patches_quarantined": r.patches_quarantined,
            }
            for r in records
        ],
        "shards": [asdict(shard) for shard in shards],
        # slides.parquet is kept apart: it holds paths, and no path may change the digest.
        "files": {name: file_sha256(dataset / name) for name in DIGESTED_FILES},
    }
    assert num_rows == meta["counts"]["patches"]
    meta["digest"] = content_digest(meta)
    write_json(dataset / "dataset.json", meta)
    return meta


def _counts(records: list[SlideRecord], shards: list[ShardRecord]) -> dict[str, int]:
    done = [record for record in records if record.status == "done"]
    return {
        "slides": len(records),
        "slides_done": len(done),
        "slides_quarantined": len(records) - len(done),
        "patches": sum(record.patches for record in records),
        "patches_copied": sum(record.patches_copied for record in records),
        "patches_quarantined": sum(record.patches_quarantined for record in records),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
    }


def _slides_table(records: list[SlideRecord], user_columns: dict[str, dict[str, Any]]) -> pa.Table:
    values = [asdict(record) for record in records]
    table = pa.table({name: pa.array([v[name] for v in values], kind) for name, kind in _SLIDE_COLUMNS})
    names = list(dict.fromkeys(name for columns in user_columns.values() for name in columns))
    for name in names:
        column = [user_columns.get(record.slide_id, {}).get(name) for record in records]
        table = table.append_column(name, pa.array(column))
    return table


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
