"""One writer per folder: a lock file made with O_EXCL that names its holder, so that a dead holder is recognised."""

from __future__ import annotations

import contextlib
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
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder`'s lock; raise LockedError at once where another process holds it.

    A lock whose process is gone from this host is taken over. One of another host cannot be judged from here and is
    respected; the message says how to remove it.
    """
    path = folder / LOCK_NAME
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}
    for _ in range(3):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            holder = _read(path)
            if holder is not None and _alive(holder):
                raise LockedError(
                    f"{folder} is being written by process {holder.get('pid')} on {holder.get('host')}. "
                    f"Wait for it; if you are sure that it is gone, remove {path}"
                ) from None
            # Two processes may both find a stale lock: only one of them wins this rename, the other sees it gone.
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(f".tmp-stale-lock.{os.getpid()}"))
                path.with_name(f".tmp-stale-lock.{os.getpid()}").unlink()
    else:
        raise LockedError(f"{path} cannot be taken: other processes take it at the same moment. Try again")
    try:
        os.write(descriptor, json.dumps(me).encode())
        os.close(descriptor)
        yield
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # gone, or its writer died before it wrote its name
    return holder if isinstance(holder, dict) else None


def _alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    return isinstance(pid, int) and _start_time(pid) is not None and _start_time(pid) == holder.get("started")


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
