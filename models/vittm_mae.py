"""ViTTM as a masked autoencoder: most patches are left out, and each stream's decoder predicts the pixels of its own.

Source: the masked-autoencoder variant in the released code of ViTTM (arXiv 2409.07613), commit 87898a3, and MAE (arXiv
2111.06377). Hidden tokens are dropped after positions were added, so both streams run shorter. By default the streams
hide the same places (`mask: aligned`): hidden independently, most of what one must predict is visible in the other.

Shapes: B images, T tokens of a stream (M in memory, N in process), V visible ones, D dim, W decoder dim, C numbers per
target. Grids are row-major.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.objectives.hmr import (
    checked_noise,
    masked_targets,
    masked_tokens,
    normalise_targets,
    num_visible,
    pixel_targets,
)
from models.objectives.mae import constant_error, keep_tokens, mean_squared_error, put_back, visible_ids
from models.vittm import ViTTMTrunk, init_linear
from models.vittm_config import ViTTMMAEConfig


class PixelDecoder(nn.Module):
    """Visible tokens of one stream to the pixels of every patch."""

    def __init__(self, config: ViTTMMAEConfig, num_tokens: int, patch_px: int) -> None:
        super().__init__()
        width = config.decoder_dim
        self.embed = nn.Linear(config.dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, 4.0, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(config.decoder_depth)
        )
        self.norm = LayerNorm(width)
        self.predict = nn.Linear(width, 3 * patch_px**2)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def forward(self, tokens_BVD: Tensor, ids_BV: Tensor) -> Tensor:
        """Tokens [B, V, D] and their places, int64 [B, V], to float32 [B, T, C]."""
        num_tokens = self.pos_embed.shape[1]
        x_BTW = put_back(self.embed(tokens_BVD), ids_BV, self.mask_token, num_tokens) + self.pos_embed
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return self.predict(self.norm(x_BTW)).float()


class ViTTMMAE(ViTTMTrunk):
    """The trunk with a decoder on each stream."""

    config: ViTTMMAEConfig

    def __init__(self, config: ViTTMMAEConfig) -> None:
        super().__init__(config, vit_rest=False)
        self.memory_norm = LayerNorm(config.dim)
        self.memory_decoder = PixelDecoder(config, config.num_memory, config.memory_patch)
        self.process_decoder = PixelDecoder(config, config.num_process, config.process_patch)

    def forward(self, images: Tensor, *, mask_ratio: float = 0.75, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Hide a share of the patches and predict their pixels.

        Args:
            images: float [B, 3, img_size, img_size], normalised.
            mask_ratio: share of tokens to hide, in [0, 1), in the streams that `mask` names.
            noise: float [B, config.num_noise] on the images' device; the tokens of smallest noise stay visible. None
                draws it from torch's global generator: a trainer that must resume passes its own.

        Returns:
            loss: float32 scalar, memory_loss + process_loss.
            memory_loss, process_loss: float32 scalars, mean squared error over the stream's hidden patches (over all
                where it hides none).
            constant_loss: float32 scalar without gradient, what `loss` is where each stream predicts its best constant.
            memory_prediction, memory_target: float32 [B, M, 3 * memory_patch^2].
            features: float [B, D] without gradient, the mean of the visible process tokens.
            process_prediction, process_target: float32 [B, N, 3 * process_patch^2].

        Raises:
            ValueError: images or noise of another shape; a mask_ratio outside [0, 1) or that hides every token.
        """
        side = self.config.img_size
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images must have shape [B, 3, {side}, {side}] (img_size): found {list(images.shape)}")
        hidden = self._hidden(checked_noise(noise, images, self.config.num_noise), mask_ratio)
        ids = {stream: visible_ids(mask_BT, kept) for stream, (mask_BT, kept) in hidden.items()}
        memory_BMD, process_BND = self.embed(images)
        memory_BVD, process_BVD = self.run(
            keep_tokens(memory_BMD, ids["memory"]), keep_tokens(process_BND, ids["process"])
        )
        values = {
            "memory_prediction": self.memory_decoder(self.memory_norm(memory_BVD), ids["memory"]),
            "process_prediction": self.process_decoder(process_BVD, ids["process"]),
            "features": process_BVD.detach().mean(dim=1),
        }
        constant = torch.zeros((), device=images.device)
        for stream, patch_px in (("memory", self.config.memory_patch), ("process", self.config.process_patch)):
            mask_BT, kept = hidden[stream]
            where_BT = mask_BT if kept < mask_BT.shape[1] else None
            target_BTC = normalise_targets(pixel_targets(images.float(), patch_px), self.config.target_norm)
            values[f"{stream}_target"] = target_BTC
            values[f"{stream}_loss"] = mean_squared_error(values[f"{stream}_prediction"], target_BTC, where_BT)
            constant = constant + constant_error(target_BTC, where_BT)
        return {"loss": values["memory_loss"] + values["process_loss"], "constant_loss": constant, **values}

    def features(self, images: Tensor) -> Tensor:
        """Features of whole images, nothing hidden: the mean of the normalised process tokens, float [B, D]."""
        return self.tokens(images)[1].mean(dim=1)

    def _hidden(self, noise: Tensor, mask_ratio: float) -> dict[str, tuple[Tensor, int]]:
        """For each stream: which tokens are hidden, bool [B, T], and how many are not."""
        config = self.config
        if config.mask == "aligned":
            side = config.process_patch // config.memory_patch
            process_BN, kept = masked_tokens(noise, mask_ratio), num_visible(config.num_process, mask_ratio)
            return {"process": (process_BN, kept), "memory": (masked_targets(process_BN, side), kept * side**2)}
        hidden = {}
        for stream, size in (("process", config.num_process), ("memory", config.num_memory)):
            if config.mask in (stream, "independent"):
                hidden[stream] = (masked_tokens(noise[:, :size], mask_ratio), num_visible(size, mask_ratio))
                noise = noise[:, size:]
            else:
                hidden[stream] = (torch.zeros(len(noise), size, dtype=torch.bool, device=noise.device), size)
        return hidden
