"""ViTTM-HMR: a vision transformer token Turing machine trained by hierarchical masked reconstruction.

A few process tokens (coarse patches of the image) compute; many memory slots are read and rewritten in every block.
The process tokens then predict a target for each fine patch of the image.

Sources: ViTTM (arXiv 2409.07613); vittm-hmr (MIT), commit 2761a40. `preset="original"` reproduces the latter, under its
state-dict keys, with its defects. The default mends them:

    original                                              repaired
    masked tokens lose their position: all their          the position is added after masking
      predictions in an image are identical
    the last block writes a memory nobody reads and the   no last write, and a frozen target projection: every
      target projection asks for gradients: plain DDP       trainable parameter gets a gradient in every step, so
      stops at step two                                     plain DDP works
    loss over all positions on raw targets, where a       loss on masked positions (or `loss_on: all`), standardised
      constant reaches cosine 0.98                          targets, and the best constants' score beside it
    process tokens see the full-resolution image          they see it area-averaged by `ratio`: 64 px fields as 16 x 16
    256 memory slots whatever the sizes                   one slot per target, or as configured
    READ and WRITE take raw keys and values               keys and values are layer-normalised
    memory starts as a learned bank                       so it does, or with the visible memory patches added to it
    targets are random projections of the image           so they are, or a teacher's tokens, or pixels

Both presets compute the feature map, the normaliser and the loss in float32 under autocast; SDPA's softmax and
LayerNorm accumulate in float32 by themselves.

Shapes: B images, N process tokens, M memory slots, T targets, D dim, C numbers per target; Q and S are the tokens that
ask and the tokens that answer in an attention, H heads of E = D/H. Grids are row-major.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from models.objectives.hmr import (
    checked_noise,
    constant_cosine,
    masked_targets,
    masked_tokens,
    negative_cosine,
    normalise_targets,
    num_visible,
    pixel_targets,
)
from models.vittm_config import ViTTMHMRConfig
from models.vittm_heads import kernel_attention


class LinearCrossAttention(nn.Module):
    """`kernel_attention` at full width, without biases, and a projection after it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query_BQD: Tensor, source_BSD: Tensor) -> Tensor:
        """[B, Q, D] asks [B, S, D]; returns [B, Q, D]."""
        out_BQD = kernel_attention(self.q_proj(query_BQD), self.k_proj(source_BSD), self.v_proj(source_BSD), self.heads)
        return self.out_proj(out_BQD)


