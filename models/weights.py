"""Reading checkpoints into models, strictly: every key of the model, no other key, every shape.

Published checkpoints wrap their weights and prefix their keys in a few known ways, which are undone. Nothing else is:
a checkpoint that does not fit is an error that lists what does not. Pickles are read with `weights_only=True`, so that
a downloaded file cannot run code.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# In this order: a DINO checkpoint holds a teacher and a student, and the teacher is the one to use.
WRAPPERS = ("model_state_dict", "state_dict", "model", "teacher", "student")
PREFIXES = ("module.", "backbone.")
HEAD = "head."
SHOWN = 5  # keys listed per kind of trouble


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a .safetensors, .pth or .pt file into `model`, in place, whatever device and dtype it has.

    Undone on the way: a wrapping dict (one of `WRAPPERS`), the prefixes `module.` and `backbone.`, and `head.*` keys
    where the model has no head (a projection head from pre-training).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a Git-LFS pointer, a web page, a damaged file or another format; or missing, extra or misshapen
            keys, listed. The model is then unchanged.
    """
    path = Path(path)
    own = model.state_dict()
    found = _match_keys(_unwrap(_read(path), path), own, path)
    missing = sorted(own.keys() - found.keys())
    extra = sorted(found.keys() - own.keys())
    misshapen = [
        f"{key} {list(found[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(own.keys() & found.keys())
        if found[key].shape != own[key].shape
    ]
    troubles = {"missing": missing, "not in the model": extra, "of another shape": misshapen}
    if any(troubles.values()):
        lists = "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in troubles.items() if keys)
        raise ValueError(
            f"{path} does not fit {type(model).__name__} ({len(own)} keys expected, {len(found)} found): {lists}. "
            "Check the model's config (sizes, preset) against the checkpoint"
        )
    model.load_state_dict(found, strict=True)


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def _read(path: Path) -> Any:
    """The object in the file, tensors on the CPU."""
    if not path.is_file():
        kind = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {kind}: expected a .safetensors, .pth or .pt file")
    _refuse_placeholders(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path} has the suffix {path.suffix!r}: expected .safetensors, .pth or .pt")
    try:
        # Published DINO checkpoints carry their command line as a Namespace, which holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as plain weights ({reason}). Either it is damaged: fetch it again; or it pickles "
            "other Python objects: save its state_dict alone where you trust it"
        ) from error


def _refuse_placeholders(path: Path) -> None:
    """Name the usual things a download leaves in place of a checkpoint."""
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty: expected a checkpoint; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git-LFS pointer, not the checkpoint itself: run `git lfs pull` where it came from"
        )
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page (HTML), not a checkpoint: the download was refused or asks a question")


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a training script saved."""
    keys: list[str] = []
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}
        keys = [str(key) for key in content]
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    holds = f"a dict with the keys {_first(keys)}" if keys else f"a {type(content).__name__}"
    wrappers = ", ".join(WRAPPERS)
    raise ValueError(f"{path} holds {holds}: expected a state dict of tensors, bare or under one of {wrappers}")


def _match_keys(state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` under the model's names: prefixes off, a foreign head left out. Names the model has stay as they are."""
    model_has_head = any(key.startswith(HEAD) for key in own)
    matched: dict[str, Tensor] = {}
    for original_key, value in state.items():
        key = original_key
        while key not in own and key.startswith(PREFIXES):
            key = key.partition(".")[2]
        if key.startswith(HEAD) and not model_has_head:
            continue
        if key in matched:
            raise ValueError(f"{path} has {key!r} twice: once of them as {original_key!r}")
        matched[key] = value
    return matched
