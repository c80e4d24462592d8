"""The MD5 of a file equals that of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from sharding.md5 import md5_of


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_the_md5_of_a_file_is_that_of_its_bytes(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert md5_of(str(tmp_path / "file")) == hashlib.md5(data).hexdigest()


def test_a_known_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert md5_of(str(tmp_path / "file")) == "900150983cd24fb0d6963f7d28e17f72"


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        md5_of(str(tmp_path / "nowhere"))


def test_an_error_of_reading_names_the_file() -> None:
    with pytest.raises(OSError, match="/proc/self/mem"):
        md5_of("/proc/self/mem")
