"""The watchdog: who is found to stall, what is said of it, and that a run that goes on is left alone."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine import watchdog as module
from engine.watchdog import HEARTBEATS, Heartbeat, Watchdog, culprits, doing, forget_heartbeats, read_heartbeats

COLLECTIVE, DATA, ELSEWHERE = "waiting for other ranks at a", "waiting for data at b", "at engine/c.py:3 in f"


def _beat(rank: int, step: int | None, doing: str, at: float = 100.0) -> Heartbeat:
    return Heartbeat(rank, "host", 1, step, doing, at)


@pytest.mark.parametrize(
    ("beats", "found"),
    [
        ([_beat(0, 5, COLLECTIVE), _beat(1, 5, DATA), _beat(2, 5, COLLECTIVE)], [1]),
        ([_beat(0, 5, COLLECTIVE), _beat(1, 5, ELSEWHERE), _beat(2, 5, COLLECTIVE)], [1]),
        ([_beat(0, 5, ELSEWHERE), _beat(1, 5, DATA), _beat(2, 5, COLLECTIVE)], [1]),
        ([_beat(0, 5, DATA), _beat(1, 4, COLLECTIVE), _beat(2, 5, DATA)], [1]),
        ([_beat(0, 1, COLLECTIVE), _beat(1, None, ELSEWHERE), _beat(2, 1, COLLECTIVE)], [1]),
        ([_beat(0, 5, DATA), _beat(1, 5, COLLECTIVE, 80.0), _beat(2, 5, DATA)], [1]),
        ([_beat(0, 5, DATA), _beat(2, 5, DATA)], [1]),
        ([_beat(0, 5, COLLECTIVE), _beat(1, 5, COLLECTIVE), _beat(2, 5, COLLECTIVE)], [0, 1, 2]),
        ([_beat(0, 5, DATA), _beat(1, 5, COLLECTIVE), _beat(2, 5, DATA)], [0, 2]),
    ],
)
def test_who_holds_the_others_up(beats: list[Heartbeat], found: list[int]) -> None:
    assert sorted(culprits({each.rank: each for each in beats}, 3, silent_s=10)) == found


def _frame_of(function: Any, *arguments: Any) -> str:
    """What `doing` says of a thread that is in `function`."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while thread.ident not in sys._current_frames() or not doing(sys._current_frames()[thread.ident]).strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    return doing(sys._current_frames()[thread.ident or 0])


def test_what_a_thread_is_at_is_read_from_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def planted(name: str, call: Any) -> Any:
        space: dict[str, Any] = {"__name__": name, "call": call}
        exec("def wait_there():\n    call()", space)
        return space["wait_there"]

    try:
        in_loader = planted("engine.data.loader", release.wait)
        assert _frame_of(planted("engine.trainer", in_loader)).startswith("waiting for data at engine/data/loader.py:2")
        in_torch = planted("torch.distributed.distributed_c10d", release.wait)
        assert _frame_of(planted("engine.trainer", in_torch)) == (
            "waiting for other ranks at engine/trainer.py:2 in wait_there"
        )
        # torchrun's own frames lie below those of every rank.
        below = planted("torch.distributed.elastic.api", planted("engine.trainer", release.wait))
        assert _frame_of(below) == "at engine/trainer.py:2 in wait_there"
        assert _frame_of(release.wait) == "outside of the engine"
    finally:
        release.set()


class _Ended(list[tuple[str, str]]):
    def __call__(self, text: str, stack: str) -> None:
        if not self:
            self.append((text, stack))


def _stall(watchdog: Watchdog, ended: _Ended) -> tuple[str, str]:
    deadline = time.monotonic() + 60
    with watchdog:
        watchdog.beat(7)
        while not ended:
            assert time.monotonic() < deadline, "the watchdog sleeps"
            time.sleep(0.01)
    return ended[0]


def test_a_rank_that_stalls_says_so_with_its_stack(tmp_path: Path) -> None:
    ended = _Ended()
    text, stack = _stall(Watchdog(0, 0.5, folder=tmp_path, end=ended), ended)
    assert text.startswith("rank 0 on ")
    assert "stalls after step 7, outside of the engine: no step was done for" in text
    assert "watchdog_s=0.5" in text
    assert "in _stall" in stack
    assert not (tmp_path / HEARTBEATS).exists(), "a block that ends without an error leaves nothing"


def test_a_rank_that_waits_names_the_one_behind_and_keeps_its_stack(tmp_path: Path) -> None:
    folder = tmp_path / HEARTBEATS
    folder.mkdir()
    other = Heartbeat(1, "node07", 11, 6, DATA, time.time() + 1000)
    (folder / "rank-00001.json").write_text(json.dumps({name: getattr(other, name) for name in other.__slots__}))
    late = Heartbeat(0, "here", 1, 7, COLLECTIVE, time.time() + 1000)
    ended = _Ended()
    watchdog = Watchdog(0, 0.5, folder=tmp_path, world_size=2, end=ended)
    watchdog._publish = lambda what, error="": (folder / "rank-00000.json").write_text(  # type: ignore[method-assign, assignment]
        json.dumps({name: getattr(late, name) for name in late.__slots__})
    )
    text, stack = _stall(watchdog, ended)
    assert text.startswith(f"rank 1 on node07 stalls after step 6, {DATA}: no step was done")
    assert stack == ""


def test_a_rank_that_never_came_is_named(tmp_path: Path) -> None:
    ended = _Ended()
    text, _ = _stall(Watchdog(0, 0.5, folder=tmp_path, world_size=2, end=ended), ended)
    assert text.startswith("rank 1 has not started: ")


def test_a_run_that_goes_on_is_left_alone_and_the_first_step_may_take_longer(tmp_path: Path) -> None:
    ended = _Ended()
    with Watchdog(0, 2.0, folder=tmp_path, end=ended) as watchdog:
        time.sleep(3.0)  # within three times two seconds: no step is done yet
        assert not ended
        for step in range(1, 30):
            watchdog.beat(step)
            time.sleep(0.1)
        assert read_heartbeats(tmp_path)[0].step is not None
    assert not ended


@pytest.mark.parametrize("seconds", [None, 0])
def test_it_can_be_turned_off(seconds: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_TICK_S", 0.02)
    ended = _Ended()
    watchdog = Watchdog(0, seconds, folder=tmp_path, end=ended)
    assert watchdog.longest_s is None
    with watchdog:
        time.sleep(0.5)
        assert set(read_heartbeats(tmp_path)) == {0}
    assert not ended


def test_an_error_is_left_for_the_other_ranks_to_tell(tmp_path: Path) -> None:
    def run(error: Exception) -> None:
        with Watchdog(3, None, folder=tmp_path) as watchdog:
            watchdog.beat(4)
            raise error

    def fail(error: Exception) -> str:
        with pytest.raises(type(error)):
            run(error)
        found = read_heartbeats(tmp_path)[3]
        assert found.step == 4
        return found.error

    assert fail(RuntimeError("the store is down")) == "the store is down"
    assert fail(TypeError("ours")) == "TypeError: ours"
    assert fail(RuntimeError("[/x/gloo/transport/tcp/pair.cc:552] Connection closed by peer")) == ""
    forget_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path) == {}


def test_a_torn_heartbeat_is_none(tmp_path: Path) -> None:
    (tmp_path / HEARTBEATS).mkdir()
    for number, text in enumerate(["", "{", "[1]", '{"rank": 1}']):
        (tmp_path / HEARTBEATS / f"rank-{number:05d}.json").write_text(text)
    assert read_heartbeats(tmp_path) == {}
