"""One checkpoint: safetensors weights and a weights_only-safe state in a folder that appears whole or not at all.

Its manifest notes the size and SHA-256 of both files: what a power cut, a full disk or a copy tore is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sharding.atomic import TEMPORARY_PREFIX, fsync_folder
from sharding.faults import fault_points

WEIGHTS = "model.safetensors"
_AVERAGE = "ema.safetensors"
_STATE = "state.pt"
_MANIFEST = "checkpoint.json"
Describe = Callable[[Mapping[str, Tensor]], dict[str, str]]

_FORMAT = 2  # 1 had no manifest, and no format in its state


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    *,
    best: int | None = None,
    average: AveragedModel | None = None,
    describe: Describe | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNNNN/` and point `last` at it; returns the checkpoint's folder.

    The caller holds the run's lock.

    Args:
        state: tensors, numbers, strings, lists and dicts only, so that it loads with weights_only=True.
        best: step of the run's best checkpoint so far.
        average: written as ema.safetensors.
        describe: metadata of a file of weights, so that `models.load_weights` knows what it reads.

    Raises RuntimeError where it cannot be written; what was there before is then as it was.
    """
    folder = checkpoint_folder(run, step)
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    try:
        _write(
            temporary,
            model,
            average,
            describe or (lambda _: {"format": "pt"}),
            {**state, "format": _FORMAT},
            {"format": _FORMAT, "step": step, "best": best},
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RuntimeError(
            f"{folder} could not be written ({' '.join(str(error).split())}): free some space there or make it "
            "writable, and go on with --resume"
        ) from error
    if folder.exists():  # a torn one: the run went on from an earlier checkpoint
        remove_checkpoint(folder)
    with fault_points("checkpoint.rename"):
        temporary.rename(folder)
    with fault_points("checkpoint.fsync_parent"):
        fsync_folder(folder.parent)
    point(run / "last", folder)
    return folder


def _write(
    folder: Path,
    model: nn.Module,
    average: AveragedModel | None,
    describe: Describe,
    state: dict[str, Any],
    manifest: dict[str, Any],
) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    with fault_points("checkpoint.mkdir"):
        folder.mkdir(parents=True)
    names = [WEIGHTS, _STATE]
    with fault_points("checkpoint.weights"):
        _write_weights(model, folder / WEIGHTS, describe)
    if average is not None:
        names.append(_AVERAGE)
        with fault_points("checkpoint.average"):
            _write_weights(average.module, folder / _AVERAGE, describe)
        state = {**state, "averaged": int(average.n_averaged)}
    with fault_points("checkpoint.state"):
        torch.save(state, folder / _STATE)
    manifest["files"] = {name: _measured(folder / name) for name in names}
    with fault_points("checkpoint.manifest"):
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for name in (*names, _MANIFEST):
        with fault_points("checkpoint.fsync"), open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    with fault_points("checkpoint.fsync_folder"):
        fsync_folder(folder)


def _write_weights(model: nn.Module, path: Path, describe: Describe) -> None:
    # A copy each: safetensors refuses tensors that share memory, such as one parameter under two keys.
    weights = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, path, metadata=describe(weights))


def _measured(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def point(link: Path, folder: Path) -> None:
    """Make `link` a symbolic link to `folder`, in one step."""
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}")
    temporary.unlink(missing_ok=True)
    with fault_points("checkpoint.symlink"):
        temporary.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
    with fault_points("checkpoint.replace_link"):
        temporary.replace(link)
    with fault_points("checkpoint.fsync_run"):
        fsync_folder(link.parent)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves only what `prepare_run` sweeps away."""
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with fault_points("checkpoint.rename_old"):
        folder.rename(temporary)
    with fault_points("checkpoint.remove_old"):
        shutil.rmtree(temporary)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was taken after; 0 for none."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def all_checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints by step, torn ones included."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if folder.name.removeprefix("step-").isdigit()), key=step_of)


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; each is read until one is whole."""
    return next((folder for folder in reversed(all_checkpoints(run)) if fault_of(folder) is None), None)


def fault_of(folder: Path, *, digests: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None where it is whole. Without `digests` only sizes are compared.

    One of an earlier version, which has no manifest, is whole if both files load.
    """
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return _fault_without_manifest(folder)
        for name in {WEIGHTS, _STATE, *manifest["files"]}:
            noted = manifest["files"][name]
            size = (folder / name).stat().st_size
            if size != noted["bytes"]:
                return f"{name} has {size} bytes, expected {noted['bytes']}"
            if digests and _measured(folder / name) != noted:
                return f"the bytes of {name} are not those that were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{_MANIFEST} holds no manifest"
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`checkpoint.json`: format, step, best, and size and SHA-256 of the files; None where there is none.

    Raises OSError or ValueError where it cannot be read.
    """
    path = folder / _MANIFEST
    if not path.exists():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def _fault_without_manifest(folder: Path) -> str | None:
    for name in (WEIGHTS, _STATE):
        if not (folder / name).exists():
            return f"{name} is missing"
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            pass
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        return f"it does not load: {' '.join(str(error).split())[:200]}"
    return f"{_MANIFEST} is missing" if "format" in state else None


def load_checkpoint(folder: Path, model: nn.Module, average: AveragedModel | None = None) -> dict[str, Any]:
    """Load the weights into `model` and `average`, in place, and return the state, on the CPU.

    Raises ValueError where the checkpoint does not fit the model.
    """
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
        if average is not None:
            average.module.load_state_dict(load_file(folder / _AVERAGE))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit the recipe's model: {' '.join(str(error).split())}") from None
    state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    if average is not None:
        average.n_averaged.fill_(state["averaged"])
    return state
