"""Long campaigns: `make soak`."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine import shard, synth
from engine.recipes import ShardRecipe

ENGINE = str(Path(sys.executable).parent / "engine")
KILLS = 200
BACKENDS: tuple[list[str], ...] = ([], ["--local"])
SETTINGS = {"context_px": 256, "patches_per_shard": 32, "group_slides": 3}


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_shard_killed_at_random_moments_ends_with_the_same_dataset(tmp_path: Path) -> None:
    """kill -9 of the driver or of a worker, with Ray and without, from before the first read to after the last write.

    Half of the slides are copied, half are decoded. A killed driver is run again; a killed worker is the driver's to
    replace.
    """
    slides = tmp_path / "slides"
    synth.run(slides / "copied", slides=2, size=3072)
    synth.run(slides / "decoded", slides=2, size=3072, seed=1, tile=240)
    for path in (slides / "decoded").glob("*.svs"):
        path.rename(path.with_stem(f"other-{path.stem}"))
    settings = [f"slides={slides}", *(f"{key}={value}" for key, value in SETTINGS.items())]
    begin = [ENGINE, "shard", "shard/tiny", *settings, "--json"]
    duration_s = {}
    for backend in BACKENDS:
        started = time.monotonic()
        undisturbed = json.loads(_finish([*begin, *backend, f"out={tmp_path / f'undisturbed{len(backend)}'}"]))
        duration_s[len(backend)] = time.monotonic() - started
    patches = undisturbed["patches"]
    assert patches["copy"] > 50
    assert patches["decode"] > 50
    moments = random.Random(0)
    told = {"driver": 0, "worker": 0, "nobody, it was through": 0}
    for number in itertools.count():
        backend, victim = BACKENDS[number % 2], ("driver", "worker")[number // 2 % 2]
        if told["driver"] + told["worker"] == KILLS:
            break
        assert number < 2 * KILLS, told
        out = tmp_path / "out"
        command = [*begin, *backend, f"out={out}"]
        killed = _disturb(command, victim, moments.random() * duration_s[len(backend)], tmp_path / "errors.txt")
        told[killed] += 1
        assert json.loads(_finish(command))["digest"] == undisturbed["digest"], (number, killed)
        _is_the_same(out, tmp_path / "undisturbed0")
        shutil.rmtree(out)
    print(f"killed, then finished: {told}")


def _disturb(command: list[str], victim: str, after_s: float, errors: Path) -> str:
    """Start a run and kill a process of it, `after_s` after its start; a worker not before there is one.

    Returns who was killed. The run has ended then.
    """
    with errors.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    time.sleep(after_s)
    while process.poll() is None:
        if victim == "driver":
            process.kill()
            process.wait()
            return victim
        for worker in _workers(process.pid):
            os.kill(worker, signal.SIGKILL)
            assert process.wait(timeout=300) == 0, errors.read_text()[-4000:]
            return victim
        time.sleep(0.01)
    return "nobody, it was through"


def _workers(driver: int) -> Iterator[int]:
    """Processes below the driver that do its jobs: Ray's workers, or a process pool's."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    waiting = [driver]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            try:
                words = (Path("/proc") / str(child) / "cmdline").read_bytes()
            except OSError:
                continue
            # Ray's own agents are called ray:: too; a node does not outlive them.
            if (words.startswith(b"ray::") and b"Agent" not in words) or b"spawn_main" in words:
                yield child


def _is_the_same(out: Path, undisturbed: Path) -> None:
    assert not [path for path in out.rglob("*") if path.name.startswith(".")], "something was left behind"
    for path in undisturbed.rglob("*"):
        if path.is_file() and path.name not in ("dataset.json", "slides.parquet", "log.jsonl", "recipe.yaml"):
            assert (out / path.relative_to(undisturbed)).read_bytes() == path.read_bytes(), path
    keys = pq.read_table(out / "index.parquet", columns=["key"])["key"].to_pylist()
    assert len(set(keys)) == len(keys)


# A plain view and a finished one, threads on, a restart from the state after every tenth.
LOADING = """
import json, os, sys
from pathlib import Path
from engine.data import Augment, CropView, Ect, open_loader

views = [CropView(112), CropView(48, ect=Ect(), rotations=True, augment=Augment(jitter=0.8, blur=0.5))]
told = {"seen": [], "resident_mib": [], "descriptors": []}
with open_loader(sys.argv[1], batch_size_per_rank=100, views=views, backend=sys.argv[2], threads=2) as loader:
    for number in range(1, 3001):
        next(loader)
        if number % 300 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            told["seen"].append(loader.seen)
            told["resident_mib"].append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)
            told["descriptors"].append(len(list(Path("/proc/self/fd").iterdir())))
            loader.load_state_dict(loader.state_dict())
print(json.dumps(told))
"""


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_three_hundred_thousand_samples_leave_memory_and_descriptors_flat(backend: str, tmp_path: Path) -> None:
    synth.run(tmp_path / "slides", slides=2, size=2048)
    recipe = ShardRecipe(
        slides=str(tmp_path / "slides"), out=tmp_path / "dataset", context_px=128, patches_per_shard=8, workers=1
    )
    shard.run(recipe, local=True)
    command = [sys.executable, "-P", "-c", LOADING, str(tmp_path / "dataset"), backend]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{backend}: {told}")
    assert told["seen"][-1] == 300_000
    assert len(set(told["descriptors"])) == 1
    # Before and after the middle; allocators settle within the first tenths. 1 KB a sample would be 150 MiB.
    resident_mib = told["resident_mib"][2:]
    assert sum(resident_mib[4:]) / 4 - sum(resident_mib[:4]) / 4 < 40


def _finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
