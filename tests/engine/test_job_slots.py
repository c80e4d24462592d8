"""Jobs of workers that died come first, and alone once they are suspected; nothing else is held up by them."""

from __future__ import annotations

from collections import deque

import pytest

from engine.job_slots import TRIES, Crash, Jobs, Slot


def _slots(count: int) -> list[Slot[str]]:
    return [Slot(None, is_up=True) for _ in range(count)]


def _hand_out(jobs: Jobs[str], slots: list[Slot[str]]) -> list[str]:
    """Give jobs to slots until none takes another; returns them in order."""
    given = []
    while (found := jobs.next_for(slots)) is not None:
        slot, job, attempt = found
        slot.running[job] = (job, attempt)
        given.append(job)
    return given


def test_each_worker_has_one_job_before_any_has_two() -> None:
    slots = _slots(2)
    assert _hand_out(Jobs(deque("abcdef")), slots) == ["a", "b", "c", "d"]
    assert [sorted(slot.running) for slot in slots] == [["a", "c"], ["b", "d"]]


def test_lost_jobs_come_before_those_that_wait_though_no_worker_is_idle() -> None:
    jobs, slots = Jobs(deque("abcdef")), _slots(2)
    _hand_out(jobs, slots)
    assert list(jobs.lost(slots[0])) == []
    slots[1].finished("b")
    assert _hand_out(jobs, slots) == ["a"]
    slots[1].finished("d")
    assert _hand_out(jobs, slots) == ["c"]
    slots[0].is_up = True
    assert _hand_out(jobs, slots) == ["e", "f"]


def test_a_job_that_kills_every_worker_is_given_up_and_its_neighbours_are_done() -> None:
    jobs, slots = Jobs(deque(["deadly", *"abcdef"])), _slots(2)
    crashed: list[str] = []
    done: list[str] = []
    for _ in range(100):
        _hand_out(jobs, slots)
        for slot in slots:
            if "deadly" in slot.running:
                for finished in jobs.lost(slot):
                    assert isinstance(finished.result, Crash)
                    crashed.append(finished.job)
                slot.is_up = True
            elif slot.running:
                done.append(slot.finished(next(iter(slot.running))))
    assert crashed == ["deadly"]
    assert sorted(done) == list("abcdef")
    assert not jobs.left


def test_from_half_of_its_tries_on_a_job_has_a_worker_to_itself() -> None:
    jobs, slots = Jobs(deque("ab")), _slots(1)
    for attempt in range(1, TRIES + 1):
        _hand_out(jobs, slots)
        assert slots[0].running["a"] == ("a", attempt)
        assert (len(slots[0].running) == 1) is (attempt > TRIES // 2)
        if attempt == TRIES // 2:
            slots[0].finished("b")
        list(jobs.lost(slots[0]))
        slots[0].is_up = True


def test_workers_that_never_come_up_end_the_run() -> None:
    jobs, slots = Jobs(deque("a")), [Slot[str](None)]
    for _ in range(TRIES - 1):
        list(jobs.lost(slots[0]))
    with pytest.raises(RuntimeError, match="before it could begin"):
        list(jobs.lost(slots[0]))
