"""Points at which a test can have this process killed: `ENGINE_FAULT=NAME:N` kills it the N-th time it comes to NAME.

With `ENGINE_FAULT_ONCE=FILE` only the first of several processes dies: the one that can create FILE.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

_name, _, _count = os.environ.get("ENGINE_FAULT", "").partition(":")
_left = int(_count or 1)


def fault_point(name: str) -> None:
    """Die here (SIGKILL), where a test has asked for it."""
    global _left  # noqa: PLW0603
    if name != _name:
        return
    _left -= 1
    if _left == 0 and _is_first():
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def fault_points(name: str) -> Iterator[None]:
    """The points NAME.before and NAME.after, around a block."""
    fault_point(f"{name}.before")
    yield
    fault_point(f"{name}.after")


def _is_first() -> bool:
    token = os.environ.get("ENGINE_FAULT_ONCE")
    if token is None:
        return True
    try:
        os.close(os.open(token, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
