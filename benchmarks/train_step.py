"""Training cases of `engine bench step`: the trainer's own loop with the real loader, and with one batch in memory.

Each contender has a process of its own that lasts for the case, with every core, as `engine train` has them. A round
trains anew from step 0: a few steps that are not counted, in which the loader fills what it holds ready, then those
that are. The run ends there, before anything is saved.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from benchmarks.harness import (
    OURS,
    CannotRunError,
    Case,
    Round,
    Setting,
    against_peers,
    cpu_seconds,
    every_core,
    measure,
)
from benchmarks.slides import sharded
from engine.config import apply_overrides, read_recipe
from engine.data import PatchBatch, StreamLoader
from engine.local_workers import children_ignore_ctrl_c
from engine.objectives import make_objective
from engine.recipes import TrainRecipe
from engine.runtime import Runtime, die_with_parent
from engine.stopping import StopRequest
from engine.train import open_train_loader
from engine.train_recipe import build_train_recipe
from engine.trainer import train
from engine.watchdog import Watchdog

SYNTHETIC = "synthetic"

# Steps (not counted, counted) of a round. The loader holds up to 7 batches: 3 being read, 2 in DALI, 2 being finished.
_CPU, _GPU, _QUICK = (8, 24), (20, 60), (1, 2)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a contender does in a round; `in_memory` repeats the loader's first batch."""

    recipe: TrainRecipe
    warm: int
    timed: int
    in_memory: bool


@dataclass(frozen=True, slots=True)
class _Window:
    """The counted steps of a round, and the most memory that the contender's process has had so far."""

    round: Round
    waited_s: float
    peak_gib: float
    gpu_peak_gib: float


class _WindowEnd(Exception):  # no error: it leaves the trainer's loop
    pass


class _Clocked:
    """A loader that times the counted steps, from the request for the first one's batch to that for the one after."""

    def __init__(self, loader: StreamLoader, work: _Work) -> None:
        self._loader, self._work = loader, work
        self._batch: PatchBatch | None = None
        self._taken = 0
        self._waited_s = self._began = self._began_cpu = 0.0
        if work.in_memory:
            self._batch = next(loader)
            loader.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __next__(self) -> PatchBatch:
        if self._taken in (self._work.warm, self._work.warm + self._work.timed):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if self._taken > self._work.warm:
                raise _WindowEnd
            self._waited_s, self._began, self._began_cpu = 0.0, time.perf_counter(), cpu_seconds()
        self._taken += 1
        asked = time.perf_counter()
        batch = next(self._loader) if self._batch is None else self._batch
        self._waited_s += time.perf_counter() - asked
        return batch

    def window(self) -> _Window:
        """What was counted, now that it has ended."""
        seconds, cpu_s = time.perf_counter() - self._began, cpu_seconds() - self._began_cpu
        units = self._work.timed * self._work.recipe.batch_size
        gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return _Window(Round(units, seconds, cpu_s=cpu_s), self._waited_s, _peak_gib(), gpu / 2**30)


def _peak_gib() -> float:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 2**20


def _train(work: _Work) -> _Window:
    """One round, in the contender's process."""
    with tempfile.TemporaryDirectory(dir=work.recipe.run) as run, contextlib.redirect_stderr(io.StringIO()):
        recipe = work.recipe.model_copy(update={"run": Path(run)})
        runtime = Runtime.detect(recipe.precision)
        objective = make_objective(recipe)
        watchdog = Watchdog(runtime.rank, None, folder=recipe.run)
        with watchdog, open_train_loader(recipe, runtime) as loader:
            clocked = _Clocked(loader, work)
            try:
                train(recipe, runtime, objective, cast(StreamLoader, clocked), StopRequest(), watchdog)
            except _WindowEnd:
                return clocked.window()
    raise AssertionError("a recipe of the bench has more steps than are timed")


def _prepare(parent: int, gpu: bool) -> None:
    die_with_parent(parent)
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def _process(setting: Setting, *, gpu: bool) -> Iterator[ProcessPoolExecutor]:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _prepare, (os.getpid(), gpu)) as pool:
        with every_core(setting), children_ignore_ctrl_c():
            pool.submit(int).result()  # starts it
        yield pool


def _steps(setting: Setting, name: str, shards: str, *, settings: tuple[str, ...] = (), gpu: bool) -> dict[str, Any]:
    """Steps of a recipe on painted slides; rates are of samples."""
    if gpu and not torch.cuda.is_available():
        raise CannotRunError("torch sees no CUDA device")
    dataset, runs = sharded(setting, shards), setting.work / "runs"
    keys = [f"dataset={dataset}", f"run={runs}", "steps=100000", *settings]
    recipe = build_train_recipe(apply_overrides(read_recipe("train", f"train/{name}"), keys))
    warm, timed = _QUICK if setting.quick else _GPU if gpu else _CPU
    windows: dict[str, list[_Window]] = {OURS: [], SYNTHETIC: []}
    runs.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        contenders = {}
        for contender, seen in windows.items():
            work = _Work(recipe, warm, timed, in_memory=contender == SYNTHETIC)
            contenders[contender] = partial(_once, stack.enter_context(_process(setting, gpu=gpu)), work, seen)
        played = measure(contenders, setting)
    counted = {contender: seen[1:] for contender, seen in windows.items()}
    return against_peers(played, "samples/s") | {
        "data_wait_share": {
            contender: median(one.waited_s / one.round.seconds for one in seen) for contender, seen in counted.items()
        },
        "peak_gib": {contender: seen[-1].peak_gib for contender, seen in counted.items()},
        "gpu_peak_gib": {contender: seen[-1].gpu_peak_gib for contender, seen in counted.items()},
        "batch_size": recipe.batch_size,
    }


def _once(pool: ProcessPoolExecutor, work: _Work, seen: list[_Window]) -> Round:
    seen.append(pool.submit(_train, work).result())
    return seen[-1].round


def _gpu_cases() -> Iterator[tuple[str, Case]]:
    for name, shards, batch_size in (("vittm_hmr", "context320", 256), ("hipt_patch_dino", "lossless256", 128)):
        for suffix, compiled in (("", "false"), ("_compiled", "true")):
            settings = (f"batch_size={batch_size}", f"compile={compiled}", "precision=bf16")
            yield f"gpu_train_{name}{suffix}", partial(_steps, name=name, shards=shards, settings=settings, gpu=True)


CASES: dict[str, Case] = {
    "train_vittm_hmr_tiny": partial(_steps, name="vittm_hmr_tiny", shards="tiny", gpu=False),
    "train_hipt_patch_dino_tiny": partial(_steps, name="hipt_patch_dino_tiny", shards="tiny", gpu=False),
    **dict(_gpu_cases()),
}
