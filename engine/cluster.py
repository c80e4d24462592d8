"""`fan_out`: one function over many jobs, in local processes or on Ray. The one module that imports ray.

A job's function must be importable and idempotent: a worker that dies is replaced and its job tried again. A job whose
worker dies every time becomes a `Crash` instead of ending the run (native readers can crash on hostile files).
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

from engine.runtime import die_with_parent, usable_cores

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

TRIES = 4


@dataclass(frozen=True, slots=True)
class Crash:
    """A job whose worker died on every try."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished(Generic[JobT, ResultT]):
    """A job and what came of it."""

    job: JobT
    result: ResultT | Crash


def fan_out(
    function: Callable[[JobT], ResultT],
    jobs: Sequence[JobT] | deque[JobT],
    *,
    workers: int | None = None,
    local: bool = False,
    address: str | None = None,
) -> Iterator[Finished[JobT, ResultT]]:
    """Run `function` on every job and yield each as it finishes, in no particular order.

    Args:
        jobs: taken from the front. A deque may be added to, at either end, while results are taken.
        workers: processes at a time; None is one per usable core, or all that a running cluster has.
        local: processes of this machine, without Ray.
        address: a running Ray cluster; None starts one on this machine and stops it at the end.

    An exception of `function` is raised here and ends the run; jobs already running may still finish.
    """
    if not jobs:
        return
    queue = jobs if isinstance(jobs, deque) else deque(jobs)
    if local:
        yield from _local(function, queue, workers or usable_cores())
    else:
        yield from _ray(function, queue, workers, address)


def _local(function: Callable[[JobT], ResultT], queue: deque[JobT], workers: int) -> Iterator[Finished[JobT, ResultT]]:
    # One single-process pool per worker: when a process dies it is known whose job it was.
    pools: list[ProcessPoolExecutor] = []
    again: list[tuple[JobT, int]] = []
    running: dict[Future[ResultT], tuple[int, JobT, int]] = {}
    free: list[int] = []
    try:
        while queue or again or running:
            while (queue or again) and (free or len(pools) < workers):
                job, attempt = again.pop() if again else (queue.popleft(), 1)
                if not free:
                    pools.append(_pool())
                    free.append(len(pools) - 1)
                slot = free.pop()
                running[_submit(pools, slot, function, job)] = (slot, job, attempt)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                slot, job, attempt = running.pop(future)
                free.append(slot)
                try:
                    yield Finished(job, future.result())
                except BrokenProcessPool:
                    pools[slot].shutdown(wait=False)
                    pools[slot] = _pool()
                    if attempt < TRIES:
                        again.append((job, attempt + 1))
                    else:
                        yield Finished(job, Crash(_crash_reason()))
    except BaseException:
        for pool in pools:
            for process in list((pool._processes or {}).values()):
                process.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=die_with_parent, initargs=(os.getpid(),))


def _submit(
    pools: list[ProcessPoolExecutor], slot: int, function: Callable[[JobT], ResultT], job: JobT
) -> Future[ResultT]:
    with _children_ignore_ctrl_c():
        try:
            return pools[slot].submit(function, job)
        except BrokenProcessPool:  # its process was killed while it had nothing to do
            pools[slot].shutdown(wait=False)
            pools[slot] = _pool()
            return pools[slot].submit(function, job)


@contextlib.contextmanager
def _children_ignore_ctrl_c() -> Iterator[None]:
    """Block SIGINT while a process is started: the child keeps it blocked, and the driver alone ends the run.

    A terminal sends Ctrl-C to all processes at once; each child would print a traceback of its own.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _crash_reason() -> str:
    return f"the process that read it crashed {TRIES} times"


def _ray(
    function: Callable[[JobT], ResultT], queue: deque[JobT], workers: int | None, address: str | None
) -> Iterator[Finished[JobT, ResultT]]:
    with _cluster(workers, address) as ray:
        # Ray's own retries cannot tell a crash that will repeat; ours are counted per job.
        remote = ray.remote(num_cpus=1, max_retries=0)(function)
        slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        again: list[tuple[JobT, int]] = []
        running: dict[Any, tuple[JobT, int]] = {}
        while queue or again or running:
            # A bounded window: the driver never holds more than a few tasks a worker, however many slides there are.
            while (queue or again) and len(running) < 2 * slots:
                job, attempt = again.pop() if again else (queue.popleft(), 1)
                running[remote.remote(job)] = (job, attempt)
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                job, attempt = running.pop(reference)
                try:
                    yield Finished(job, ray.get(reference))
                except (
                    ray.exceptions.WorkerCrashedError,
                    ray.exceptions.NodeDiedError,
                    ray.exceptions.OutOfMemoryError,
                ):
                    if attempt < TRIES:
                        again.append((job, attempt + 1))
                    else:
                        yield Finished(job, Crash(_crash_reason()))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except ray.exceptions.RayError as error:
                    raise RuntimeError(f"Ray: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _cluster(workers: int | None, address: str | None) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise Ray hides the GPUs from tasks that ask for none, and warns that a later version will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Otherwise Ray starts workers in advance and `init` waits for them: for ever, where one is killed meanwhile.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        # "local" starts one whatever RAY_ADDRESS says: a running cluster is asked for by --address.
        options |= {"address": "local", "num_cpus": workers or usable_cores(), "include_dashboard": False}
    else:
        options |= {"address": address}
    # Ray puts the driver's current folder first on its workers' import path. A user's folder may hold a `models/` of
    # its own, so Ray starts from an empty folder; every path in a job is absolute.
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="engine-ray-") as empty:
        os.chdir(empty)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts a handler there that ends the process at once
        except ConnectionError as error:
            raise RuntimeError(f"no Ray cluster answers at {address}: {' '.join(str(error).split())}") from None
        finally:
            os.chdir(here)
        try:
            yield ray
        finally:
            ray.shutdown()
