"""The run folder: recipe, environment, metrics, checkpoints; made once, and refused where it would be overwritten."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from engine.checkpoint import last_checkpoint
from engine.config import UsageError, dump
from engine.recipes import TrainRecipe
from sharding.atomic import atomic_path, sweep_temporary, write_json

METRICS = "metrics.jsonl"
# What a resumed run may change: where things lie, how long it goes on and how it is carried out.
_PLACES = {"run", "dataset", "cache", "cache_gib"}
_FREE_KEYS = _PLACES | {"steps", "processes", "loader", "bad_samples", "precision", "log_every", "checkpoint_every"}
_FREE_KEYS |= {"watchdog_s"}
_PACKAGES = ("pathology-engine", "torch", "numpy", "nvidia-dali-cuda120", "simplejpeg", "timm", "pyarrow")


def prepare_run(recipe: TrainRecipe, *, resume: bool) -> None:
    """Make the run folder, or check that it may be continued. The caller holds its lock.

    Raises UsageError where a run is there already and `resume` is False, or where it was started otherwise.
    """
    run = recipe.run
    saved = run / "recipe.yaml"
    last = step_of(last_checkpoint(run))
    if saved.is_file() and not last and not read_metrics(run):
        saved.unlink()  # it ended before its first step: nothing is lost by beginning anew
    if saved.is_file() and not resume:
        raise UsageError(f"run={run} holds a run already; continue it with --resume or give another folder.")
    if saved.is_file():
        _check_same(recipe, saved)
        if last > recipe.steps:
            raise UsageError(f"run={run} is at step {last} already; steps={recipe.steps} lies behind it.")
    else:
        ours = {"recipe.yaml", "environment.json", "checkpoints", "tensorboard", METRICS}
        strangers = [p.name for p in run.iterdir() if not p.name.startswith(".") and p.name not in ours]
        if strangers:
            raise UsageError(f"run={run} is not empty ({strangers[0]}) and holds no run; give a new or empty folder.")
    (run / "checkpoints").mkdir(exist_ok=True)
    sweep_temporary(run)
    for path in (run / "checkpoints").glob(".tmp-*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with atomic_path(saved) as temporary:
        temporary.write_text(dump(recipe), encoding="utf-8")
    write_json(run / "environment.json", environment())
    drop_metrics_after(run, last)


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was taken after; 0 for none."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def _check_same(recipe: TrainRecipe, saved: Path) -> None:
    old = yaml.safe_load(saved.read_text(encoding="utf-8"))
    new = recipe.model_dump(mode="json")
    changed = [key for key in sorted(old.keys() | new.keys()) if key not in _FREE_KEYS and old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        raise UsageError(
            f"{saved.parent} was started with {key}={old.get(key)}, this recipe says {new.get(key)}; "
            "a resumed run keeps its recipe: change it back, or give another run folder."
        )


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def drop_metrics_after(run: Path, step: int) -> None:
    """Forget what was logged after `step`: a resumed run does those steps again."""
    path = run / METRICS
    if not path.is_file():
        return
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. A last line that was cut off by a kill is left out."""
    path = run / METRICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
