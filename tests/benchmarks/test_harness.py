"""The harness takes turns, leaves fsync out, and takes medians of ratios within a round."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import (
    CannotRunError,
    FsyncClock,
    Round,
    Setting,
    against_peers,
    alone,
    every_core,
    play,
    run_cases,
    turns,
)


class Clock:
    """A perf_counter that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", clock)
    monkeypatch.setattr(harness, "cpu_seconds", lambda: clock.now / 2)
    return clock


def _setting(work: Path, rounds: int) -> Setting:
    return Setting(work, rounds, False, frozenset(os.sched_getaffinity(0)))


def test_each_round_has_everyone_once_and_another_first() -> None:
    assert list(turns(["a", "b", "c"], 4)) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_contenders_take_turns_and_the_first_round_is_not_counted(tmp_path: Path, clock: Clock) -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> harness.Run:
        def run(out: Path) -> int:
            assert list(out.iterdir()) == []
            (out / "left over").touch()
            calls.append(name)
            clock.wait(seconds * len(calls))
            return 10

        return run

    played = play({"slow": contender("slow", 2.0), "fast": contender("fast", 1.0)}, _setting(tmp_path, 2))
    assert calls == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert played == {
        "slow": [Round(10, 8.0, 0.0, 4.0), Round(10, 10.0, 0.0, 5.0)],
        "fast": [Round(10, 3.0, 0.0, 1.5), Round(10, 6.0, 0.0, 3.0)],
    }
    assert list(tmp_path.iterdir()) == []


def test_time_in_fsync_is_counted_apart(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: clock.wait(5.0))
    monkeypatch.setattr(os, "fdatasync", lambda _: clock.wait(0.5))
    waiting = os.fsync

    def run(_: Path) -> int:
        clock.wait(2.0)
        os.fsync(0)
        os.fdatasync(0)
        os.fsync(0)
        return 4

    assert play({"ours": run}, _setting(tmp_path, 1)) == {"ours": [Round(4, 2.0, 10.5, 6.25)]}
    assert os.fsync is waiting


def test_fsync_is_given_back_after_an_error_and_its_failures_pass() -> None:
    original = os.fsync
    clock = FsyncClock()
    with pytest.raises(OSError, match="Bad file descriptor"), clock.counting():
        os.fsync(2**20)
    assert os.fsync is original
    assert clock.calls == 1


def test_a_failed_run_leaves_no_output_behind(tmp_path: Path) -> None:
    def fail(out: Path) -> int:
        (out / "half").touch()
        raise RuntimeError("no slide")

    with pytest.raises(RuntimeError, match="no slide"):
        play({"ours": fail}, _setting(tmp_path, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_is_taken_within_its_round_and_by_rate() -> None:
    # The machine slows down tenfold and recovers: the ratios of 4, 2 and 3 are not those of any two medians.
    played = {
        "ours": [Round(400, 1.0, 0.1, 0.9), Round(400, 20.0, 0.3, 1.0), Round(400, 1.0, 0.2, 1.0)],
        "peer": [Round(10, 0.1, 0.0, 0.1), Round(10, 1.0, 0.0, 0.2), Round(30, 0.225, 0.0, 0.225)],
    }
    result = against_peers(played, "patches/s")
    assert result["ratio_to"] == {"peer": pytest.approx(3.0)}
    assert result["value"] == 400.0
    assert result["unit"] == "patches/s"
    assert result["spread"] == {"value": [20.0, 400.0], "peer": [pytest.approx(2.0), pytest.approx(4.0)]}
    assert result["rates"] == {"ours": 400.0, "peer": 100.0}
    assert result["units_per_round"] == {"ours": 400, "peer": 10}
    assert result["fsync_s"] == {"ours": 0.2, "peer": 0.0}
    assert result["cpu_share"] == {"ours": 0.9, "peer": 1.0}
    assert result["cpu_rates"] == {"ours": 400.0, "peer": 100.0}
    assert result["cpu_ratio_to"] == {"peer": pytest.approx(400 / 90)}
    assert result["rounds"] == 3


def test_a_case_without_peers_is_its_median() -> None:
    assert alone([3.0, 9.0, 4.0], "ms") == {
        "value": 4.0,
        "unit": "ms",
        "ratio_to": {},
        "spread": {"value": [3.0, 9.0]},
        "rounds": 3,
    }


def test_within_every_core_all_cores_are_back_and_afterwards_one_again(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    one = {max(cores)}
    os.sched_setaffinity(0, one)
    try:
        with every_core(Setting(tmp_path, 1, True, frozenset(cores))):
            assert os.sched_getaffinity(0) == cores
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, cores)


def test_a_case_that_this_machine_cannot_run_is_skipped_and_the_others_run(tmp_path: Path) -> None:
    def impossible(_: Setting) -> dict[str, object]:
        raise CannotRunError("it needs wings")

    known = {"fly": impossible, "walk": lambda _: alone([1.0], "m/s")}
    result = run_cases("moving", known, [], _setting(tmp_path, 1))
    assert [case["name"] for case in result["cases"]] == ["walk"]
    assert result["skipped"] == [{"name": "fly", "reason": "it needs wings"}]


def test_processor_time_includes_children_that_ended() -> None:
    before = harness.cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert harness.cpu_seconds() - before > 0.02
