"""Points at which a test can have this process killed or stopped: `ENGINE_FAULT=NAME:N` kills it the N-th time it comes
to NAME, and `ENGINE_FAULT=NAME:N:stall` has it wait there for ever.

With `ENGINE_FAULT_ONCE=FILE` only the first of several processes is hit: the one that can create FILE. With
`ENGINE_FAULT_RANK=R` only the rank R of a training run is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

_name, _, _rest = os.environ.get("ENGINE_FAULT", "").partition(":")
_count, _, _kind = _rest.partition(":")
_left = int(_count or 1)


def fault_point(name: str) -> None:
    """Die here (SIGKILL) or stay here, where a test has asked for it."""
    global _left  # noqa: PLW0603
    if name != _name or os.environ.get("ENGINE_FAULT_RANK", _rank()) != _rank():
        return
    _left -= 1
    if _left == 0 and _is_first():
        while _kind == "stall":
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def fault_points(name: str) -> Iterator[None]:
    """The points NAME.before and NAME.after, around a block."""
    fault_point(f"{name}.before")
    yield
    fault_point(f"{name}.after")


def _rank() -> str:
    return os.environ.get("RANK", "")


def _is_first() -> bool:
    token = os.environ.get("ENGINE_FAULT_ONCE")
    if token is None:
        return True
    try:
        os.close(os.open(token, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
