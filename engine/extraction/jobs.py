"""Jobs out of slides: a large slide by itself, small ones together, and the longest first."""

from __future__ import annotations

from collections.abc import Sequence

from engine.extraction.sources import SlideTask
from engine.extraction.worker import ExtractJob


def make_jobs(tasks: Sequence[SlideTask], patches_per_job: int) -> list[ExtractJob]:
    """Pack slides into jobs of about `patches_per_job` patches, none of which is divided; the largest slides first.

    Small slides share a job so that batches stay full: only the last batch of a job may be filled up.
    """
    jobs: list[ExtractJob] = []
    waiting: list[SlideTask] = []
    for task in sorted(tasks, key=lambda task: (-task.patches, task.slide_id)):
        waiting.append(task)
        if sum(one.patches for one in waiting) >= patches_per_job:
            jobs.append(ExtractJob(tuple(waiting)))
            waiting = []
    return jobs + ([ExtractJob(tuple(waiting))] if waiting else [])


def divided(job: ExtractJob) -> list[ExtractJob]:
    """A job for each slide: when a worker died over several of them, it shows which one it was."""
    return [ExtractJob((task,)) for task in job.slides]
