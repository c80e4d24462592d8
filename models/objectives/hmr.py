"""Hierarchical masked reconstruction: masks, targets and loss as pure functions.

Source: vittm-hmr (MIT), commit 2761a40; masking by argsort of noise as in MAE (arXiv 2111.06377).

Shapes: B images, N process tokens, T targets (memory patches), C numbers per target; grids are row-major.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """How many of `num_tokens` process tokens stay visible: int(num_tokens * (1 - mask_ratio)), at least one.

    Raises:
        ValueError: the ratio lies outside [0, 1) or leaves no token visible.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in [0, 1): found {mask_ratio}")
    kept = int(num_tokens * (1.0 - mask_ratio))
    if kept == 0:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_tokens} process tokens visible; lower it")
    return kept


def checked_noise(noise: Tensor | None, images: Tensor, numbers: int) -> Tensor:
    """The noise [B, `numbers`] to make the masks of `images` from; None draws it from torch's global generator.

    Raises:
        ValueError: noise of another shape.
    """
    expected = (len(images), numbers)
    if noise is None:
        return torch.rand(expected, device=images.device)
    if tuple(noise.shape) != expected:
        raise ValueError(f"noise must have shape {expected} (images, tokens to mask): found {tuple(noise.shape)}")
    return noise


def masked_tokens(noise_BN: Tensor, mask_ratio: float) -> Tensor:
    """Which process tokens are hidden: all but the `num_visible` ones of smallest noise.

    Args:
        noise_BN: float [B, N]; equal values keep the earlier token.
        mask_ratio: share to hide, in [0, 1).

    Returns:
        bool [B, N], True = hidden; the same number in every image.

    Raises:
        ValueError: see `num_visible`.
    """
    num_kept = num_visible(noise_BN.shape[1], mask_ratio)
    order_BN = noise_BN.argsort(dim=1, stable=True)
    hidden_BN = torch.ones_like(noise_BN, dtype=torch.bool)
    return hidden_BN.scatter(1, order_BN[:, :num_kept], False)


def masked_targets(hidden_BN: Tensor, ratio: int) -> Tensor:
    """Spread a mask of process tokens over the memory patches they cover.

    Args:
        hidden_BN: bool [B, N], N a square number.
        ratio: memory patches along the side of one process patch.

    Returns:
        bool [B, T], T = N * ratio^2.
    """
    side = round(hidden_BN.shape[1] ** 0.5)
    return repeat(hidden_BN, "b (r c) -> b (r i c j)", r=side, c=side, i=ratio, j=ratio)


def pixel_targets(images: Tensor, patch_px: int) -> Tensor:
    """Cut images [B, 3, H, W] into flat patches [B, T, 3 * patch_px^2], in the order (channel, y, x)."""
    return rearrange(images, "b c (r i) (s j) -> b (r s) (c i j)", i=patch_px, j=patch_px)


def normalise_targets(target_BTC: Tensor, over: Literal["image", "batch", "patch", "none"]) -> Tensor:
    """Standardise targets (mean 0, standard deviation 1) so that no constant predicts them well.

    Patches of tissue share most of their content, the mean colour: raw random projections of smooth H&E-like images
    reach cosine 0.977 with the best constant, which makes a plain cosine loss blind. `over` says what is taken away:

    * "batch": per channel, over all positions of all images. What images have in common is gone; how they differ
      (stain, density) and what varies within each stays. The batch is that of all ranks, each with equally many
      images; of one that is computed in parts, each part is a batch.
    * "image": per channel, over the positions of each image. How images differ is gone too. No image depends on
      another, but hardly anything is left to predict: on crops of eight MoNuSeg images the mean of the visible patches,
      weighted by distance, reaches cosine 0.08 at best (0.40 with "batch").
    * "patch": per target, over its channels, as MAE does with pixels. Brightness and contrast of the patch are gone.
    * "none": nothing.

    Args:
        target_BTC: float32 [B, T, C].

    Returns:
        float32 [B, T, C].
    """
    if over == "none":
        return target_BTC
    mean = (
        _mean_over_batch if over == "batch" else partial(torch.mean, dim={"image": 1, "patch": 2}[over], keepdim=True)
    )
    centred_BTC = target_BTC - mean(target_BTC)
    return centred_BTC * (mean(centred_BTC.square()) + 1e-6).rsqrt()


def _mean_over_batch(x_BTC: Tensor) -> Tensor:
    """[1, 1, C], over all ranks. In float64 and rounded once, it is the same on one rank and on several."""
    mean_11C = x_BTC.mean(dim=(0, 1), keepdim=True, dtype=torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mean_11C = _mean_over_ranks(mean_11C)
    return mean_11C.to(x_BTC.dtype)


@torch.compiler.disable
def _mean_over_ranks(mean: Tensor) -> Tensor:
    torch.distributed.all_reduce(mean)
    return mean / torch.distributed.get_world_size()


def negative_cosine(prediction_BTC: Tensor, target_BTC: Tensor, where_BT: Tensor | None = None) -> Tensor:
    """Minus the cosine of prediction and target, averaged over positions: float32 scalar in [-1, 1], -1 is perfect.

    Args:
        prediction_BTC: [B, T, C], computed in float32.
        target_BTC: [B, T, C].
        where_BT: bool [B, T], the positions that count (at least one); None = all.
    """
    cosine_BT = F.cosine_similarity(prediction_BTC.float(), target_BTC.float(), dim=-1)
    if where_BT is None:
        return -cosine_BT.mean()
    weight_BT = where_BT.to(cosine_BT.dtype)
    return -(cosine_BT * weight_BT).sum() / weight_BT.sum()


@torch.no_grad()
def constant_cosine(
    target_BTC: Tensor, where_BT: Tensor | None = None, *, per: Literal["batch", "image"] = "batch"
) -> Tensor:
    """The mean cosine that the best constant prediction reaches on these targets: float32 scalar in [0, 1].

    The mean of cos(c, t) over t is c/|c| . mean(t/|t|), largest for c along that mean, where it is the mean's length.
    A loss near minus this number is a trivial solution: one prediction for everything, or (`per="image"`) one for all
    positions of an image, chosen with the targets in sight.

    Args:
        target_BTC: [B, T, C].
        where_BT: bool [B, T], the positions that count, equally many in each image (at least one); None = all.
        per: one constant for the batch, or one for each image.
    """
    unit_BTC = F.normalize(target_BTC.float(), dim=-1)
    if where_BT is None:
        mean_BC = unit_BTC.mean(dim=1)
    else:
        weight_BT1 = where_BT.unsqueeze(-1).to(unit_BTC.dtype)
        mean_BC = (unit_BTC * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
    return mean_BC.mean(dim=0).norm() if per == "batch" else mean_BC.norm(dim=-1).mean()
