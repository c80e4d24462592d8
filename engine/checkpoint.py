"""Checkpoints: safetensors weights and a weights_only-safe state in a folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sharding.atomic import TEMPORARY_PREFIX, fsync_folder

_WEIGHTS = "model.safetensors"
_AVERAGE = "ema.safetensors"
_STATE = "state.pt"

Describe = Callable[[Mapping[str, Tensor]], dict[str, str]]


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    *,
    average: AveragedModel | None = None,
    describe: Describe | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNNNN/` and point `last` at it; returns the checkpoint's folder.

    Args:
        state: tensors, numbers, strings, lists and dicts only, so that it loads with weights_only=True.
        average: written as ema.safetensors.
        describe: the metadata of a file of weights, so that `models.load_weights` knows what it reads.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    names = [_WEIGHTS, _STATE]
    _write_weights(model, temporary / _WEIGHTS, describe)
    if average is not None:
        names.append(_AVERAGE)
        _write_weights(average.module, temporary / _AVERAGE, describe)
        state = state | {"averaged": int(average.n_averaged)}
    torch.save(state, temporary / _STATE)
    for name in names:
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(temporary)
    if folder.exists():  # left by a run that was killed after this rename and before its `last`
        shutil.rmtree(folder)
    temporary.rename(folder)
    fsync_folder(folder.parent)
    _point(run / "last", folder)
    return folder


def _write_weights(model: nn.Module, path: Path, describe: Describe | None) -> None:
    # A copy each: safetensors refuses tensors that share memory, such as one parameter under two keys.
    weights = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, path, metadata=describe(weights) if describe else {"format": "pt"})


def _point(link: Path, folder: Path) -> None:
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
    temporary.replace(link)
    fsync_folder(link.parent)


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. One whose name stands without its prefix is whole."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def load_checkpoint(folder: Path, model: nn.Module, average: AveragedModel | None = None) -> dict[str, Any]:
    """Load the weights into `model` and `average`, in place, and return the state, on the CPU.

    Raises ValueError where the checkpoint does not fit the model.
    """
    try:
        model.load_state_dict(load_file(folder / _WEIGHTS))
        if average is not None:
            average.module.load_state_dict(load_file(folder / _AVERAGE))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit the recipe's model: {' '.join(str(error).split())}") from None
    state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    if average is not None:
        average.n_averaged.fill_(state["averaged"])
    return state
