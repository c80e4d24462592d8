"""One function over many jobs, in local processes or on Ray. The one module that imports ray.

`fan_out` is for functions that can start anywhere, `fan_out_to_workers` for those that take long to make: a model.

A job's function must be importable and idempotent: a worker that dies is replaced and its job tried again. A job whose
worker dies every time becomes a `Crash` instead of ending the run (native readers can crash on hostile files).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engine.console import say
from engine.figures import as_count
from engine.job_slots import AT_ONCE, TRIES, Crash, Finished, Jobs, JobT, ResultT, Slot, crash_reason
from engine.local_workers import LocalWorker, children_ignore_ctrl_c, ready
from engine.runtime import check_listens, die_with_parent, usable_cores

_PATIENCE_S = 30.0


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
                        yield Finished(job, Crash(crash_reason()))
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
    with children_ignore_ctrl_c():
        try:
            return pools[slot].submit(function, job)
        except BrokenProcessPool:  # its process was killed while it had nothing to do
            pools[slot].shutdown(wait=False)
            pools[slot] = _pool()
            return pools[slot].submit(function, job)


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
                        yield Finished(job, Crash(crash_reason()))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except ray.exceptions.RayError as error:
                    raise RuntimeError(f"Ray: {' '.join(str(error).split())}") from None


def fan_out_to_workers(
    make: Callable[[int], Callable[[JobT], ResultT]],
    jobs: deque[JobT],
    *,
    workers: int | None,
    cores: int,
    gpus: int,
    local: bool = False,
    address: str | None = None,
) -> Iterator[Finished[JobT, ResultT]]:
    """Have long-lived workers make a function once, call it for every job, and yield each as it finishes.

    A worker has up to AT_ONCE jobs, each in a thread: one can be prepared while the other is computed.

    Args:
        make: called in every worker with its number on its machine (0 on Ray, which shows it its own GPU alone).
        jobs: taken from the front; may be added to while results are taken.
        workers: how many; None is as many as the GPUs or cores of the machine or cluster allow.
        cores, gpus: of each worker.
        local, address: as for `fan_out`.

    A worker that dies, with its node or without, is replaced once there is room for another, and its jobs are tried
    again. Exceptions are raised here and end the run, those of `make` too.
    """
    if not jobs:
        return
    if local:
        yield from _to_processes(make, jobs, workers or max(1, usable_cores() // cores))
    else:
        yield from _to_actors(make, jobs, workers, cores, gpus, address)


def _to_processes(
    make: Callable[[int], Callable[[JobT], ResultT]], queue: deque[JobT], workers: int
) -> Iterator[Finished[JobT, ResultT]]:
    waiting: Jobs[JobT] = Jobs(queue)
    tickets = itertools.count()
    slots: list[Slot[JobT]] = []
    try:
        slots += [Slot(LocalWorker(make, number, AT_ONCE)) for number in range(min(workers, len(queue)))]
        while waiting.left or any(slot.running for slot in slots):
            while (found := waiting.next_for(slots)) is not None:
                slot, job, attempt = found
                ticket = next(tickets)
                slot.running[ticket] = (job, attempt)
                with contextlib.suppress(OSError):  # it died; that shows when its answer is read
                    slot.worker.send(ticket, job)
            by_worker = {id(slot.worker): slot for slot in slots}
            for worker in ready([slot.worker for slot in slots]):
                slot = by_worker[id(worker)]
                try:
                    ticket_done, value, good = worker.receive()
                except (EOFError, OSError):
                    yield from waiting.lost(slot)
                    worker.end(at_once=True)
                    slot.worker = LocalWorker(make, slots.index(slot), AT_ONCE)
                    continue
                if not good:
                    raise value
                if ticket_done is None:
                    slot.is_up = True
                else:
                    yield Finished(slot.finished(ticket_done), value)
    except BaseException:
        for slot in slots:
            slot.worker.end(at_once=True)
        raise
    for slot in slots:
        slot.worker.end(at_once=False)


class _Actor:
    """What Ray starts for a worker."""

    def start(self, make: Callable[[int], Callable[[Any], Any]]) -> None:
        self._function = make(0)
        _spare_what_is_there()

    def run(self, job: Any) -> Any:
        return self._function(job)


def _spare_what_is_there() -> None:
    """Let the garbage collector pass over what is there already.

    While an actor waits for room, as one does after a node's death, Ray has every process of the cluster collect its
    garbage, all of them at once and every ten seconds: with torch imported that is about 0.3 s of a core each.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _sparing_what_is_there() -> Iterator[None]:
    _spare_what_is_there()
    try:
        yield
    finally:
        gc.unfreeze()


def _to_actors(
    make: Callable[[int], Callable[[JobT], ResultT]],
    queue: deque[JobT],
    workers: int | None,
    cores: int,
    gpus: int,
    address: str | None,
) -> Iterator[Finished[JobT, ResultT]]:
    with _cluster(None, address) as ray, _sparing_what_is_there():
        remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0, max_concurrency=AT_ONCE)(_Actor)
        total = ray.cluster_resources()
        room = total.get("GPU", 0) // gpus if gpus else total.get("CPU", 1) // cores
        starting: dict[Any, Slot[JobT]] = {}

        def begin(slot: Slot[JobT]) -> None:
            slot.worker = remote.remote()
            starting[slot.worker.start.remote(make)] = slot

        slots = [Slot[JobT](None) for _ in range(min(workers or max(1, int(room)), len(queue)))]
        for slot in slots:
            begin(slot)
        waiting: Jobs[JobT] = Jobs(queue)
        while waiting.left or any(slot.running for slot in slots):
            while (found := waiting.next_for(slots)) is not None:
                slot, job, attempt = found
                slot.running[slot.worker.run.remote(job)] = (job, attempt)
            references = {reference: slot for slot in slots for reference in slot.running} | starting
            done, _ = ray.wait(list(references), num_returns=1, timeout=_PATIENCE_S)
            if not done and not any(slot.is_up for slot in slots):
                needed = f"{as_count(cores, 'core')}{' and a GPU' if gpus else ''}"
                say(f"no worker is up yet: it starts, or waits for {needed} of the Ray cluster")
            for reference in done:
                slot = references[reference]
                try:
                    value = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
                    starting.pop(reference, None)
                    yield from waiting.lost(slot)
                    ray.kill(slot.worker)
                    begin(slot)
                except ray.exceptions.RayError as error:
                    raise RuntimeError(f"Ray: {' '.join(str(error).split())}") from None
                else:
                    if starting.pop(reference, None) is not None:
                        slot.is_up = True
                    else:
                        yield Finished(slot.finished(reference), value)


def cluster_gpus(address: str) -> int:
    """The GPUs of a running cluster."""
    with _cluster(None, address) as ray:
        return int(ray.cluster_resources().get("GPU", 0))


@contextlib.contextmanager
def _cluster(workers: int | None, address: str | None) -> Iterator[Any]:
    if address is not None:
        check_listens(address, "Ray cluster")  # Ray itself takes minutes to find that out
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
