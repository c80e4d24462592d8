"""Stopping a run between two steps: a signal becomes a request, and all ranks agree about the step.

SIGTERM and SIGUSR1 (SLURM sends one of them before it requeues a job) have the run saved after the step it is at;
then it ends with exit code 130. Ctrl-C ends it at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator

import torch

from engine.runtime import Runtime

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, has been saved, and ends here."""

    @classmethod
    def by_signal(cls, number: int, step: int, steps: int) -> Stopped:
        return cls(f"stopped by {signal.Signals(number).name} after step {step} of {steps}, which is saved")


class StopRequest:
    """The number of the signal that asked for a stop, 0 before. A launcher and the ranks it starts share one."""

    def __init__(self) -> None:
        # No lock, so that a signal handler may set it.
        self._number = multiprocessing.get_context("spawn").RawValue("i", 0)

    @property
    def number(self) -> int:
        """The signal's number, or 0."""
        return int(self._number.value)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within the block SIGTERM and SIGUSR1 do no more than to make the request."""

        def note(number: int, _frame: object) -> None:
            self._number.value = number

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Agreement:
    """Lets all ranks decide the same at the same step.

    They exchange integers through gloo on the CPU, in the background of a step: nothing waits for a GPU, and what a
    rank said after one step is known to all after the next. One rank alone need not ask anybody.
    """

    def __init__(self, runtime: Runtime, count: int) -> None:
        """`count` integers are exchanged at a time. Every rank makes one, after the process group."""
        self._group: torch.distributed.ProcessGroup | None = None
        if runtime.world_size > 1:
            group = torch.distributed.new_group(backend="gloo")
            assert isinstance(group, torch.distributed.ProcessGroup), "every rank is a member"
            self._group = group
        self._said = torch.zeros(count, dtype=torch.int64)
        self._exchange: torch.distributed.Work | None = None

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number that any rank gave, in the call before this one where there are several ranks."""
        if self._group is None:
            return list(numbers)
        if self._exchange is not None:
            self._exchange.wait()
        agreed = self._said.tolist()
        self._said = torch.tensor(numbers)
        self._exchange = torch.distributed.all_reduce(
            self._said, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def of_main(self, number: int) -> int:
        """Rank 0's number, for all."""
        told = torch.tensor(number)
        if self._group is not None:
            torch.distributed.broadcast(told, 0, group=self._group)
        return int(told)
