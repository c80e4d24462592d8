"""Which job goes to which long-lived worker, and what becomes of the jobs of one that died."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

TRIES = 4
AT_ONCE = 2  # jobs of a long-lived worker


@dataclass(frozen=True, slots=True)
class Crash:
    """A job whose worker died on every try."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished(Generic[JobT, ResultT]):
    """A job and what came of it."""

    job: JobT
    result: ResultT | Crash


def crash_reason() -> str:
    """What a job is told to have failed of when every try ended with its worker's death."""
    return f"the process that read it crashed {TRIES} times"


class Jobs(Generic[JobT]):
    """Which job goes to which worker: the queue's first to the one with the fewest.

    A job whose worker died comes again before any other, for it may be a long one. From half of its tries on it has a
    worker to itself, once one is idle, so that of two jobs the one that killed it is found.
    """

    def __init__(self, queue: deque[JobT]) -> None:
        self._queue = queue
        self._again: deque[tuple[JobT, int]] = deque()
        self._suspects: deque[tuple[JobT, int]] = deque()

    @property
    def left(self) -> bool:
        return bool(self._queue or self._again or self._suspects)

    def next_for(self, slots: Sequence[Slot[JobT]]) -> tuple[Slot[JobT], JobT, int] | None:
        """A worker that can take a job, the job, and how many times it will have been tried."""
        free = [slot for slot in slots if slot.is_up and not slot.alone and len(slot.running) < AT_ONCE]
        if not free:
            return None
        slot = min(free, key=lambda slot: len(slot.running))
        if self._again:
            return slot, *self._again.popleft()
        if self._suspects and not slot.running:
            slot.alone = True
            return slot, *self._suspects.popleft()
        return (slot, self._queue.popleft(), 1) if self._queue else None

    def lost(self, slot: Slot[JobT]) -> Iterator[Finished[JobT, Any]]:
        """Note that a worker died: its jobs come again, or have been tried often enough."""
        for job, attempt in slot.running.values():
            if attempt == TRIES:
                yield Finished(job, Crash(crash_reason()))
            else:
                (self._suspects if attempt >= TRIES // 2 else self._again).append((job, attempt + 1))
        slot.deaths = 0 if slot.is_up else slot.deaths + 1
        slot.running.clear()
        slot.is_up = slot.alone = False
        if slot.deaths == TRIES:
            raise RuntimeError(f"a worker died {TRIES} times before it could begin (no memory for the model?)")


@dataclass(slots=True, eq=False)
class Slot(Generic[JobT]):
    """A place for a worker, and its jobs by ticket: (job, attempt). `deaths` are those before it was up."""

    worker: Any
    running: dict[Any, tuple[JobT, int]] = field(default_factory=dict)
    is_up: bool = False
    alone: bool = False
    deaths: int = 0

    def finished(self, ticket: Any) -> JobT:
        job, _ = self.running.pop(ticket)
        self.alone = False
        return job
