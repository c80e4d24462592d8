"""Small stores, and processes that die at a chosen step."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.stores import begin_store, finish_store, write_slide

IDENTITY = {
    "encoder": "hipt_patch",
    "normalisation": {"mean": [0.5], "std": [0.5]},
    "spacing": 0.5,
    "versions": {"a": 1},
}
Slide = tuple[dict[str, np.ndarray], pa.Table, dict[str, Any]]


@pytest.fixture(scope="session")
def identity() -> dict[str, Any]:
    return IDENTITY


@pytest.fixture(scope="session")
def make_slide() -> Callable[..., Slide]:
    """(arrays, rows, attributes) of a slide with `count` rows, drawn by `seed`; its places all differ."""

    def make(count: int = 5, seed: int = 0, dim: int = 6) -> Slide:
        rng = np.random.default_rng(seed)
        places = rng.permutation(count).astype(np.int32)
        arrays = {
            "embedding": rng.normal(size=(count, dim)).astype(np.float32),
            "xy0": np.stack([places * 4096, places % 3 * 256 - 128], axis=1).astype(np.int32),
            "local": rng.normal(size=(count, 4, 3)).astype(np.float32),
            "present": rng.random((count, 4)) < 0.5,
        }
        rows = pa.table(
            {
                "sample_id": pa.array(rng.integers(0, 2**63, count), pa.uint64()),
                "row": pa.array(np.arange(count), pa.int32()),
                "level": pa.array([0] * count, pa.uint8()),
                "read_px": pa.array([256] * count, pa.int32()),
                "mpp": pa.array([0.5] * count, pa.float64()),
            }
        )
        return arrays, rows, {"mpp0": 0.25, "patch_px": 256, "patch_px0": 512, "width_px0": 9000, "height_px0": 8000}

    return make


@pytest.fixture(scope="session")
def make_store(make_slide: Callable[..., Slide]) -> Callable[..., Path]:
    """A finished store of slides given as name -> what `make_slide` gives (or as names alone)."""

    def make(path: Path, slides: Mapping[str, Slide] | list[str], **identity: Any) -> Path:
        begin_store(path, IDENTITY | identity)
        for seed, name in enumerate(slides):
            given = slides[name] if isinstance(slides, Mapping) else make_slide(seed=seed)
            write_slide(path, name, *given)
        finish_store(path)
        return path

    return make


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """folder -> relative path -> bytes of every file."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture(scope="session")
def dies_at() -> Callable[[int, Path, Callable[[], Any]], bool]:
    """dies_at(n, folder, work): do `work` in a child that is killed at its n-th step on something in `folder`.

    A step is any opening, renaming, making or removing of a file (an audit event of Python) and any fsync. False where
    the work was done before it came so far.
    """

    def run(number: int, folder: Path, work: Callable[[], Any]) -> bool:
        pid = os.fork()
        if pid == 0:
            _child(number, folder, work)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, "the child failed, see stderr"
        return False

    return run


def _child(number: int, folder: Path, work: Callable[[], Any]) -> None:
    left = number
    signal.alarm(60)

    def step(place: str) -> None:
        nonlocal left
        if place.startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith("os."):
            for argument in arguments[:2]:
                if isinstance(argument, str | os.PathLike):
                    step(os.fspath(argument))
                    return

    def counted(fd: Any) -> None:
        step(str(Path(f"/proc/self/fd/{fd}").readlink()))

    try:
        sys.addaudithook(hook)
        os.fsync = counted
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
