"""One writer per folder."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharding import lock
from sharding.lock import LOCK_NAME, LockedError, folder_lock

HOLD = """
import sys
from pathlib import Path
from sharding.lock import LockedError, folder_lock
sys.stdin.readline()
try:
    with folder_lock(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.readline()
except LockedError as error:
    print("lost", error, flush=True)
"""
REPOSITORY = Path(__file__).resolve().parents[2]


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that takes the lock at its first line of input and gives it back at its second."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def close(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=30)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    return process.pid


@pytest.fixture
def living_pid() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n", timeout=30)


def content(pid: int, **changes: Any) -> str:
    holder = {"host": socket.gethostname(), "pid": pid, "started": lock._start_time(pid)}
    return json.dumps({**holder, **changes})


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    holder = start(tmp_path)
    tell(holder)
    assert hear(holder) == "won"
    with pytest.raises(LockedError, match=rf"process {holder.pid} on {socket.gethostname()}"), folder_lock(tmp_path):
        pass
    assert (tmp_path / LOCK_NAME).exists()
    close(holder)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        with pytest.raises(LockedError, match=str(os.getpid())), folder_lock(tmp_path):
            pass
        assert (tmp_path / LOCK_NAME).exists()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_holder_is_dead_is_taken_over(tmp_path: Path, dead_pid: int) -> None:
    (tmp_path / LOCK_NAME).write_text(content(dead_pid, started="1"))
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_number_now_belongs_to_another_process_is_taken_over(tmp_path: Path, living_pid: int) -> None:
    (tmp_path / LOCK_NAME).write_text(content(living_pid, started="1"))
    with folder_lock(tmp_path):
        pass


def test_a_job_that_slurm_queued_again_takes_over_what_its_lost_machine_held(
    tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a machine failed: the job's number stays, and SLURM has counted one start more."""
    held = json.loads(content(dead_pid, host="elsewhere", started="1")) | {"slurm": [77, 0]}
    (tmp_path / LOCK_NAME).write_text(json.dumps(held))
    for job, restarts in ((None, None), ("78", "1"), ("77", "0"), ("77", None)):
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        with pytest.raises(LockedError), folder_lock(tmp_path):
            pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["slurm"] == [77, 1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_lock_that_names_nobody_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_is_respected(tmp_path: Path, dead_pid: int) -> None:
    (tmp_path / LOCK_NAME).write_text(content(dead_pid, host="elsewhere", started="1"))
    with (
        pytest.raises(LockedError, match=rf"process {dead_pid} on elsewhere.*remove {tmp_path}"),
        folder_lock(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize("stale", [False, True])
def test_of_racing_processes_exactly_one_wins(tmp_path: Path, dead_pid: int, stale: bool) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if stale:
            (folder / LOCK_NAME).write_text(content(dead_pid, started="1"))
        racers = [start(folder) for _ in range(3)]
        for racer in racers:
            tell(racer)
        answers = [hear(racer).split()[0] for racer in racers]
        for racer in racers:
            close(racer)
        assert sorted(answers) == ["lost", "lost", "won"]


def test_a_lock_taken_by_another_between_the_judgement_and_the_takeover_is_not_stolen(
    tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the same stale lock; the faster one takes it over before the slower one acts."""
    (tmp_path / LOCK_NAME).write_text(content(dead_pid, started="1"))
    judge = lock._alive
    faster = start(tmp_path)

    def slow(holder: dict[str, Any]) -> bool:
        alive = judge(holder)
        if holder.get("pid") == dead_pid:
            tell(faster)
            # It answers at once, or it waits for us: then it has to lose afterwards.
            assert faster.stdout is not None
            select.select([faster.stdout], [], [], 2.0)
        return alive

    monkeypatch.setattr(lock, "_alive", slow)
    winners = 0
    try:
        with folder_lock(tmp_path):
            winners += 1
            winners += hear(faster) == "won"
    except LockedError as error:
        assert str(faster.pid) in str(error)  # noqa: PT017  # either may win, but not both
        winners += hear(faster) == "won"
    close(faster)
    assert winners == 1


def test_no_one_ever_sees_a_lock_without_its_holders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process that looks between creation and writing takes it for a dead one's and steals it."""
    path = tmp_path / LOCK_NAME
    seen: list[bytes] = []
    write = os.write

    def watched(descriptor: int, data: bytes) -> int:
        if path.exists():
            seen.append(path.read_bytes())
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", watched)
    with folder_lock(tmp_path):
        seen.append(path.read_bytes())
    assert [json.loads(text or b"{}").get("pid") for text in seen] == [os.getpid()] * len(seen)
