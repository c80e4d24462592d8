"""Ends a rank that stalls, and says which rank it was that the others waited for.

Each rank has a thread that writes a heartbeat, one small file in RUN/.heartbeat/, and reads those of the others. When
no step is done in time, the rank that holds the others up is the one that is not heard of, or is behind, or waits for
data, or is anywhere but in a collective: in this order. It speaks first, the others only if it does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

from engine.console import say
from engine.errors import sentence
from engine.runtime import lost_connection

HEARTBEATS = ".heartbeat"
ENDING = "ending"
_LONGEST_TICK_S = 5.0
# Compilation, caches and the other ranks' start come before the first step.
_FIRST_STEP = 3.0
_DATA, _COLLECTIVE = "waiting for data", "waiting for other ranks"
_STACK = 12  # lines of the stack that are told
_OURS = ("engine", "models", "sharding")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank says of itself: the last step it has done (None: none yet), what it is doing, when it said so.

    `at` is in seconds since the epoch by the rank's own clock. `error` is the sentence it failed with.
    """

    rank: int
    host: str
    pid: int
    step: int | None
    doing: str
    at: float
    error: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def after(self) -> str:
        """` after step N`, or nothing where it has done none."""
        return "" if self.step is None else f" after step {self.step}"


class StallError(RuntimeError):
    """No step was done in time."""


class Watchdog:
    """Watches the main thread of one rank while the block runs.

    `folder` is the run's. Where no `beat` comes for `seconds` (None or 0: never mind; three times as long until the
    first one), the process is told to end by way of `end(sentence, stack of the main thread)`, which does not return.
    """

    def __init__(
        self,
        rank: int,
        seconds: float | None,
        *,
        folder: Path,
        world_size: int = 1,
        end: Callable[[str, str], None] | None = None,
    ) -> None:
        self._rank, self._world_size, self._seconds = rank, world_size, seconds or 0.0
        self._folder = folder / HEARTBEATS
        self._end = _end if end is None else end
        self._tick = min(_LONGEST_TICK_S, self._seconds / 10) if seconds else _LONGEST_TICK_S
        self._grace = 4 * self._tick + 2
        self._step: int | None = None
        self._since = time.monotonic()
        self._done = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def longest_s(self) -> float | None:
        """A time limit of collectives that leaves the word to the watchdog; None where it does not watch."""
        return 2 * _FIRST_STEP * self._seconds or None

    def beat(self, step: int) -> None:
        """Step `step` (1-based) is done."""
        self._step, self._since = step, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._publish("starting")
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
        if error is None:
            with contextlib.suppress(OSError):
                _path(self._folder, self._rank).unlink()
                self._folder.rmdir()  # by the last of them
        else:
            # An error that another rank's end has caused is no news to the others.
            self._publish(ENDING, "" if lost_connection(error) else error_text(error))

    def _watch(self) -> None:
        while not self._done.wait(self._tick):
            frame = sys._current_frames().get(self._main)
            what = doing(frame)
            self._publish(what if self._world_size > 1 else what.removeprefix(f"{_COLLECTIVE} "))
            if not self._seconds:
                continue
            allowed = self._seconds * (_FIRST_STEP if self._step is None else 1.0)
            late = time.monotonic() - self._since
            # This thread needs the interpreter, which a stalled extension may hold; the C thread behind this does not.
            faulthandler.dump_traceback_later(2 * allowed + self._grace, exit=True, file=sys.__stderr__ or 2)
            if late > allowed:
                self._judge(frame, late)

    def _judge(self, frame: FrameType | None, late: float) -> None:
        found = culprits(read_heartbeats(self._folder.parent), self._world_size, silent_s=3 * self._tick + 2)
        if self._rank not in found and self._done.wait(self._grace):
            return
        names = "; ".join(self._accuse(rank, heartbeat) for rank, heartbeat in found.items())
        text = (
            f"{names}: no step was done for {late:.0f} s (watchdog_s={self._seconds:g}; raise it if steps take that "
            "long)"
        )
        self._end(text, "".join(traceback.format_stack(frame, _STACK)) if self._rank in found else "")

    def _accuse(self, rank: int, heartbeat: Heartbeat | None) -> str:
        if heartbeat is None:
            return f"rank {rank} has not started"
        since = time.time() - heartbeat.at
        if rank != self._rank and since > 3 * self._tick + 2:
            return f"{heartbeat.name} stalls{heartbeat.after}, it was last heard of {since:.0f} s ago"
        return f"{heartbeat.name} stalls{heartbeat.after}, {heartbeat.doing}"

    def _publish(self, what: str, error: str = "") -> None:
        heartbeat = Heartbeat(self._rank, socket.gethostname(), os.getpid(), self._step, what, time.time(), error)
        path = _path(self._folder, self._rank)
        temporary = path.with_name(f".tmp-{path.name}")
        # A run must not end because its watch could not write.
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(asdict(heartbeat)), encoding="utf-8")
            temporary.replace(path)


