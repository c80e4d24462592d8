"""The slide level of HIPT: embeddings of a slide's regions or patches to one prediction.

Source: HIPT (arXiv 2206.02647), under the published state-dict keys; positions of regions as in later
reimplementations. Beyond the published code: batches of slides of unequal size, by masks; other heads.

Shapes: B slides, M regions, N = R x C patches of a region in row-major order, D dim, K outputs of the head. Masks are
True where there is a region or patch; what lies elsewhere changes nothing. Without B, an input is one slide.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from models.heads import build_head
from models.hipt_config import HIPTLocalGlobalConfig, HIPTNConfig, HIPTSlideConfig
from models.region_positions import build_positions
from models.vit import RegionViT


class GatedAttentionPool(nn.Module):
    """Gated attention (arXiv 1802.04712, equation 9) over items: a = softmax(w^T (tanh(V x) * sigmoid(U x)))."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout))
        self.attention_b = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid(), nn.Dropout(dropout))
        self.attention_c = nn.Linear(dim, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the items [..., M, D] weighted by attention: [..., D]; and the attention, float32 [..., M]."""
        scores = self.attention_c(self.attention_a(x) * self.attention_b(x)).squeeze(-1).float()
        attention = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        return (attention.unsqueeze(-1) * x.masked_fill(~mask.unsqueeze(-1), 0)).sum(dim=-2), attention


def _layer(in_dim: int, dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU(), nn.Dropout(dropout))


class HIPTSlide(nn.Module):
    """Region embeddings to a prediction: projection, transformer over the regions, gated attention, head."""

    def __init__(self, config: HIPTSlideConfig) -> None:
        super().__init__()
        self.config = config
        dim, dropout = config.dim, config.dropout
        self.register_module("local_vit", None)  # a subclass's; published checkpoints have it first
        self.global_phi = _layer(config.in_dim, dim, dropout)
        self.pos_encoder = build_positions(config)
        layer = nn.TransformerEncoderLayer(dim, config.heads, dim, dropout, activation="relu", batch_first=True)
        self.global_transformer = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        self.global_attn_pool = GatedAttentionPool(dim, dropout)
        self.global_rho = _layer(dim, dim, dropout)
        self.classifier = build_head(config.head, dim, config.n_classes)

    def forward(self, regions: Tensor, *, mask: Tensor | None = None, coordinates: Tensor | None = None) -> Tensor:
        """Outputs of the head, [B, K], or [1, K] for one slide.

        Args:
            regions: float [B, M, in_dim] or [M, in_dim].
            mask: bool [B, M] or [M]; None is all True.
            coordinates: for 2-D positions, int64 [B, M, 2] or [M, 2]: (column, row) of each region in the slide, 0 or
                more, in regions.

        Raises:
            ValueError: another shape; a slide without a region; coordinates that are missing or too large.
        """
        return self._predict(regions, mask, coordinates)[0]

    def attention(self, regions: Tensor, *, mask: Tensor | None = None, coordinates: Tensor | None = None) -> Tensor:
        """The share of each region in the slide's embedding, as in `forward`: float32 [B, M], 0 where masked."""
        return self._predict(regions, mask, coordinates)[1]

    def _predict(self, regions: Tensor, mask: Tensor | None, coordinates: Tensor | None) -> tuple[Tensor, Tensor]:
        regions, mask = _as_batch(regions, mask, (self.config.in_dim,))
        if coordinates is not None:
            coordinates = coordinates.view(*mask.shape, 2)
        x_BMD = self.global_phi(regions)
        if self.pos_encoder is not None:
            x_BMD = self.pos_encoder(x_BMD, mask, coordinates)
        x_BMD = self.global_transformer(x_BMD, src_key_padding_mask=~mask)
        x_BD, attention_BM = self.global_attn_pool(x_BMD, mask)
        return self.classifier(self.global_rho(x_BD)), attention_BM


class HIPTLocalGlobal(HIPTSlide):
    """Patch embeddings to a prediction: the region ViT (`local_vit`) on every region, then the slide level."""

    def __init__(self, config: HIPTLocalGlobalConfig) -> None:
        super().__init__(config)
        self.local_vit = RegionViT(config.resolved_region)
        if config.freeze != "none":
            self.local_vit.requires_grad_(False)
            self.local_vit.pos_embed.requires_grad_(config.freeze == "all_but_positions")

    def forward(
        self,
        regions: Tensor,
        *,
        mask: Tensor | None = None,
        coordinates: Tensor | None = None,
        patch_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Outputs of the head, [B, K], or [1, K] for one slide.

        Args:
            regions: float [B, M, N, region.in_dim] or [M, N, region.in_dim], patch embeddings.
            mask, coordinates: as in `HIPTSlide`.
            patch_mask: bool [B, M, N] or [M, N]; None is all True. A region without a patch counts as masked.
            grid: (R, C) of a region; None is square.

        Raises:
            ValueError: as in `HIPTSlide`; N patches that do not fill the grid.
        """
        embeddings, mask = self.region_embeddings(regions, mask=mask, patch_mask=patch_mask, grid=grid)
        return super().forward(embeddings, mask=mask, coordinates=coordinates)

    def attention(
        self,
        regions: Tensor,
        *,
        mask: Tensor | None = None,
        coordinates: Tensor | None = None,
        patch_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """As in `HIPTSlide`, of patch embeddings; arguments and errors are those of `forward`."""
        embeddings, mask = self.region_embeddings(regions, mask=mask, patch_mask=patch_mask, grid=grid)
        return super().attention(embeddings, mask=mask, coordinates=coordinates)

    def region_embeddings(
        self,
        regions: Tensor,
        *,
        mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the slide level gets: embeddings [B, M, region.dim], 0 where masked, and their mask [B, M].

        Arguments and errors are those of `forward`. Masked regions are not computed.
        """
        patches, mask, patch_mask = _with_patches(regions, mask, patch_mask, self.local_vit.in_dim)
        batch, slots, count = patch_mask.shape
        rows, columns = (math.isqrt(count), math.isqrt(count)) if grid is None else grid
        if rows * columns != count:
            expected = "a square number, or the grid to be given" if grid is None else f"{rows} x {columns}"
            raise ValueError(f"a region has {count} patches: expected {expected}")
        here = mask.flatten().nonzero().squeeze(1)
        found = self.local_vit(
            rearrange(patches.flatten(0, 1)[here], "m (r c) d -> m d r c", r=rows),
            mask=patch_mask.flatten(0, 1)[here],
        )
        embeddings = found.new_zeros(batch * slots, found.shape[1]).index_copy(0, here, found)
        return embeddings.view(batch, slots, -1), mask


class HIPTN(nn.Module):
    """The slide level without transformers: gated attention over a region's patches, then over the regions."""

    def __init__(self, config: HIPTNConfig) -> None:
        super().__init__()
        self.config = config
        dim, dropout = config.dim, config.dropout
        self.local_phi = _layer(config.in_dim, dim, dropout)
        self.local_attn_pool = GatedAttentionPool(dim, dropout)
        self.global_phi = _layer(dim, dim, dropout)
        self.global_attn_pool = GatedAttentionPool(dim, dropout)
        self.global_rho = _layer(dim, dim, dropout)
        self.classifier = build_head(config.head, dim, config.n_classes)

    def forward(self, regions: Tensor, *, mask: Tensor | None = None, patch_mask: Tensor | None = None) -> Tensor:
        """Outputs of the head, [B, K], or [1, K] for one slide.

        Args:
            regions: float [B, M, N, in_dim] or [M, N, in_dim], patch embeddings.
            mask, patch_mask: as in `HIPTLocalGlobal`.

        Raises:
            ValueError: another shape; a slide without a region.
        """
        patches, mask, patch_mask = _with_patches(regions, mask, patch_mask, self.config.in_dim)
        # A masked region attends to its zeros: a softmax over nothing would be NaN, and its gradient too.
        x_BMD, _ = self.local_attn_pool(self.local_phi(patches), patch_mask | ~mask.unsqueeze(-1))
        x_BD, _ = self.global_attn_pool(self.global_phi(x_BMD), mask)
        out: Tensor = self.classifier(self.global_rho(x_BD))
        return out


def _as_batch(items: Tensor, mask: Tensor | None, shape: tuple[int | None, ...]) -> tuple[Tensor, Tensor]:
    """Items [B, M, *shape], 0 where masked, and their mask [B, M]; None in `shape` is any extent."""
    if items.ndim == 1 + len(shape):
        items, mask = items.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    found = items.shape[2:]
    if len(found) != len(shape) or any(want not in (None, have) for have, want in zip(found, shape, strict=True)):
        named = ", ".join("patches" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"regions must have shape [B, M, {named}] or [M, {named}]: found {list(items.shape)}")
    if mask is None:
        mask = torch.ones(items.shape[:2], dtype=torch.bool, device=items.device)
    if mask.shape != items.shape[:2]:
        raise ValueError(f"mask must have shape {list(items.shape[:2])} (slides, regions): found {list(mask.shape)}")
    mask = mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a slide has no region, or all of them are masked: expected one or more")
    return items.masked_fill(~mask.view(*mask.shape, *(1 for _ in shape)), 0), mask


def _with_patches(
    regions: Tensor, mask: Tensor | None, patch_mask: Tensor | None, in_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [B, M, N, in_dim], 0 where masked, and the masks of regions [B, M] and of patches [B, M, N]."""
    regions, mask = _as_batch(regions, mask, (None, in_dim))
    if patch_mask is None:
        return regions, mask, mask.unsqueeze(-1).expand(regions.shape[:3])
    if regions.shape[:3].numel() != patch_mask.numel():
        raise ValueError(
            f"patch_mask must have shape {list(regions.shape[:3])} (slides, regions, patches): "
            f"found {list(patch_mask.shape)}"
        )
    patch_mask = patch_mask.bool().view(regions.shape[:3])
    regions = regions.masked_fill(~patch_mask.unsqueeze(-1), 0)
    return *_as_batch(regions, mask & patch_mask.any(dim=-1), (None, in_dim)), patch_mask
