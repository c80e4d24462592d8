"""Which shard a patch lies in, and where: the rows of a group of slides, sorted by a keyed hash of their ids.

Slides are shuffled in groups: all at once (`global`), each by itself (`slide`), or some hundred randomly chosen ones at
a time (`group`), so that a slow disk still has to read each slide only once. The rows of a group are never in memory
together: they are spread over buckets on disk, which are sorted one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sharding.atomic import atomic_path
from sharding.hashing import order_keys, shard_numbers
from sharding.index import DatasetDamagedError
from sharding.rows import ROW, Rows
from sharding.stage import read_sources
from sharding.work import WorkFolder

_BUCKET_ROWS = 2_000_000


@dataclass(frozen=True, slots=True)
class Member:
    """A staged slide of a group: its job's name, its file now, and how many patches it has."""

    name: str
    path: str
    patches: int


@dataclass(frozen=True, slots=True)
class PermuteJob:
    """Sort the rows of one group."""

    dataset: str
    group: str
    members: tuple[Member, ...]
    seed: int
    patches_per_shard: int

    def run(self) -> Permutation:
        return permute_group(self)


@dataclass(frozen=True, slots=True)
class Permutation:
    """`counts` has the number of rows of each shard; `digest` is of the rows and of what their sources say of them."""

    counts: list[int]
    digest: str


def permute_group(job: PermuteJob) -> Permutation:
    """Write the group's rows, sorted, and its sources.

    Memory holds one bucket of about 2 M rows, 64 bytes each, whatever the size of the group.
    Raises DatasetDamagedError where two patches have one id or a slide's rows are not those that its record counts.
    """
    work = WorkFolder(Path(job.dataset))
    total = sum(member.patches for member in job.members)
    num_shards = -(-total // job.patches_per_shard)
    counts = np.zeros(num_shards, np.int64)
    digest = hashlib.blake2b(digest_size=16)
    if total == 0:
        return Permutation([], digest.hexdigest())
    _write_sources(job, work, digest)
    with atomic_path(work.permutation(job.group)) as temporary, contextlib.ExitStack() as stack:
        buckets = [temporary.with_name(f"{temporary.name}-{i}") for i in range(-(-total // _BUCKET_ROWS))]
        for bucket in buckets:
            stack.callback(bucket.unlink, missing_ok=True)
        _spread(job, work, buckets)
        with open(temporary, "wb") as file:
            for bucket in buckets:
                rows = np.fromfile(bucket, ROW)
                bucket.unlink()
                keys = order_keys(rows["sample_id"], job.seed)
                order = np.argsort(keys)
                keys = keys[order]
                if (keys[1:] == keys[:-1]).any():
                    raise DatasetDamagedError(f"two patches of group {job.group} have one id")
                rows = rows[order]
                rows.tofile(file)
                digest.update(rows.data)
                counts += np.bincount(shard_numbers(keys, num_shards), minlength=num_shards)
    return Permutation(counts.tolist(), digest.hexdigest())


def _spread(job: PermuteJob, work: WorkFolder, buckets: Sequence[Path]) -> None:
    """Append each row to the bucket of its key: buckets are ranges of keys, in order."""
    with contextlib.ExitStack() as stack:
        files: list[BinaryIO] = [stack.enter_context(open(bucket, "wb")) for bucket in buckets]
        for rows in _member_rows(job, work):
            number = shard_numbers(order_keys(rows["sample_id"], job.seed), len(buckets))
            order = np.argsort(number, kind="stable")
            bounds = np.searchsorted(number[order], np.arange(len(buckets) + 1))
            for i, file in enumerate(files):
                rows[order[bounds[i] : bounds[i + 1]]].tofile(file)


def _member_rows(job: PermuteJob, work: WorkFolder) -> Iterator[Rows]:
    """The rows of each slide; their `source` counts through the group."""
    first = 0
    for member in job.members:
        rows = np.load(work.rows(member.name))
        if len(rows) != member.patches:
            raise DatasetDamagedError(f"{work.rows(member.name)} has {len(rows)} rows, its record {member.patches}")
        rows["source"] += first
        first += len(read_sources(work, member.name))
        yield rows


def _write_sources(job: PermuteJob, work: WorkFolder, digest: hashlib.blake2b) -> None:
    with atomic_path(work.group_sources(job.group)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for member in job.members:
            for source in read_sources(work, member.name):
                value = asdict(source)
                digest.update(json.dumps([value[key] for key in value if key not in ("path", "mtime_ns")]).encode())
                value["path"] = member.path if source.path else str(work.payloads(member.name))
                file.write(json.dumps(value) + "\n")
