"""Which errors become one sentence, and which exit code they ask for."""

from __future__ import annotations

import errno

import pytest

from engine.config import UsageError
from engine.errors import sentence
from sharding.index import DatasetDamagedError
from sharding.lock import LockedError


def test_mistakes_of_the_user_are_usage() -> None:
    assert sentence(UsageError("unknown key 'x'.")) == ("unknown key 'x'.", True)
    assert sentence(ValueError("no dataset")) == ("no dataset", True)


@pytest.mark.parametrize("error", [LockedError("held"), DatasetDamagedError("changed"), RuntimeError("no driver")])
def test_failures_of_the_run_are_not_usage(error: Exception) -> None:
    assert sentence(error) == (str(error), False)


def test_an_os_error_names_the_file_and_says_what_to_do_about_a_full_disk() -> None:
    found = sentence(OSError(errno.EACCES, "Permission denied", "/data/x"))
    assert found == ("/data/x: Permission denied", False)
    full = sentence(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert full is not None
    assert "free some space" in full[0]
    assert full[1] is False


def test_a_message_of_several_lines_becomes_one() -> None:
    assert sentence(RuntimeError("first\n  second")) == ("first second", False)


def test_an_error_without_a_message_is_named() -> None:
    assert sentence(RuntimeError()) == ("RuntimeError", False)


def test_a_missing_library_is_told_but_a_broken_import_of_ours_keeps_its_traceback() -> None:
    assert sentence(ImportError("No module named 'ray'", name="ray")) == ("No module named 'ray'", False)
    assert sentence(ImportError("cannot import name", name="engine.shard")) is None


@pytest.mark.parametrize(
    "error",
    [AssertionError(), KeyError("x"), TypeError("x"), NotImplementedError(), RecursionError(), AttributeError()],
)
def test_errors_of_ours_keep_their_traceback(error: Exception) -> None:
    assert sentence(error) is None
