"""Groups of slides that are shuffled together: which slides, and what became of them and their shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from sharding.atomic import atomic_path, write_json
from sharding.gather import GatherResult
from sharding.index import FLAG_PARTIAL_REGION, canonical_digest
from sharding.plan import ShardOptions
from sharding.stage import SlideJob, SlideRecord, quarantined
from sharding.work import WorkFolder
from sharding.writer import ShardRecord, is_whole


@dataclass(frozen=True, slots=True)
class Group:
    """Slides whose patches are shuffled together. `name` prefixes its shards and depends on the slides' bytes alone."""

    name: str
    jobs: tuple[SlideJob, ...]

    @property
    def digest(self) -> str:
        """Of all that a job of it depends on, but for the recipe."""
        return canonical_digest([[job.name, job.mpp_override, job.md5] for job in self.jobs])


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A finished group."""

    slides: list[SlideRecord]
    shards: list[ShardRecord]


def make_groups(jobs: Sequence[SlideJob], options: ShardOptions) -> list[Group]:
    """Divide slides at random, by the recipe's seed, into groups of at most `group_slides`, of about equal numbers."""
    if not jobs:
        return []
    shuffled = sorted(jobs, key=lambda job: hashlib.blake2b(f"{options.seed}\0{job.name}".encode()).digest())
    size = {"slide": 1, "global": len(jobs), "group": options.group_slides}[options.permute]
    count = -(-len(jobs) // size)
    bounds = [len(jobs) * i // count for i in range(count + 1)]
    return [_group(shuffled[start:stop]) for start, stop in pairwise(bounds)]


def _group(jobs: Sequence[SlideJob]) -> Group:
    names = sorted(job.name for job in jobs)
    if len(names) == 1:
        return Group(names[0], tuple(jobs))
    return Group(hashlib.blake2b("\0".join(names).encode(), digest_size=8).hexdigest(), tuple(jobs))


def read_group(group: Group, work: WorkFolder) -> GroupRecord | None:
    """The record of a finished group; None where there is none, or it is outdated or not whole."""
    try:
        value = json.loads(work.group(group.name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if value["digest"] != group.digest:
        return None
    shards = [ShardRecord(**shard) for shard in value["shards"]]
    if not all(is_whole(shard, work) for shard in shards):
        return None
    return GroupRecord([SlideRecord(**slide) for slide in value["slides"]], shards)


def after_gathering(
    jobs: Iterable[SlideJob], records: Mapping[str, SlideRecord], results: Iterable[GatherResult]
) -> dict[str, SlideRecord]:
    """The slides' records (by name of their jobs) less the patches that were rejected when they were copied.

    A slide of which more is damaged than its recipe allows becomes a quarantined one.
    """
    rejected: dict[str, list[Any]] = {}
    for result in results:
        for name, (count, reason, _) in result.damaged.items():
            rejected.setdefault(name, [0, reason])[0] += count
    updated = dict(records)
    for job in jobs:
        if job.name not in rejected:
            continue
        count, first = rejected[job.name]
        record = records[job.name]
        bad = record.patches_quarantined + count
        earlier = record.reason.partition("(first: ")[2].removesuffix(")")
        reason = f"{bad} of {record.planned} patches are damaged (first: {earlier or first})"
        if bad / record.planned > job.options.max_bad_fraction:
            limit = f"more than max_bad_fraction={job.options.max_bad_fraction:g} of the slide"
            updated[job.name] = quarantined(job, f"{reason}: {limit}", seconds=record.seconds)
        else:
            updated[job.name] = replace(
                record,
                reason=reason,
                patches=record.patches - count,
                patches_copied=record.patches_copied - count,
                patches_quarantined=bad,
            )
    return updated


def flag_broken_regions(work: WorkFolder, results: Iterable[GatherResult]) -> bool:
    """Flag the regions that lost a patch when it was copied, in the slides' rows; whether one was not flagged yet."""
    broken: dict[str, list[int]] = {}
    for result in results:
        for name, (_, _, regions) in result.damaged.items():
            broken.setdefault(name, []).extend(regions)
    found = False
    for name, regions in broken.items():
        rows = np.load(work.rows(name))
        new = np.isin(rows["region"], regions) & (rows["flags"] & FLAG_PARTIAL_REGION == 0)
        if new.any():
            found = True
            rows["flags"][new] |= FLAG_PARTIAL_REGION
            with atomic_path(work.rows(name)) as temporary, open(temporary, "wb") as file:
                np.save(file, rows)
    return found


def finish_group(group: Group, work: WorkFolder, record: GroupRecord) -> None:
    """Note that a group is finished, and remove what only its making needed."""
    write_json(
        work.group(group.name),
        {
            "digest": group.digest,
            "slides": [asdict(slide) for slide in record.slides],
            "shards": [asdict(shard) for shard in record.shards],
        },
    )
    for path in (work.permutation(group.name), work.group_sources(group.name)):
        path.unlink(missing_ok=True)
    for job in group.jobs:
        for path in (work.rows(job.name), work.payloads(job.name), work.sources(job.name), work.plan(job.name)):
            path.unlink(missing_ok=True)
