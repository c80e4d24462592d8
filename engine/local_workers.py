"""Long-lived worker processes of this machine, each of which does a few jobs at a time in threads."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, get_context
from typing import Any

from engine.runtime import die_with_parent

Make = Callable[[int], Callable[[Any], Any]]


class LocalWorker:
    """A process that made a function once and calls it for every job; `number` tells workers of a machine apart."""

    def __init__(self, make: Make, number: int, threads: int) -> None:
        context = get_context("spawn")
        self.answers, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, number, threads, os.getpid()), daemon=True)
        with children_ignore_ctrl_c():
            self._process.start()
        theirs.close()

    def send(self, ticket: int, job: Any) -> None:
        """Have it do a job. Raises OSError where it is dead."""
        self.answers.send((ticket, job))

    def receive(self) -> tuple[int | None, Any, bool]:
        """(ticket, result or exception, whether it is a result). Raises EOFError or OSError where it died."""
        found: tuple[int | None, Any, bool] = self.answers.recv()
        return found

    def end(self, *, at_once: bool) -> None:
        """End the process, which has nothing to do, or is not to finish it: what it writes is idempotent."""
        self.answers.close()  # it takes that for the end of its jobs
        if at_once:
            self._process.terminate()
        self._process.join()


@contextlib.contextmanager
def children_ignore_ctrl_c() -> Iterator[None]:
    """Block SIGINT while a process is started: the child keeps it blocked, and the driver alone ends the run.

    A terminal sends Ctrl-C to all processes at once; each child would print a traceback of its own.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def ready(workers: list[LocalWorker]) -> list[LocalWorker]:
    """Wait for those that have an answer, or have died."""
    by_connection = {id(worker.answers): worker for worker in workers}
    return [by_connection[id(one)] for one in connection.wait([worker.answers for worker in workers])]


def _serve(jobs: Any, make: Make, number: int, threads: int, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    sending = threading.Lock()

    def answer(ticket: int | None, value: Any, good: bool) -> None:
        with sending:
            jobs.send((ticket, value, good))

    def do(ticket: int, job: Any) -> None:
        try:
            answer(ticket, call(job), True)
        except Exception as error:
            answer(ticket, _portable(error), False)

    try:
        call = make(number)
    except Exception as error:
        answer(None, _portable(error), False)
        return
    answer(None, None, True)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            try:
                pool.submit(do, *jobs.recv())
            except (EOFError, ConnectionResetError):
                return


def _portable(error: Exception) -> Exception:
    """The error, or its words where it cannot be sent; it loses its traceback, so its words carry the place."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
