"""`fan_out`: every job has a result, exceptions end the run, and a dead worker costs its own job alone."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import operator
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.cluster import TRIES, Crash, fan_out, fan_out_to_workers
from engine.runtime import die_with_parent

# `operator.call` runs a job that is itself a call: workers can import it, which they cannot this module.
Job = Callable[[], Any]

_JOBS = """
import os
from pathlib import Path

def call(job):
    return job()

def note_and_die(path):
    with open(path, "a") as file:
        file.write("tried\\n")
    os._exit(1)

def die_once(path):
    if Path(path).exists():
        return "second"
    Path(path).touch()
    os._exit(1)
"""


def _run(jobs: list[Job], workers: int = 2) -> dict[int, Any]:
    """Number of each job -> its result."""
    found = {}
    for done in fan_out(operator.call, jobs, workers=workers, local=True):
        number = next(i for i, job in enumerate(jobs) if job is done.job)
        assert number not in found
        found[number] = done.result
    return found


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of jobs that kill their worker; a spawned worker gets this process's import path."""
    (tmp_path / "deadly_jobs.py").write_text(_JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("deadly_jobs")


def test_every_job_is_yielded_once_with_its_own_result() -> None:
    jobs: list[Job] = [functools.partial(math.sqrt, i * i) for i in range(9)]
    assert _run(jobs) == {i: float(i) for i in range(9)}


def test_more_workers_than_jobs_are_not_started() -> None:
    pids = _run([functools.partial(os.getpid)], workers=8)
    assert len(pids) == 1
    assert pids[0] != os.getpid()


def test_no_jobs_start_nothing() -> None:
    assert list(fan_out(operator.call, [], local=True)) == []
    assert list(fan_out(operator.call, [])) == []


def test_jobs_may_be_added_while_results_are_taken_and_those_in_front_go_first() -> None:
    jobs: deque[Job] = deque(functools.partial(math.sqrt, i * i) for i in range(4))
    order = []
    for done in fan_out(operator.call, jobs, workers=1, local=True):
        order.append(done.result)
        if done.result == 0.0:
            jobs.appendleft(functools.partial(math.sqrt, 100))
            jobs.append(functools.partial(math.sqrt, 400))
        if done.result == 20.0:  # the last one
            jobs.append(functools.partial(math.sqrt, 900))
    assert sorted(order) == [0.0, 1.0, 2.0, 3.0, 10.0, 20.0, 30.0]  # type: ignore[type-var]
    # It overtook those that were not begun yet.
    assert order.index(10.0) < order.index(3.0)
    assert order[-1] == 30.0


def test_an_exception_of_a_job_is_raised_as_it_is() -> None:
    jobs: list[Job] = [functools.partial(math.sqrt, 4), functools.partial(int, "no number")]
    with pytest.raises(ValueError, match="no number"):
        _run(jobs)


@pytest.mark.parametrize(
    "death", [functools.partial(os._exit, 1), functools.partial(os._exit, 0), functools.partial(signal.raise_signal, 9)]
)
def test_a_job_that_kills_its_worker_is_reported_and_the_others_are_done(death: Job) -> None:
    jobs: list[Job] = [functools.partial(math.sqrt, 4), death, functools.partial(math.sqrt, 9)]
    jobs += [functools.partial(math.sqrt, 16), functools.partial(math.sqrt, 25)]
    found = _run(jobs)
    assert isinstance(found.pop(1), Crash)
    assert found == {0: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}


def test_a_crash_says_so_in_words() -> None:
    found = _run([functools.partial(os._exit, 1)], workers=1)
    assert "crashed" in found[0].reason


def test_a_deadly_job_is_tried_a_fixed_number_of_times(tmp_path: Path, deadly: Any) -> None:
    log = tmp_path / "tries"
    assert isinstance(_run([functools.partial(deadly.note_and_die, str(log))])[0], Crash)
    assert log.read_text().splitlines() == ["tried"] * TRIES


def test_a_job_whose_worker_dies_once_is_done_at_the_second_try(tmp_path: Path, deadly: Any) -> None:
    assert _run([functools.partial(deadly.die_once, str(tmp_path / "flag"))]) == {0: "second"}


def test_a_worker_that_is_killed_between_jobs_is_replaced() -> None:
    jobs: list[Job] = [functools.partial(os.getpid) for _ in range(3)]
    pids = []
    for done in fan_out(operator.call, jobs, workers=1, local=True):
        pid = done.result
        assert isinstance(pid, int)
        pids.append(pid)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)  # the pool notices, and refuses the next job
    assert len(set(pids)) == 3


