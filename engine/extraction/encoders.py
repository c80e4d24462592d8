"""Encoders: uint8 patches to embeddings, and grids of them to embeddings of regions.

Every batch has the same shape, the last one filled up, so that the same kernels compute it: with one thread a patch's
embedding is the same to the bit whatever its neighbours and its place; with more, places are shared out among threads,
and it is the same but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor, nn

from engine.extract_recipe import RANDOM
from engine.extraction.agreement import EncoderSpec
from models import build_model
from models.hipt import HIPT4K
from models.weights import fit, read_checkpoint
from models.weights_info import weights_digest

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_GPU_BATCH, _CPU_BATCH = 256, 16
_REGIONS_AT_ONCE = 8
_WHITE = 255


def batch_size(spec: EncoderSpec, *, gpu: bool) -> int:
    """Patches that go through an encoder together."""
    return spec.batch_size or (_GPU_BATCH if gpu else _CPU_BATCH)


class Encoder:
    """An encoder on a device. `digests` are those of its weights by their key in the recipe.

    `embed` is the bare model: normalised images float [B, 3, S, S] to embeddings [B, dim].
    """

    def __init__(self, spec: EncoderSpec, device: str) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.batch_size = batch_size(spec, gpu=self.device.type == "cuda")
        self._model, self.digests = _load(spec)
        self._model.eval().requires_grad_(False).to(self.device)
        self.embed = _embedding(self._model, spec)
        scale, shift = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1)
            for values in (
                [1 / (255 * std) for std in spec.std],
                [-mean / std for mean, std in zip(spec.mean, spec.std, strict=True)],
            )
        )
        self._scale, self._shift = scale, shift
        # Kept from batch to batch: fresh memory costs more than what is done with it.
        self._pixels = torch.empty((0, 3, spec.input_px, spec.input_px), device=self.device)
        self._white: Floats | None = None
        one = torch.zeros((1, spec.input_px, spec.input_px, 3), dtype=torch.uint8)
        self.dim = self.patches(one).shape[1]

    @torch.inference_mode()
    def patches(self, images: Tensor) -> Tensor:
        """Embed uint8 [batch_size, input_px, input_px, 3] (RGB, on any device): float32 [batch_size, dim].

        On a GPU it returns before that is computed.
        """
        if len(self._pixels) != len(images):
            self._pixels = self._pixels.new_empty((len(images), *self._pixels.shape[1:]))
        # On a CPU image by image: one stays in the cache while three operations go over it.
        together = len(images) if self.device.type == "cuda" else 1
        for pixels, part in zip(self._pixels.split(together), images.split(together), strict=True):
            pixels.copy_(part.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
            pixels.mul_(self._scale).add_(self._shift)
        with self.precision():
            return self.embed(self._pixels).float()

    @torch.inference_mode()
    def regions(self, patches: Floats, present: Bools) -> dict[str, Floats]:
        """Embed regions of side x side patches from the patches' embeddings.

        Args:
            patches: float32 [R, side^2, dim], row-major; anything where `present`, bool [R, side^2], is False.

        Returns:
            the recipe's outputs by name: local [R, side^2, dim], global [R, E], mean256 [R, dim], concat [R, E + dim].
            What is missing is 0 in `local` and left out of everything else; with partial=pad it is a white patch.
        """
        if self.spec.partial == "pad":
            patches = np.where(present[..., None], patches, self._one_white())
            present = np.ones_like(present)
        patches = np.where(present[..., None], patches, np.float32(0))
        mean256 = patches.sum(axis=1) / np.maximum(present.sum(axis=1, keepdims=True), 1)
        wanted = set(self.spec.outputs)
        found: dict[str, Floats] = {"local": patches, "mean256": mean256.astype(np.float32)}
        if wanted & {"global", "concat"}:
            found["global"] = self._global(patches, present)
            found["concat"] = np.concatenate([found["global"], found["mean256"]], axis=1)
        return {name: found[name] for name in self.spec.outputs}

    def _global(self, patches: Floats, present: Bools) -> Floats:
        """Whole regions without a mask, as published; the others by themselves."""
        region_vit = cast(HIPT4K, self._model).model4k
        out = np.zeros((len(patches), region_vit.dim), np.float32)
        whole = present.all(axis=1)
        for masked, places in ((False, np.flatnonzero(whole)), (True, np.flatnonzero(~whole))):
            for first in range(0, len(places), _REGIONS_AT_ONCE):
                chosen = places[first : first + _REGIONS_AT_ONCE]
                padded = np.resize(chosen, _REGIONS_AT_ONCE)
                grids = rearrange(torch.from_numpy(patches[padded]), "b (r c) d -> b d r c", r=self.spec.side)
                mask = torch.from_numpy(present[padded]).to(self.device) if masked else None
                with self.precision():
                    embedded = region_vit(grids.to(self.device), mask=mask).float()
                out[chosen] = embedded.cpu().numpy()[: len(chosen)]
        return out

    def _one_white(self) -> Floats:
        """The embedding of a white patch, float32 [dim]."""
        if self._white is None:
            side = self.spec.input_px
            images = torch.full((self.batch_size, side, side, 3), _WHITE, dtype=torch.uint8)
            self._white = self.patches(images)[0].cpu().numpy()
        return self._white

    def precision(self) -> AbstractContextManager[object]:
        """The context in which `embed` computes."""
        bf16 = self.spec.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each array of a store, what follows the number of rows."""
        if self.spec.side is None:
            return {"embedding": (self.dim,)}
        nothing = np.zeros((0, self.spec.side**2, self.dim), np.float32)
        found = self.regions(nothing, np.zeros(nothing.shape[:2], bool))
        return {name: value.shape[1:] for name, value in self.named(found).items()}

    def named(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs of regions under their names in a store: the first is `embedding`."""
        first = self.spec.outputs[0]
        return {"embedding" if name == first else name: value for name, value in outputs.items()}


def _load(spec: EncoderSpec) -> tuple[nn.Module, dict[str, str]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            model = build_model(spec.name, **spec.config)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"encoder.name={spec.name} cannot be built: {' '.join(str(error).split())}") from error
    if spec.weights == RANDOM:
        return model, {"weights": weights_digest(model.state_dict())}
    if spec.region_weights is None:
        if spec.name == "hipt_4k" and not any("model256." in key for key in read_checkpoint(spec.weights).state):
            raise ValueError(
                f"{Path(spec.weights).name} holds one of hipt_4k's two ViTs: give the patch ViT's as weights=FILE and "
                "the region ViT's as region_weights=FILE."
            )
        return model, {"weights": _load_into(model, spec.weights, spec)}
    whole = cast(HIPT4K, model)
    return model, {
        "weights": _load_into(whole.model256, spec.weights, spec),
        "region_weights": _load_into(whole.model4k, spec.region_weights, spec),
    }


def _load_into(model: nn.Module, file: str, spec: EncoderSpec) -> str:
    """Load a checkpoint, strictly, and return its digest."""
    found = read_checkpoint(file)
    if spec.any_positions and found.info is not None:
        found = replace(found, info=replace(found.info, pos_interpolation=None))
    state, info = fit(model, found, Path(file).name)
    model.load_state_dict(state, strict=True)
    return info.digest


def _embedding(model: nn.Module, spec: EncoderSpec) -> Callable[[Tensor], Tensor]:
    """The function of normalised images float32 [B, 3, S, S] that gives embeddings [B, dim]."""
    if spec.name == "hipt_4k":
        return cast(HIPT4K, model).model256
    if spec.name in ("vittm", "vittm_hmr"):
        return cast(Callable[[Tensor], Tensor], model.features)
    if spec.intermediate is None:
        return model
    return _stage(model, spec)


def _stage(model: Any, spec: EncoderSpec) -> Callable[[Tensor], Tensor]:
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"intermediate={spec.intermediate}: timm's {spec.config['architecture']} gives none")

    def embed(images: Tensor) -> Tensor:
        try:
            (features,) = model.forward_intermediates(
                images, indices=[spec.intermediate], stop_early=True, intermediates_only=True
            )
        except AssertionError as error:
            raise ValueError(f"intermediate={spec.intermediate}: {error}") from error
        return cast(Tensor, features).mean(dim=(2, 3))

    return embed