class SelfAttention(nn.Module):
    """Softmax self-attention with the parameter names and initial values of nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        qkv_BNX = F.linear(x_BND, self.in_proj_weight, self.in_proj_bias)
        q_BHNE, k_BHNE, v_BHNE = rearrange(qkv_BNX, "b n (three h e) -> three b h n e", three=3, h=self.heads)
        out_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        return self.out_proj(rearrange(out_BHNE, "b h n e -> b n (h e)"))


def _mlp(dim: int, mlp_ratio: float) -> nn.Sequential:
    hidden = int(dim * mlp_ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class HMRBlock(nn.Module):
    """READ memory into the process tokens, COMPUTE on them, WRITE back; all residual, pre-norm, no dropout.

    Args:
        normalise_source: layer-normalise what READ and WRITE take keys and values from (the original does not).
        writes: False for a block whose memory nobody reads: it has no write and no memory MLP and returns memory as is.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, *, normalise_source: bool = False, writes: bool = True
    ) -> None:
        super().__init__()
        self.writes = writes
        self.norm_read = nn.LayerNorm(dim)
        self.norm_read_source = nn.LayerNorm(dim) if normalise_source else nn.Identity()
        self.read_attn = LinearCrossAttention(dim, heads)
        self.norm_proc = nn.LayerNorm(dim)
        self.proc_attn = SelfAttention(dim, heads)
        if writes:
            self.norm_write = nn.LayerNorm(dim)
            self.norm_write_source = nn.LayerNorm(dim) if normalise_source else nn.Identity()
            self.write_attn = LinearCrossAttention(dim, heads)
        self.norm_mlp_p = nn.LayerNorm(dim)
        self.mlp_process = _mlp(dim, mlp_ratio)
        if writes:
            self.norm_mlp_m = nn.LayerNorm(dim)
            self.mlp_memory = _mlp(dim, mlp_ratio)

    def forward(self, process_BND: Tensor, memory_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Process tokens [B, N, D] and memory [B, M, D], both renewed."""
        process_BND = process_BND + self.read_attn(self.norm_read(process_BND), self.norm_read_source(memory_BMD))
        process_BND = process_BND + self.proc_attn(self.norm_proc(process_BND))
        process_BND = process_BND + self.mlp_process(self.norm_mlp_p(process_BND))
        if self.writes:
            memory_BMD = memory_BMD + self.write_attn(self.norm_write(memory_BMD), self.norm_write_source(process_BND))
            memory_BMD = memory_BMD + self.mlp_memory(self.norm_mlp_m(memory_BMD))
        return process_BND, memory_BMD


class HMREncoder(nn.Module):
    """Everything between images and process tokens; the model is one with a decoder on top, and so is its teacher."""

    def __init__(self, config: ViTTMHMRConfig) -> None:
        super().__init__()
        self.config = config
        self.original = config.preset == "original"
        dim = config.dim
        self.memory_bank = nn.Parameter(torch.randn(1, config.resolved_slots, dim) * 0.02)
        self.process_pos_embed = nn.Parameter(torch.zeros(1, config.num_process, dim))
        self.process_mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_module("target_embed", None)  # the model's own; published checkpoints have it here
        # The repaired process view is `ratio` times smaller, so that a process patch is memory_patch pixels wide in it.
        view_patch = config.process_patch if self.original else config.memory_patch
        self.process_embed = nn.Conv2d(3, dim, view_patch, view_patch)
        if config.memory == "image":
            self.memory_embed = nn.Conv2d(3, dim, config.memory_patch, config.memory_patch)
        self.blocks = nn.ModuleList(
            HMRBlock(
                dim,
                config.heads,
                config.mlp_ratio,
                normalise_source=not self.original,
                writes=self.original or layer < config.depth - 1,
            )
            for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.process_pos_embed, std=0.02)
        if self.original:
            nn.init.kaiming_normal_(self.process_embed.weight, mode="fan_out", nonlinearity="relu")
            return
        for embed in [self.process_embed] + ([self.memory_embed] if config.memory == "image" else []):
            nn.init.xavier_uniform_(embed.weight.flatten(1))
            nn.init.zeros_(embed.bias)  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        """Features of whole images, nothing hidden: the mean of the normalised process tokens.

        Args:
            images: float [B, 3, img_size, img_size], normalised as in training.

        Returns:
            float [B, D].

        Raises:
            ValueError: images of another shape.
        """
        self._check_images(images)
        return self._encode(images, None).mean(dim=1)

    @torch.no_grad()
    def fine_tokens(self, images: Tensor) -> Tensor:
        """One token per memory patch, [B, T, D], of repaired models: the process stream reads the full resolution.

        A process patch of the low-resolution view is as many pixels wide as a memory patch of the image, so the same
        embedding serves both; positions are interpolated.
        """
        grid = self.config.img_size // self.config.memory_patch
        position_1TD = resample_abs_pos_embed(self.process_pos_embed, [grid, grid], num_prefix_tokens=0)
        return self._run_blocks(_patches(self.process_embed, images) + position_1TD, self._memory(images, None))

    def _check_images(self, images: Tensor) -> None:
        side = self.config.img_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images must have shape [B, 3, {side}, {side}] (img_size): found {list(images.shape)}")

    def _encode(self, images: Tensor, hidden_BN: Tensor | None) -> Tensor:
        """Images to normalised process tokens [B, N, D]; None hides nothing."""
        return self._run_blocks(self._process_tokens(images, hidden_BN), self._memory(images, hidden_BN))

    def _process_tokens(self, images: Tensor, hidden_BN: Tensor | None) -> Tensor:
        """Process tokens [B, N, D] with positions; hidden ones hold the mask token."""
        view = images if self.original else F.avg_pool2d(images, self.config.ratio)
        tokens_BND = _patches(self.process_embed, view)
        position_1ND = self.process_pos_embed
        if hidden_BN is None:
            return tokens_BND + position_1ND
        # `where` keeps the mask token in the graph when nothing is hidden: its gradient is then zero, not missing.
        if self.original:
            return torch.where(hidden_BN.unsqueeze(-1), self.process_mask_token, tokens_BND + position_1ND)
        return torch.where(hidden_BN.unsqueeze(-1), self.process_mask_token, tokens_BND) + position_1ND

    def _memory(self, images: Tensor, hidden_BN: Tensor | None) -> Tensor:
        """Memory at the start, [B, M, D]; it shows nothing of what is hidden."""
        if self.config.memory == "bank":
            return self.memory_bank.expand(len(images), -1, -1)
        tokens_BMD = _patches(self.memory_embed, images)
        if hidden_BN is not None:
            tokens_BMD = tokens_BMD.masked_fill(masked_targets(hidden_BN, self.config.ratio).unsqueeze(-1), 0.0)
        return self.memory_bank + tokens_BMD

    def _run_blocks(self, process_BND: Tensor, memory_BMD: Tensor) -> Tensor:
        """Process tokens [B, N, D] and memory [B, M, D] through all blocks; process tokens through the final norm."""
        for block in self.blocks:
            process_BND, memory_BMD = block(process_BND, memory_BMD)
        return self.norm(process_BND)


def _patches(embed: nn.Module, images: Tensor) -> Tensor:
    """Patch embeddings of images as tokens [B, T, D], row-major."""
    return rearrange(embed(images), "b d r c -> b (r c) d")


class ViTTMHMR(HMREncoder):
    """The model, built from its config; see the head of this file for the two presets."""

    def __init__(self, config: ViTTMHMRConfig) -> None:
        super().__init__(config)
        dim = config.dim
        if config.target == "random_projection":
            self.target_embed = nn.Conv2d(3, dim, config.memory_patch, config.memory_patch, bias=self.original)
            self.target_embed.requires_grad_(self.original)  # it never learns; the original asks for gradients anyway
            if self.original:
                nn.init.kaiming_normal_(self.target_embed.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(self.target_embed.weight, std=(3 * config.memory_patch**2) ** -0.5)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, config.ratio, config.ratio),
            nn.GroupNorm(32, dim),
            nn.GELU(),
            nn.Conv2d(dim, config.target_dim, 1),
        )
        if config.target == "ema":
            self.teacher = HMREncoder(config).requires_grad_(False)
            self._move_teacher(0.0)

    def forward(self, images: Tensor, *, mask_ratio: float = 0.75, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Hide a share of the process tokens and predict the targets of the full-resolution image.

        Args:
            images: float [B, 3, img_size, img_size], normalised.
            mask_ratio: share of process tokens to hide, in [0, 1).
            noise: float [B, N] on the images' device; the int(N * (1 - mask_ratio)) tokens of smallest noise stay
                visible. None draws it from torch's global generator: a trainer that must resume passes its own.

        Returns:
            loss: float32 scalar, minus the mean cosine, over hidden positions (`loss_on`, when any is hidden) or all.
            prediction: float32 [B, T, C], row-major, T = (img_size/memory_patch)^2.
            target: float32 [B, T, C], without gradient.
            features: float [B, D] without gradient, the mean of the normalised process tokens, hidden ones included.
            constant_cosine, image_constant_cosine: float32 scalars without gradient, the cosine that the best constant
                (for the batch, for each image) reaches at the same positions. Compare with -loss.

        Raises:
            ValueError: images or noise of another shape; a mask_ratio outside [0, 1) or that hides every token.
        """
        self._check_images(images)
        hidden_BN = masked_tokens(checked_noise(noise, images, self.config.num_noise), mask_ratio)
        process_BND = self._encode(images, hidden_BN)
        prediction_BTC = self._decode(process_BND)
        target_BTC = self._targets(images)
        none_hidden = num_visible(self.config.num_process, mask_ratio) == self.config.num_process
        on_all = none_hidden or self.config.resolved_loss_on == "all"
        where_BT = None if on_all else masked_targets(hidden_BN, self.config.ratio)
        return {
            "loss": negative_cosine(prediction_BTC, target_BTC, where_BT),
            "prediction": prediction_BTC,
            "target": target_BTC,
            "features": process_BND.detach().mean(dim=1),
            "constant_cosine": constant_cosine(target_BTC, where_BT),
            "image_constant_cosine": constant_cosine(target_BTC, where_BT, per="image"),
        }

    def after_step(self, step: int, total: int) -> None:
        """Let the teacher follow, after optimiser step `step` (1-based) of `total`; without one there is nothing to do.

        The share of the teacher that stays rises from `ema_momentum` to 1 along half a cosine (as in DINO, arXiv
        2104.14294). Weights are the same on every rank, so every rank does this by itself. The teacher is part of
        the state dict.
        """
        if self.config.target == "ema":
            left = 0.5 * (1.0 + math.cos(math.pi * step / total))
            self._move_teacher(1.0 - (1.0 - self.config.ema_momentum) * left)

    @torch.no_grad()
    def _move_teacher(self, momentum: float) -> None:
        own = dict(self.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            parameter.lerp_(own[name], 1.0 - momentum)

    def _decode(self, process_BND: Tensor) -> Tensor:
        """Process tokens [B, N, D] to predictions, float32 [B, T, C]."""
        grid_BDRC = rearrange(process_BND, "b (r c) d -> b d r c", r=self.config.process_grid)
        return rearrange(self.decoder(grid_BDRC), "b d r c -> b (r c) d").float()

    @torch.no_grad()
    def _targets(self, images: Tensor) -> Tensor:
        """Targets of the full-resolution images, float32 [B, T, C]; under autocast only the teacher is rounded."""
        if self.config.target == "ema":
            target_BTC = self.teacher.fine_tokens(images).float()
        with torch.autocast(device_type=images.device.type, enabled=False):
            if self.config.target == "pixels":
                target_BTC = pixel_targets(images.float(), self.config.memory_patch)
            elif self.config.target == "random_projection":
                target_BTC = _patches(self.target_embed, images.float())
            return normalise_targets(target_BTC, self.config.resolved_target_norm)