def culprits(heartbeats: dict[int, Heartbeat], world_size: int, *, silent_s: float) -> dict[int, Heartbeat | None]:
    """The ranks that the others wait for, with what they said last; None for one that never spoke.

    A rank is silent that was heard of more than `silent_s` seconds before the one heard of last (of one clock: hosts
    whose clocks disagree by less are no matter).
    """
    latest = max((each.at for each in heartbeats.values()), default=0.0)
    silent = {rank: heartbeats.get(rank) for rank in range(world_size)}
    silent = {rank: each for rank, each in silent.items() if each is None or latest - each.at > silent_s}
    if silent:
        return silent
    least = min(each.step or 0 for each in heartbeats.values())
    behind = {rank: each for rank, each in heartbeats.items() if (each.step or 0) == least}
    for chosen in (
        behind if len(behind) < len(heartbeats) else {},
        {rank: each for rank, each in behind.items() if each.doing.startswith(_DATA)},
        {rank: each for rank, each in behind.items() if not each.doing.startswith(_COLLECTIVE)},
    ):
        if chosen:
            return dict(chosen)
    return dict(behind)


def doing(frame: FrameType | None) -> str:
    """What a thread is at, by its stack down to the innermost line of ours: waiting for data or for ranks, or there."""
    what = ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        what = what or _kind(module, frame.f_code.co_name)
        if module.split(".")[0] in _OURS:
            place = f"{module.replace('.', '/')}.py:{frame.f_lineno} in {frame.f_code.co_name}"
            return f"{what} at {place}" if what else f"at {place}"
        frame = frame.f_back
    return what or "outside of the engine"


def _kind(module: str, function: str) -> str:
    if module.startswith("engine.data."):
        return _DATA
    # DDP averages the gradients within the backward pass.
    if module.startswith(("torch.distributed", "torch.nn.parallel")) or function == "_engine_run_backward":
        return _COLLECTIVE
    return ""


def read_heartbeats(run: Path) -> dict[int, Heartbeat]:
    """Rank -> the last heartbeat of each rank of the run in folder `run`."""
    found = {}
    for path in (run / HEARTBEATS).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            heartbeat = Heartbeat(**json.loads(path.read_text(encoding="utf-8")))
            found[heartbeat.rank] = heartbeat
    return found


def forget_heartbeats(run: Path) -> None:
    """Remove what ranks that are gone have said."""
    shutil.rmtree(run / HEARTBEATS, ignore_errors=True)


def error_text(error: BaseException) -> str:
    """The sentence of an error that has one; else its type and text, and nothing for an interruption."""
    if not isinstance(error, Exception):
        return ""
    told = sentence(error)
    return told[0] if told else " ".join(f"{type(error).__name__}: {error}".split())


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _end(text: str, stack: str) -> None:
    """End this process with exit code 1; torchrun's agent or the launcher, where there is one, tells why."""
    if stack:
        say(f"the main thread of this rank is here:\n{stack}".rstrip())
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(StallError(text))
    else:
        say(f"engine: {text}")
    os._exit(1)
