"""HIPT_4K: regions of pixels, of any size, to patch and region embeddings.

Source: HIPT (arXiv 2206.02647), under the published state-dict keys. The published weights expect pixels at 0.5 um/px,
normalised with mean 0.5 and standard deviation 0.5. Beyond the published code: batches of regions, masks, bfloat16.

Shapes: B regions of R x C patches of 256 px, P = R * C in row-major order, K patches seen; D and E are the widths of
the two ViTs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from models.hipt_config import HIPT4KConfig
from models.vit import TOKEN_PX, PatchViT, RegionViT

PATCH_PX = 256
_TOKENS = PATCH_PX // TOKEN_PX  # along a side of a patch
_CPU_CHUNK, _GPU_CHUNK = 8, 256


class HIPT4K(nn.Module):
    """The patch ViT (`model256`) on every patch of a region, then the region ViT (`model4k`) on their grid."""

    def __init__(self, config: HIPT4KConfig) -> None:
        super().__init__()
        self.config = config
        self.model256 = PatchViT(config.resolved_patch)
        self.model4k = RegionViT(config.resolved_region)

    def split(self, patch_device: torch.device | str, region_device: torch.device | str) -> Self:
        """Move each ViT to a device of its own; what `features` returns lies on the second."""
        self.model256.to(patch_device)
        self.model4k.to(region_device)
        return self

    def forward(self, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Region embeddings, float32 [B, E]; arguments and errors are those of `features`."""
        return self.features(images, mask=mask)["cls4k"]

    def features(self, images: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Embeddings of both levels.

        Args:
            images: float [B, 3, height, width], normalised, of 256 px or more, on any device: `config.chunk` patches
                at a time are moved to the patch ViT's. A height that is no multiple of 256 loses its rest at top and
                bottom, (height - kept) / 2 of it at the top, a half rounded to the even number; the width alike.
            mask: bool on the images' device, True where there is something to see: [B, R, C] of patches, or
                [B, 16 R, 16 C] of tokens of 16 px. What it hides is not attended to; a patch without anything to see
                is not computed, and its embedding is 0. None is all True.

        Returns:
            cls256: float32 [B, P, D], patch embeddings. mean256: float32 [B, D], their mean over the patches seen, 0
            where there is none. cls4k: float32 [B, E], region embeddings.

        Raises:
            ValueError: images or mask of another shape.
        """
        patches = _cut(images)
        batch, rows, columns = grid = (patches.shape[0], patches.shape[1], patches.shape[2])
        seen_BRC, tokens_BRCN = _read_mask(mask, grid)
        patch_device, region_device = self.model256.cls_token.device, self.model4k.cls_token.device
        if seen_BRC is None:
            seen_K = torch.arange(batch * rows * columns, device=images.device)
        else:
            seen_K = seen_BRC.flatten().nonzero().squeeze(1)
        parts = []
        chunk = self.config.chunk or (_CPU_CHUNK if patch_device.type == "cpu" else _GPU_CHUNK)
        for part in seen_K.split(chunk):
            where = torch.unravel_index(part, grid)
            tokens = None if tokens_BRCN is None else tokens_BRCN[where]
            with self._precision(patch_device):
                parts.append(self.model256(patches[where].to(patch_device), mask=tokens).to(region_device))
        found_KD = torch.cat(parts)
        cls256 = found_KD.new_zeros(batch * rows * columns, found_KD.shape[1])
        cls256 = cls256.index_copy(0, seen_K.to(region_device), found_KD).view(batch, rows * columns, -1)
        if seen_BRC is None:
            mean256 = cls256.mean(dim=1)
        else:
            seen_BRC = seen_BRC.to(region_device)
            mean256 = cls256.sum(dim=1) / seen_BRC.sum(dim=(1, 2)).clamp(min=1).unsqueeze(1)
        with self._precision(region_device):
            cls4k = self.model4k(rearrange(cls256, "b (r c) d -> b d r c", r=rows), mask=seen_BRC)
        return {"cls256": cls256, "mean256": mean256, "cls4k": cls4k}

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if self.config.bf16 else nullcontext()


def _cut(images: Tensor) -> Tensor:
    """The patches of the middle of each region, [B, R, C, 3, 256, 256], without copying."""
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < PATCH_PX:
        raise ValueError(
            f"regions must have shape [B, 3, height, width] of {PATCH_PX} px or more: found {list(images.shape)}"
        )
    for axis in (2, 3):
        extent = images.shape[axis]
        kept = extent - extent % PATCH_PX
        images = images.narrow(axis, round((extent - kept) / 2), kept)  # round() takes halves to the even number
    return rearrange(images, "b n (r h) (c w) -> b r c n h w", h=PATCH_PX, w=PATCH_PX)


def _read_mask(mask: Tensor | None, grid: tuple[int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Which patches have something to see, [B, R, C], and which of their tokens, [B, R, C, 256]; None is all."""
    if mask is None:
        return None, None
    batch, rows, columns = grid
    found = tuple(mask.shape)
    if found == grid:
        return mask.bool(), None
    if found != (batch, rows * _TOKENS, columns * _TOKENS):
        raise ValueError(
            f"mask must have shape {list(grid)} (patches) or {[batch, rows * _TOKENS, columns * _TOKENS]} "
            f"(tokens of {TOKEN_PX} px): found {list(found)}"
        )
    tokens = rearrange(mask.bool(), "b (r i) (c j) -> b r c (i j)", i=_TOKENS, j=_TOKENS)
    return tokens.any(dim=-1), tokens
