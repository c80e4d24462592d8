"""The two vision transformers of HIPT: patches of pixels, and regions of patch embeddings.

Source: HIPT (arXiv 2206.02647), under the state-dict keys and with the numbers of its published weights; the blocks
are timm's. `pos_interpolation` chooses between two rules that differ by up to 0.24 in the output (see `positions_for`).
Beyond the published code: any grid, register tokens, masked tokens, gradient checkpointing, and a last block that
computes the class token alone where nothing else is asked for (its keys and values need every token; queries,
projection and MLP do not).

Shapes: B images or regions, T tokens (class, registers, then N = R x C of the grid, row-major), D dim, H heads of
E = D/H. Masks are True where a token may be attended to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.hipt_config import HIPTPatchConfig, HIPTRegionConfig, ViTConfig

TOKEN_PX = 16


def positions_for(
    table_1ND: Tensor, grid: tuple[int, int], rule: Literal["given", "recomputed"], *, square: bool
) -> Tensor:
    """A learned table of positions for another grid: [1, R * C, D], computed in float32.

    The table itself where it has R * C entries and the input is square. Otherwise its s x s entries are resampled
    bicubically (a = -0.75, no antialiasing) at (i + 0.5) * step - 0.5, with step s / (R + 0.1) for "given" and s / R
    for "recomputed"; C alike.

    Args:
        table_1ND: [1, s * s, D], without the class token's entry.
        square: whether the two extents of the input are equal; in pixels for patches, where 230 x 224 px give as
            many tokens as 224 x 224 and are resampled all the same.
    """
    if square and table_1ND.shape[1] == math.prod(grid):
        return table_1ND
    side = math.isqrt(table_1ND.shape[1])
    square_1DSS = rearrange(table_1ND.float(), "1 (r c) d -> 1 d r c", r=side)
    if rule == "given":
        # The 0.1 once kept the size from being rounded down; weights were trained with its effect on the step.
        scale = [(extent + 0.1) / side for extent in grid]
        resized = F.interpolate(square_1DSS, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    else:
        resized = F.interpolate(square_1DSS, size=grid, mode="bicubic")
    assert tuple(resized.shape[-2:]) == grid
    return rearrange(resized, "1 d r c -> 1 (r c) d").to(table_1ND.dtype)


class ViT(nn.Module, ABC):
    """What both transformers share; a subclass makes tokens of its input."""

    def __init__(self, config: ViTConfig, *, dim: int, depth: int, heads: int, embed: dict[str, nn.Module]) -> None:
        super().__init__()
        self.pos_interpolation = config.pos_interpolation
        self.grad_checkpointing = config.grad_checkpointing
        self.dim = dim
        self.num_prefix = 1 + config.register_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.pos_grid**2, dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.register_tokens, dim)) if config.register_tokens else None
        )
        for name, module in embed.items():  # before the blocks, as in the published checkpoints
            self.add_module(name, module)
        layer_norm = partial(nn.LayerNorm, eps=1e-6)
        rates = torch.linspace(0, config.drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(dim, heads, config.mlp_ratio, qkv_bias=True, norm_layer=layer_norm, drop_path=rate)  # type: ignore[arg-type]
            for rate in rates
        )
        self.norm = layer_norm(dim)

    def _init_weights(self) -> None:
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @abstractmethod
    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int], bool]:
        """Tokens [B, N, D] of the input without positions, their grid (R, C), and whether the input is square."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The normalised class token, float [B, D].

        Args:
            x: what the subclass takes.
            mask: bool, N entries per sample ([B, N] or [B, R, C]); nobody attends to a token where it is False. None
                is all True. Class token and registers are always attended to.

        Raises:
            ValueError: x or mask of another shape.
        """
        x_BTD, mask_B11T = self._prepare(x, mask)
        *first, last = cast(list[Block], self.blocks)
        for block in first:
            x_BTD = self._through(block, x_BTD, mask_B11T)
        x_B1D = self._through(partial(_class_token_of, last), x_BTD, mask_B11T)
        out: Tensor = self.norm(x_B1D).squeeze(1)
        return out

    def get_intermediate_layers(self, x: Tensor, n: int = 1, *, mask: Tensor | None = None) -> list[Tensor]:
        """Outputs of the last n blocks, each after the final norm: n times float [B, T, D], the last block's last.

        Raises ValueError where there are no n blocks.
        """
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n={n}: expected 1 to {len(self.blocks)}, the number of blocks")
        x_BTD, mask_B11T = self._prepare(x, mask)
        outputs = []
        for number, block in enumerate(self.blocks):
            x_BTD = self._through(block, x_BTD, mask_B11T)
            if number >= len(self.blocks) - n:
                outputs.append(self.norm(x_BTD))
        return outputs

    def get_last_selfattention(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attention of the last block after its softmax: float32 [B, H, T, T], rows ask, columns answer."""
        x_BTD, mask_B11T = self._prepare(x, mask)
        *first, last = cast(list[Block], self.blocks)
        for block in first:
            x_BTD = self._through(block, x_BTD, mask_B11T)
        attention = cast(Attention, last.attn)
        qkv_BTX = attention.qkv(last.norm1(x_BTD))
        q_BHTE, k_BHTE, _ = rearrange(qkv_BTX, "b t (three h e) -> three b h t e", three=3, h=attention.num_heads)
        scores_BHTT = (q_BHTE * attention.scale) @ k_BHTE.transpose(-2, -1)
        if mask_B11T is not None:
            scores_BHTT = scores_BHTT.masked_fill(~mask_B11T, -math.inf)
        return scores_BHTT.float().softmax(dim=-1)

    def _prepare(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All tokens [B, T, D] with positions, and the mask [B, 1, 1, T] of those that may be attended to."""
        tokens_BND, grid, square = self._tokens(x)
        batch = len(tokens_BND)
        positions_1ND = positions_for(self.pos_embed[:, 1:], grid, self.pos_interpolation, square=square)
        prefix = [self.cls_token + self.pos_embed[:, :1]]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        prefix_BPD = torch.cat(prefix, dim=1).expand(batch, -1, -1)
        x_BTD = torch.cat([prefix_BPD, tokens_BND + positions_1ND], dim=1)
        if mask is None:
            return x_BTD, None
        mask_BN = mask.flatten(1)
        if tuple(mask_BN.shape) != (batch, math.prod(grid)):
            raise ValueError(
                f"mask must have an entry for each of {batch} x {grid[0]} x {grid[1]} tokens: found {list(mask.shape)}"
            )
        mask_BT = F.pad(mask_BN.to(device=x_BTD.device, dtype=torch.bool), (self.num_prefix, 0), value=True)
        return x_BTD, mask_BT[:, None, None]

    def _through(self, block: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, mask, use_reentrant=False)
            return out
        return block(x, mask)


def _class_token_of(block: Block, x_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
    """The class token [B, 1, D] of what `block` makes of all tokens."""
    attention, dim = cast(Attention, block.attn), x_BTD.shape[-1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    y_BTD = block.norm1(x_BTD)
    q_BHXE = rearrange(F.linear(y_BTD[:, :1], weight[:dim], bias[:dim]), "b t (h e) -> b h t e", h=attention.num_heads)
    k_BHTE, v_BHTE = rearrange(
        F.linear(y_BTD, weight[dim:], bias[dim:]), "b t (two h e) -> two b h t e", two=2, h=attention.num_heads
    )
    out_BHXE = F.scaled_dot_product_attention(q_BHXE, k_BHTE, v_BHTE, attn_mask=mask_B11T)
    x_B1D = x_BTD[:, :1] + block.drop_path1(attention.proj(rearrange(out_BHXE, "b h t e -> b t (h e)")))
    out: Tensor = x_B1D + block.drop_path2(block.mlp(block.norm2(x_B1D)))
    return out


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, TOKEN_PX, TOKEN_PX)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images)
        return out


class PatchViT(ViT):
    """ViT-256-16: pixels to one embedding; 21,665,664 parameters in 150 entries by default.

    Takes float [B, 3, height, width], normalised, of 16 px or more. Pixels beyond the last whole 16 at the right and
    the bottom are not seen.
    """

    patch_embed: _PatchEmbed

    def __init__(self, config: HIPTPatchConfig) -> None:
        dim = config.resolved_dim
        embed: dict[str, nn.Module] = {"patch_embed": _PatchEmbed(dim)}
        super().__init__(config, dim=dim, depth=config.depth, heads=config.resolved_heads, embed=embed)
        self._init_weights()

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int], bool]:
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < TOKEN_PX:
            raise ValueError(f"images must have shape [B, 3, height, width] of 16 px or more: found {list(x.shape)}")
        features = self.patch_embed(x)
        rows, columns = features.shape[-2:]
        return features.flatten(2).transpose(1, 2), (rows, columns), x.shape[-2] == x.shape[-1]


class RegionViT(ViT):
    """ViT-4K-256: a grid of patch embeddings to one embedding; 2,781,504 parameters in 78 entries by default.

    Takes float [B, in_dim, R, C].
    """

    phi: nn.Sequential

    def __init__(self, config: HIPTRegionConfig) -> None:
        phi = nn.Sequential(nn.Linear(config.in_dim, config.dim), nn.GELU(), nn.Dropout(config.dropout))
        super().__init__(config, dim=config.dim, depth=config.depth, heads=config.heads, embed={"phi": phi})
        self.in_dim = config.in_dim
        self._init_weights()

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int], bool]:
        if x.ndim != 4 or x.shape[1] != self.in_dim or 0 in x.shape[2:]:
            raise ValueError(f"grids must have shape [B, {self.in_dim}, rows, columns]: found {list(x.shape)}")
        rows, columns = x.shape[-2:]
        tokens: Tensor = self.phi(x.flatten(2).transpose(1, 2))
        return tokens, (rows, columns), rows == columns
