"""Painted slides, finished datasets and the `engine` command, shared by the tests of the verbs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import shard, synth
from engine.recipes import ShardRecipe

ENGINE = Path(sys.executable).parent / "engine"
REPOSITORY = Path(__file__).resolve().parents[2]
# 73 patches in 6 shards.
SMALL = {"context_px": 256, "patches_per_shard": 16}


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three painted slides of 2048 px, with labels.csv."""
    folder = tmp_path_factory.mktemp("painted") / "slides"
    synth.run(folder, slides=3, size=2048, seed=1, workers=1)
    return folder


@pytest.fixture(scope="session")
def many_slides(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve slides: copies that differ in bytes behind the last IFD. Long enough a run to be interrupted."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(12):
        data = (slides / f"synth-000{number % 3}.svs").read_bytes()
        (folder / f"copy-{number:02d}.svs").write_bytes(data + bytes([number]) * 16)
    return folder


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., ShardRecipe]:
    """A small shard recipe; every key can be given."""

    def make(slides: Path, out: Path, **keys: Any) -> ShardRecipe:
        return ShardRecipe(**{"slides": str(slides), "out": out, "workers": 1, **SMALL, **keys})

    return make


@pytest.fixture(scope="session")
def sharded(
    slides: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., ShardRecipe]
) -> tuple[Path, dict[str, Any]]:
    """(dataset of `slides`, what the verb returned). Read it, never write to it."""
    out = tmp_path_factory.mktemp("sharded") / "dataset"
    return out, shard.run(make_recipe(slides, out), local=True)


@pytest.fixture
def dataset(sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of `sharded` that may be changed."""
    return Path(shutil.copytree(sharded[0], tmp_path / "dataset"))


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """dataset -> name -> bytes of all that must not depend on who made it."""

    def read(dataset: Path) -> dict[str, bytes]:
        files = [*sorted((dataset / "shards").iterdir()), dataset / "index.parquet", dataset / "rows.bin"]
        return {str(path.relative_to(dataset)): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def listing() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """folder -> relative path -> (mtime_ns, size), folders and hidden files included."""

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        paths = [folder, *folder.rglob("*")]
        return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    return read


@dataclass(frozen=True)
class Command:
    """The console command, started in a folder whose own `models/`, `engine/` ... must not be imported."""

    folder: Path
    mark: str

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        return {**os.environ, "ENGINE_TEST_MARK": self.mark, **extra}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ENGINE), *arguments],
            cwd=self.folder,
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def start(self, *arguments: str, errors: Path) -> subprocess.Popen[bytes]:
        """In a session of its own; stderr goes to a file, so that an orphan cannot hold a pipe open."""
        with open(errors, "wb") as stderr:
            return subprocess.Popen(
                [str(ENGINE), *arguments],
                cwd=self.folder,
                env=self._environment({}),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Living processes that descend from this command, whatever became of their parents."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    if f"ENGINE_TEST_MARK={self.mark}".encode() in (path / "environ").read_bytes():
                        found.append(int(path.name))
                except OSError:
                    continue
        return found

    def survivors(self, patience_s: float) -> list[str]:
        """Command lines of the processes that are still there after `patience_s` seconds."""
        end = time.monotonic() + patience_s
        while (alive := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        lines = []
        for pid in alive:
            try:
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue
        return lines


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """The `engine` command in a folder of decoys; what it leaves behind is killed afterwards."""
    folder = tmp_path / "here"
    for name in ("engine", "models", "sharding", "configs", "benchmarks"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('a decoy was imported')\n")
    made = Command(folder, uuid.uuid4().hex)
    yield made
    for pid in made.processes():
        os.kill(pid, 9)


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """A real Aperio slide beside the repository."""
    path = REPOSITORY / ".." / "shared" / "data" / "slides" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip(f"no real slide here: {path} is absent")
    return path.resolve()
