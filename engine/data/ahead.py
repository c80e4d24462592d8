"""Batches that are made by a thread of their own, one ahead of those who take them.

Planning a batch and handing it to a decoder takes a thread's time, and while the model's own thread does that, the
cores that compute with it wait.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from engine.data.finish import use_one_core

T = TypeVar("T")


class OneAhead(Generic[T]):
    """An iterator over what a generator yields, whose next item is made while the last one is used.

    The generator runs in `thread` alone, until `close`. What it raises is raised when its turn has come.
    """

    def __init__(self, items: Generator[T, None, None], thread: ThreadPoolExecutor) -> None:
        self._items = items
        self._thread = thread
        self._next = thread.submit(next, items, None)

    def __iter__(self) -> OneAhead[T]:
        return self

    def __next__(self) -> T:
        item = self._next.result()
        if item is None:
            raise StopIteration
        self._next = self._thread.submit(next, self._items, None)
        return item

    def close(self) -> None:
        """Wait for the item that is being made, and close the generator."""
        self._next.cancel()
        wait([self._next])
        self._items.close()


def making_thread(name: str) -> ThreadPoolExecutor:
    """Return a pool of one thread, in which torch has one core: the others are the model's."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=use_one_core)
