"""What a person sees: progress on stderr, results on stdout, and native libraries kept off stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_SECONDS_BETWEEN_LINES = 30.0


class Output:
    """The real stdout, saved before native code was turned away from it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def print(self, text: str) -> None:
        data = (text + "\n").encode()
        while data:
            data = data[os.write(self._descriptor, data) :]

    def json(self, value: Any) -> None:
        self.print(json.dumps(value, ensure_ascii=False))


@contextlib.contextmanager
def own_stdout() -> Iterator[Output]:
    """Within the block file descriptor 1 is stderr, in this process and its children: cuCIM and libjpeg print there.

    Only what goes through the yielded Output reaches the real stdout.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield Output(saved)
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yield `advance(n, note)`: a bar on a terminal; elsewhere a plain line now and then, the last one at the end."""
    if sys.stderr.isatty():
        with _bar(title, total, unit) as advance_bar:
            yield advance_bar
        return
    done, started, printed = 0, time.monotonic(), time.monotonic()
    latest, told = "", True

    def tell() -> None:
        nonlocal printed, told
        printed, told = time.monotonic(), True
        left = (printed - started) / done * (total - done) if done else 0.0
        ending = f"{printed - started:.0f} s" if done >= total else f"about {left:.0f} s left"
        say(f"{title}: {done}/{total} {unit}, {ending}{'  ' + latest if latest else ''}")

    def advance(count: int, note: str = "") -> None:
        nonlocal done, latest, told
        done += count
        latest, told = note or latest, False
        if (count and done >= total) or time.monotonic() - printed >= _SECONDS_BETWEEN_LINES:
            tell()

    yield advance
    if not told:
        tell()


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(count: int, note: str = "") -> None:
            if note:
                bar.update(task, advance=count, note=note)
            else:
                bar.update(task, advance=count)

        yield advance
