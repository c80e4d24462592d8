"""The order in which `engine shard` does its jobs: slides are staged, groups permuted, shards gathered.

What is nearest to a finished shard goes first, so that the work folder holds the payloads of few groups at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.cluster import Crash, Finished
from sharding.gather import GatherJob, GatherResult
from sharding.groups import Group, GroupRecord, after_gathering, finish_group, flag_broken_regions, read_group
from sharding.permute import Member, Permutation, PermuteJob
from sharding.plan import ShardOptions
from sharding.stage import SlideJob, SlideRecord, quarantined, read_record, write_record
from sharding.work import WorkFolder
from sharding.writer import ShardRecord


class Job(Protocol):
    """A unit of work: idempotent, and the same bytes wherever it runs."""

    def run(self) -> Any: ...


def run_job(job: Job) -> Any:
    """What a worker does with a job of any kind."""
    return job.run()


@dataclass(slots=True)
class _UnderWay:
    group: Group
    records: dict[str, SlideRecord] = field(default_factory=dict)
    results: dict[int, GatherResult] = field(default_factory=dict)
    shards: int = 0


class Pipeline:
    """The jobs of a run. `queue` holds those that can start; `take` notes what came of one and adds the next ones."""

    def __init__(
        self,
        groups: Sequence[Group],
        work: WorkFolder,
        options: ShardOptions,
        *,
        on_slide: Callable[[SlideRecord], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        self.queue: deque[Job] = deque()
        self.slides: list[SlideRecord] = []
        self.shards: list[ShardRecord] = []
        self._work, self._options = work, options
        self._on_slide, self._on_shard = on_slide, on_shard
        self._under_way: dict[str, _UnderWay] = {}
        self._group_of: dict[str, str] = {}
        for group in groups:
            finished = read_group(group, work)
            if finished is None:
                self._begin(group)
                continue
            for record in finished.slides:
                on_slide(record)
            self._keep(finished)

    def take(self, done: Finished[Job, Any]) -> None:
        """Note what came of a job."""
        job, result = done.job, done.result
        if isinstance(job, SlideJob):
            if isinstance(result, Crash):
                result = quarantined(job, result.reason)
                write_record(job, result)
            self._staged(self._under_way[self._group_of[job.name]], job, result)
        elif isinstance(result, Crash):
            raise RuntimeError(f"{result.reason}; it was not reading a slide. Run again to go on.")
        elif isinstance(job, PermuteJob):
            self._permuted(self._under_way[job.group], result)
        elif isinstance(job, GatherJob):
            self._gathered(self._under_way[job.group], job, result)

    def _begin(self, group: Group) -> None:
        state = self._under_way[group.name] = _UnderWay(group)
        largest_first = sorted(group.jobs, key=lambda job: (-job.size_bytes, job.slide_id))
        for job in largest_first:
            self._group_of[job.name] = group.name
        for job in largest_first:
            record = read_record(job)
            if record is None:
                self.queue.append(job)
            else:
                self._staged(state, job, record)

    def _staged(self, state: _UnderWay, job: SlideJob, record: SlideRecord) -> None:
        state.records[job.name] = record
        self._on_slide(record)
        if len(state.records) == len(state.group.jobs):
            self._permute(state)

    def _permute(self, state: _UnderWay) -> None:
        members = tuple(
            Member(job.name, job.path, state.records[job.name].patches)
            for job in state.group.jobs
            if state.records[job.name].patches
        )
        self.queue.appendleft(
            PermuteJob(
                str(self._work.dataset), state.group.name, members, self._options.seed, self._options.patches_per_shard
            )
        )

    def _permuted(self, state: _UnderWay, permutation: Permutation) -> None:
        first = 0
        jobs = []
        for number, count in enumerate(permutation.counts):
            if count:
                name = state.group.name
                jobs.append(GatherJob(str(self._work.dataset), name, permutation.digest, number, first, count))
            first += count
        state.results, state.shards = {}, len(jobs)
        self.queue.extendleft(reversed(jobs))
        if not jobs:
            self._finish(state)

    def _gathered(self, state: _UnderWay, job: GatherJob, result: GatherResult) -> None:
        state.results[job.number] = result
        if result.shard is not None:
            self._on_shard(result.shard)
        if len(state.results) == state.shards:
            self._finish(state)

    def _finish(self, state: _UnderWay) -> None:
        gathered = [state.results[number] for number in sorted(state.results)]
        records = after_gathering(state.group.jobs, state.records, gathered)
        lost = [job for job in state.group.jobs if records[job.name].status != state.records[job.name].status]
        if lost:
            # Its patches are in the group's shards already: these are made again without it.
            for job in lost:
                write_record(job, records[job.name])
            state.records.update({job.name: records[job.name] for job in lost})
            self._permute(state)
            return
        if flag_broken_regions(self._work, gathered):
            self._permute(state)
            return
        shards = [result.shard for result in gathered if result.shard is not None]
        record = GroupRecord([records[job.name] for job in state.group.jobs], shards)
        finish_group(state.group, self._work, record)
        self._keep(record)
        del self._under_way[state.group.name]

    def _keep(self, record: GroupRecord) -> None:
        self.slides += record.slides
        self.shards += record.shards
