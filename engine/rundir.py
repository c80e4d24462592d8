"""The run folder: recipe, environment, metrics, checkpoints; made once, and refused where it would be overwritten."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from engine.checkpoint import (
    all_checkpoints,
    checkpoint_folder,
    fault_of,
    last_checkpoint,
    point,
    read_manifest,
    step_of,
)
from engine.config import UsageError, build, dump
from engine.console import say
from engine.recipes import TrainRecipe
from sharding.atomic import TEMPORARY_PREFIX, atomic_path, sweep_temporary, write_json

METRICS = "metrics.jsonl"
# What a resumed run may change: where things lie, how long it goes on, how it is carried out and what is kept of it.
# Of these `steps` moves the schedule's end, and `processes`, `accumulate` and `loader` the last bits: all are told.
_PLACES = {"run", "dataset", "cache", "cache_gib", "weights"}
_CARRIED_OUT = {
    "steps",
    "processes",
    "accumulate",
    "loader",
    "bad_samples",
    "watchdog_s",
    "compile",
    "checkpoint_activations",
}
_KEPT = {
    "log_every",
    "watch_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_last",
    "keep_every",
    "best_of",
    "best_is",
}
_FREE_KEYS = _PLACES | _CARRIED_OUT | _KEPT
_PACKAGES = ("pathology-engine", "torch", "numpy", "nvidia-dali-cuda120", "simplejpeg", "timm", "pyarrow")


def prepare_run(recipe: TrainRecipe, *, resume: bool) -> None:
    """Make the run folder, or check that it may be continued and set it back to its last whole checkpoint.

    The caller holds its lock. Raises UsageError where a run is there already and `resume` is False, or where it was
    started otherwise, and RuntimeError where checkpoints were written and none is whole.
    """
    run = recipe.run
    saved = run / "recipe.yaml"
    if saved.is_file() and not all_checkpoints(run) and not read_metrics(run):
        saved.unlink()  # it ended before its first step: nothing is lost by beginning anew
    if saved.is_file() and not resume:
        raise UsageError(f"run={run} holds a run already; continue it with --resume or give another folder.")
    if saved.is_file():
        last = last_checkpoint(run)
        old = _recipe_of(saved)
        _check_same(recipe, old, run)
        _check_not_lost(last, old, run)
        if step_of(last) > recipe.steps:
            raise UsageError(f"run={run} is at step {step_of(last)} already; steps={recipe.steps} lies behind it.")
        if last and old.steps != recipe.steps:
            say(
                f"steps was {old.steps} and is {recipe.steps} now: the schedule ends there from step {step_of(last)} on"
            )
        for torn in all_checkpoints(run):
            if step_of(torn) > step_of(last):
                say(f"{torn} is passed over: {fault_of(torn)}; the run goes on from step {step_of(last)}")
    else:
        ours = {"recipe.yaml", "environment.json", "checkpoints", "tensorboard", METRICS}
        strangers = [p.name for p in run.iterdir() if not p.name.startswith(".") and p.name not in ours]
        if strangers:
            raise UsageError(f"run={run} is not empty ({strangers[0]}) and holds no run; give a new or empty folder.")
    (run / "checkpoints").mkdir(exist_ok=True)
    rewind(run)
    with atomic_path(saved) as temporary:
        temporary.write_text(dump(recipe), encoding="utf-8")
    write_json(run / "environment.json", environment())


def rewind(run: Path) -> None:
    """Set a run back to its last whole checkpoint: what was logged or half-written since, links. Idempotent."""
    sweep_temporary(run)
    for path in (run / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path)
    last = last_checkpoint(run)
    best = (read_manifest(last) or {}).get("best") if last else None
    for link, folder in ((run / "last", last), (run / "best", checkpoint_folder(run, best) if best else None)):
        if folder is None or not folder.exists():
            link.unlink(missing_ok=True)
        elif not link.exists() or link.resolve() != folder.resolve():
            point(link, folder)
    drop_metrics_after(run, step_of(last))


def _recipe_of(saved: Path) -> TrainRecipe:
    """The recipe of a run; keys that came later have their defaults."""
    try:
        return build(TrainRecipe, yaml.safe_load(saved.read_text(encoding="utf-8")))
    except UsageError as error:
        raise UsageError(f"{saved} is of another version of the engine: {error} Start a new run.") from None


def _check_same(recipe: TrainRecipe, old: TrainRecipe, run: Path) -> None:
    before, now = _flat(old.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if key.partition(".")[0] not in _FREE_KEYS and before.get(key) != now.get(key):
            raise UsageError(
                f"{run} was started with {key}={before.get(key)}, this recipe says {now.get(key)}; "
                "a resumed run keeps its recipe: change it back, or give another run folder."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _check_not_lost(last: Path | None, old: TrainRecipe, run: Path) -> None:
    """A run that was killed before its first checkpoint begins anew; one that has lost its checkpoints does not."""
    if last is not None:
        return
    found = [f"{folder.name}: {fault_of(folder)}" for folder in all_checkpoints(run)]
    logged = max((line["step"] for line in read_metrics(run)), default=0)
    if found or logged > min(old.checkpoint_every, old.keep_every or old.checkpoint_every):
        faults = f" ({'; '.join(found)})" if found else ""
        raise RuntimeError(
            f"{run} has done {logged or 'some'} steps, but there is no whole checkpoint of it{faults}; "
            f"put one back into {run / 'checkpoints'}, or start a new run in another folder"
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
    """The lines of metrics.jsonl, but for a last one that a kill has cut off and any that a power cut has garbled."""
    path = run / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines: list[dict[str, Any]] = []
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
