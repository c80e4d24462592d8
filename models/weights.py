"""Reading checkpoints into models, strictly: every key of the model, no other key, every shape.

Published checkpoints wrap their weights and prefix their keys in a few known ways, which are undone. Nothing else is:
a checkpoint that does not fit is an error that lists what does not. Pickles are read with `weights_only=True`, so that
a downloaded file cannot run code. `models/weights_info.py` has what is recorded about weights.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models.weights_info import PREFIX, WeightsInfo, weights_digest

# In this order: a DINO checkpoint holds a teacher and a student, and the teacher is the one to use.
WRAPPERS = ("model_state_dict", "state_dict", "model", "teacher", "student")
PREFIXES = ("module.", "backbone.", "_orig_mod.")
HEADS = ("head.", "fc.", "classifier.")  # of pre-training; an encoder has none
RENAMED = {  # published prefixes, where the model has ours and not theirs
    "vit_region.": "local_vit.",  # the region ViT in later reimplementations of HIPT
    "i_classifier.fc.0.": "instance_classifier.",  # DSMIL, from here
    "b_classifier.q.": "query.",
    "b_classifier.v.1.": "value.1.",
    "b_classifier.fcc.": "bag_classifier.",
    "attention.0.": "attention.V.",  # attention MIL, plain
    "attention.3.": "attention.w.",
    "attention_V.0.": "attention.V.",  # the same, gated
    "attention_U.0.": "attention.U.",
    "attention_weights.": "attention.w.",
    "classifier.0.": "embed.0.",  # HIPT's MIL, `pool_mil` here
    "classifier.3.": "classifier.",
}
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
HUB = "hf-hub:"
SHOWN = 5  # keys listed per kind of trouble


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file as it is: its tensors on the CPU, the key they were wrapped in, and what its metadata says of them."""

    state: dict[str, Tensor]
    wrapper: str | None
    info: WeightsInfo | None


def load_weights(model: nn.Module, path: Path | str) -> WeightsInfo:
    """Load weights into `model`, in place, whatever device and dtype it has; returns what is known of them.

    Undone on the way: a wrapping dict (one of `WRAPPERS`), the `PREFIXES`, and the `HEADS` that the model lacks.

    Args:
        path: a .safetensors, .pth, .pt, .bin or .ckpt file, or `hf-hub:owner/name` for a model on the hub.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a Git-LFS pointer, a web page, a damaged file or another format; missing, extra or misshapen keys,
            listed; or a file whose metadata contradicts it or the model's position rule. The model is then unchanged.
        RuntimeError: the hub does not answer, or not with such a model.
    """
    state, info = fit(model, read_checkpoint(path), path)
    model.load_state_dict(state, strict=True)
    return info


def fit(model: nn.Module, found: Checkpoint, path: Path | str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """What `load_weights` loads, under the model's names and in the file's dtypes; the model may be on `meta`.

    `path` names the checkpoint in an error; errors are those of `load_weights`.
    """
    own = model.state_dict()
    state = _match_keys(found.state, own, path)
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    troubles = {"missing": missing, "not in the model": extra, "of another shape": misshapen}
    if any(troubles.values()):
        lists = "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in troubles.items() if keys)
        raise ValueError(
            f"{path} does not fit {type(model).__name__} ({len(own)} keys expected, {len(state)} found): {lists}. "
            "Check the model's config (sizes, preset) against the checkpoint"
        )
    if found.info is None:
        return state, WeightsInfo(weights_digest(state))
    digest = weights_digest(found.state)
    if found.info.digest != digest:
        raise ValueError(f"{path} is damaged: its weights have {digest}, its metadata says {found.info.digest}")
    rules = {rule for module in model.modules() if isinstance(rule := getattr(module, "pos_interpolation", None), str)}
    if found.info.pos_interpolation and rules - {found.info.pos_interpolation}:
        raise ValueError(
            f"{path} was trained with pos_interpolation={found.info.pos_interpolation}, and the model has "
            f"{' and '.join(sorted(rules))}: build it with the former"
        )
    return state, found.info


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a file, or a model on the hub, without knowing the model; errors are those of `load_weights`."""
    content, metadata = _fetch(str(path)) if str(path).startswith(HUB) else _read(Path(path))
    state, wrapper = _unwrap(content, path)
    if prefix := metadata.get(PREFIX):  # of a training run, which keeps a teacher's encoder among others
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        wrapper = prefix.removesuffix(".")
    try:
        return Checkpoint(state, wrapper, WeightsInfo.from_metadata(metadata))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def _fetch(name: str) -> tuple[Any, dict[str, str]]:
    """The state dict of a model on the hub, without metadata, from the cache where it has been fetched before."""
    from timm.models import load_state_dict_from_hf

    try:
        return load_state_dict_from_hf(name.removeprefix(HUB), weights_only=True), {}
    except Exception as error:  # the hub's client raises kinds of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise RuntimeError(
            f"{name} cannot be fetched ({type(error).__name__}: {reason}). Check the name, the network and, for a "
            "model that asks for consent, your access token; or give the path of a file that you have"
        ) from error


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """The object in the file, tensors on the CPU, and its metadata."""
    if not path.is_file():
        kind = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {kind}: expected a file that ends in .safetensors, {', '.join(PICKLES)}")
    _refuse_placeholders(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
            return load_file(path, device="cpu"), metadata
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
    if path.suffix not in PICKLES:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: expected .safetensors, {', '.join(PICKLES)}")
    _refuse_damaged_archive(path)
    try:
        # Published DINO checkpoints carry their command line as a Namespace, which holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # what a damaged pickle or archive runs into is any kind of error, OSError included
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


def _refuse_damaged_archive(path: Path) -> None:
    """Compare what torch.save wrote with its checksums, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6, or something that torch.load will refuse
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # as in `_read`
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it does not have its checksum; fetch it again")


def _unwrap(content: Any, path: Path | str) -> tuple[dict[str, Tensor], str | None]:
    """The state dict inside what a training script saved, and the keys it lay under, with dots between."""
    keys: list[str] = []
    wrappers: list[str] = []
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}, ".".join(wrappers) or None
        keys = [str(key) for key in content]
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        wrappers.append(wrapper)
        content = content[wrapper]
    holds = f"a dict with the keys {_first(keys)}" if keys else f"a {type(content).__name__}"
    expected = ", ".join(WRAPPERS)
    raise ValueError(f"{path} holds {holds}: expected a state dict of tensors, bare or under one of {expected}")


def _match_keys(state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """`state` under the model's names: prefixes off, foreign heads left out. Names the model has stay as they are."""
    foreign_heads = tuple(head for head in HEADS if not any(key.startswith(head) for key in own))
    matched: dict[str, Tensor] = {}
    for original_key, value in state.items():
        key = original_key
        while key not in own and key.startswith(PREFIXES):
            key = key.partition(".")[2]
        if key not in own:
            renamed = (ours + key.removeprefix(theirs) for theirs, ours in RENAMED.items() if key.startswith(theirs))
            key = next((name for name in renamed if name in own), key)
        if key.startswith(foreign_heads):
            continue
        if key in matched:
            raise ValueError(f"{path} has {key!r} twice: once of them as {original_key!r}")
        matched[key] = value
    return matched
