"""What one thread makes ahead: in order, one at a time, errors in their turn, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.data.ahead import OneAhead, making_thread


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with making_thread("test") as pool:
        yield pool


class Made:
    """A generator of 0, 1, ... that fails at `failing`; says how far it is, and in which threads it ran."""

    def __init__(self, failing: int = 1000) -> None:
        self.made, self.closed, self.failing = 0, False, failing
        self.reached = threading.Condition()
        self.threads: set[int] = set()

    def items(self) -> Generator[int, None, None]:
        try:
            while True:
                self.threads.add(threading.get_ident())
                if self.made == self.failing:
                    raise OSError("no more of them")
                with self.reached:
                    self.made += 1
                    self.reached.notify()
                yield self.made - 1
        finally:
            self.closed = True

    def wait_for(self, made: int) -> None:
        with self.reached:
            assert self.reached.wait_for(lambda: self.made == made, timeout=30)


def test_one_item_is_made_while_the_last_is_used_and_no_more(thread: ThreadPoolExecutor) -> None:
    made = Made()
    ahead = OneAhead(made.items(), thread)
    for taken in range(5):
        assert next(ahead) == taken
        made.wait_for(taken + 2)
        thread.submit(int).result()  # the thread has nothing left to do
        assert made.made == taken + 2
    ahead.close()
    assert made.closed
    assert made.threads.isdisjoint({threading.get_ident()})
    assert len(made.threads) == 1


def test_an_error_is_raised_after_the_items_before_it(thread: ThreadPoolExecutor) -> None:
    made = Made(failing=2)
    ahead = OneAhead(made.items(), thread)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="no more of them"):
        next(ahead)
    ahead.close()
    assert made.closed


def test_an_end_is_an_end(thread: ThreadPoolExecutor) -> None:
    def two() -> Generator[str, None, None]:
        yield "a"
        yield "b"

    assert list(OneAhead(two(), thread)) == ["a", "b"]


def test_closing_waits_for_what_is_being_made(thread: ThreadPoolExecutor) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Generator[int, None, None]:
        begun.set()
        assert go_on.wait(30)
        done.set()
        yield 1

    ahead = OneAhead(slow(), thread)
    assert begun.wait(30)
    threading.Timer(0.1, go_on.set).start()
    ahead.close()
    assert done.is_set()


def test_torch_has_one_core_in_the_thread_and_as_many_as_before_elsewhere(thread: ThreadPoolExecutor) -> None:
    before = torch.get_num_threads()
    assert thread.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before
