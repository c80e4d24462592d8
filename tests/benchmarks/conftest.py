"""A quick setting and its painted slides, shared by the tests of `benchmarks`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.harness import Setting
from benchmarks.slides import SlideSet, painted


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """One round on small slides."""
    return Setting(tmp_path_factory.mktemp("bench"), 1, True, frozenset(os.sched_getaffinity(0)))


@pytest.fixture(scope="session")
def slides(setting: Setting) -> dict[SlideSet, list[Path]]:
    names: list[SlideSet] = ["chroma_420", "chroma_444", "tile_240", "large"]
    return {name: painted(setting, name) for name in names}