def test_workers_end_when_the_caller_stops_asking() -> None:
    jobs: list[Job] = [functools.partial(os.getpid), functools.partial(time.sleep, 600)]
    results = fan_out(operator.call, jobs, workers=2, local=True)
    pid = next(results).result
    assert isinstance(pid, int)
    results.close()  # type: ignore[attr-defined]
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_whose_parent_is_gone_already_ends_itself(tmp_path: Path) -> None:
    # The kernel's notice is only sent at a parent's death: who asks for it too late would live for ever.
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from pathlib import Path\n"
        "from engine import cluster\n"
        "if __name__ == '__main__':\n"
        "    pool = cluster._pool()\n"
        "    pool.submit(time.sleep, 600)\n"
        "    while not pool._processes:\n"
        "        time.sleep(0.001)\n"
        "    Path(sys.argv[1]).write_text(str(next(iter(pool._processes))))\n"
        "    time.sleep(float(sys.argv[2]))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    lingering = []
    # The moments spread over a child's start: interpreter, imports, and the request to the kernel.
    for number, delay in enumerate((0.0, 0.02, 0.04, 0.06, 0.08, 0.12)):
        note = tmp_path / f"pid-{number}"
        subprocess.run([sys.executable, str(script), str(note), str(delay)], check=False, stderr=subprocess.DEVNULL)
        lingering.append(int(note.read_text()))
    end = time.monotonic() + 10
    while (alive := [pid for pid in lingering if _is_worker(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def _is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_living_parent_keeps_its_children() -> None:
    assert callable(die_with_parent)
    assert _run([functools.partial(time.sleep, 0.2)]) == {0: None}


_RAY = """
import functools, json, math, os, sys
from collections import deque
import deadly_jobs
from engine.cluster import Crash, fan_out

folder = sys.argv[1]
jobs = [
    functools.partial(math.sqrt, 4),
    functools.partial(deadly_jobs.note_and_die, folder + "/tries"),
    functools.partial(deadly_jobs.die_once, folder + "/flag"),
    functools.partial(os.getcwd),
    functools.partial(math.sqrt, 9),
]
found = {}
added = deque([functools.partial(math.sqrt, 16)])
for done in fan_out(deadly_jobs.call, added, workers=2):
    found.setdefault("added", []).append(done.result)
    if len(found["added"]) < 3:
        added.append(functools.partial(math.sqrt, 25))
for done in fan_out(deadly_jobs.call, jobs, workers=2):
    number = next(i for i, job in enumerate(jobs) if job is done.job)
    found[number] = "crash: " + done.result.reason if isinstance(done.result, Crash) else done.result
try:
    list(fan_out(deadly_jobs.call, [functools.partial(int, "no number")], workers=1))
except ValueError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_results_crashes_retries_and_exceptions_like_local_processes(tmp_path: Path) -> None:
    (tmp_path / "deadly_jobs.py").write_text(_JOBS)
    (tmp_path / "script.py").write_text(_RAY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["0"], found["2"], found["4"]) == (2.0, "second", 3.0)
    assert found["1"].startswith("crash: ")
    assert found["added"] == [4.0, 5.0, 5.0]
    assert (tmp_path / "tries").read_text().splitlines() == ["tried"] * TRIES
    assert found["3"] != str(tmp_path), "Ray's workers must not start in the user's folder"
    assert "no number" in found["error"]


def test_an_address_where_nobody_listens_is_told_before_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=f"no Ray cluster answers at 127.0.0.1:{port}: "):
        next(fan_out(str, [1], address=f"127.0.0.1:{port}"))


@pytest.mark.ray
@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_here_whatever_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os.path\n"
        "from engine.cluster import fan_out\n"
        "done = list(fan_out(os.path.basename, ['a/b'], workers=1))\n"
        "print([one.result for one in done])\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "['b']"


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_is_killed_as_soon_as_it_is_there_does_not_hold_up_the_run(
    slides: Path, tmp_path: Path, command: Any
) -> None:
    """Ray waits for ever, inside `init`, for a worker that it started in advance and that died before it reported."""
    process = command.start(
        "shard", "shard/tiny", f"slides={slides}", f"out={tmp_path / 'out'}", "workers=2", errors=tmp_path / "errors"
    )
    worker = None
    while worker is None and process.poll() is None:
        worker = next((child for child in _descendants(process.pid) if _title(child) == b"ray::IDLE"), None)
    assert worker is not None, (tmp_path / "errors").read_text()
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=240) == 0, (tmp_path / "errors").read_text()


def _title(process: int) -> bytes:
    try:
        return (Path("/proc") / str(process) / "cmdline").read_bytes().rstrip(b"\0")
    except OSError:
        return b""


def _descendants(process: int) -> list[int]:
    try:
        children = (Path("/proc") / str(process) / "task" / str(process) / "children").read_text().split()
    except OSError:
        return []
    found = [int(child) for child in children]
    return found + [below for child in found for below in _descendants(child)]


def test_workers_on_ray_pass_over_what_they_began_with_when_they_collect_garbage() -> None:
    # Ray has all processes collect while an actor waits for room, which a lost node's replacement does to the end.
    here, jobs = gc.get_freeze_count(), deque([gc.get_freeze_count, gc.get_freeze_count])
    during = []
    for done in fan_out_to_workers(lambda number: operator.call, jobs, workers=1, cores=1, gpus=0):
        assert isinstance(done.result, int)
        assert done.result > 1000
        during.append(gc.get_freeze_count())
    assert min(during) > 1000
    assert gc.get_freeze_count() <= here
