"""One writer per folder: a lock file, made exclusively, names its holder, so that a dead holder is recognised."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK_NAME = ".lock"


class LockedError(RuntimeError):
    """Another living process writes here."""


@contextlib.contextmanager
def folder_lock(folder: Path, *, job: str | None = None) -> Iterator[bool]:
    """Hold `folder`'s lock, as True; raise LockedError at once where another process holds it.

    A lock whose process is gone from this host is taken over, and so is that of an earlier start of this SLURM job,
    which has ended where the job was queued again. Any other of another host cannot be judged from here and is
    respected; the message says how to remove it. Processes of one `job` share the folder: the first of them holds the
    lock, and to the others this is False.
    """
    path = folder / LOCK_NAME
    with _judging(folder):
        mine = _take(folder, path, job)
    try:
        yield mine
    finally:
        if mine:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _judging(folder: Path) -> Iterator[None]:
    """Let one process of this host at a time look at the lock and take it over.

    Without it two could find the same stale lock, and the slower would remove the faster one's fresh lock. The kernel
    drops this guard with its process, so it cannot go stale itself. A file system without it is used as it is.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(folder: Path, path: Path, job: str | None) -> bool:
    holder = _read(path)
    if holder is not None and not _alive(holder):
        path.unlink(missing_ok=True)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid()), "job": job}
    me |= {"slurm": _slurm_start()}
    try:
        _create(path, json.dumps(me).encode())
    except FileExistsError:
        holder = holder or _read(path) or {}
        if job is not None and holder.get("job") == job:
            return False
        raise LockedError(
            f"{folder} is being written by process {holder.get('pid')} on {holder.get('host')}. "
            f"Wait for it; if you are sure that it is gone, remove {path}"
        ) from None
    return True


def _create(path: Path, content: bytes) -> None:
    """Make the lock with its content in one step, or raise FileExistsError; this also decides between hosts."""
    temporary = path.with_name(f".tmp-lock.{socket.gethostname()}.{os.getpid()}")
    temporary.write_bytes(content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: O_EXCL is as exclusive, but for a moment the lock is empty
        with open(path, "xb") as file:
            file.write(content)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds the lock: None where there is none, {} where its writer died before it wrote its name."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(holder: dict[str, Any]) -> bool:
    if not holder:
        return False
    now, then = _slurm_start(), holder.get("slurm")
    if now and then and now[0] == then[0] and now[1] > then[1]:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    return isinstance(pid, int) and _start_time(pid) is not None and _start_time(pid) == holder.get("started")


def _slurm_start() -> list[int] | None:
    """[number of this SLURM job, how often it was queued again]; None outside of SLURM."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return [int(job), int(restarts)] if job.isdigit() and restarts.isdigit() else None


def _start_time(pid: int) -> str | None:
    """When process `pid` started, in clock ticks since boot (a number used again is told apart); None if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        try:
            os.kill(pid, 0)  # a system without /proc
        except OSError:
            return None
        return "unknown"
