"""Masked autoencoding: which tokens stay, and the error on those that do not, as pure functions.

Source: MAE (arXiv 2111.06377). Targets are `pixel_targets` and `normalise_targets` of `hmr.py`.

Shapes: B images, T tokens (patches), V visible ones, D dim, C numbers per target.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_ids(hidden_BT: Tensor, num_kept: int) -> Tensor:
    """Positions of the visible tokens, int64 [B, V], ascending.

    Args:
        hidden_BT: bool [B, T], `num_kept` False in every image.
        num_kept: V. A number known beforehand keeps shapes static.
    """
    return hidden_BT.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_kept]


def keep_tokens(tokens_BTD: Tensor, ids_BV: Tensor) -> Tensor:
    """The tokens at `ids_BV`, [B, V, D]."""
    return tokens_BTD.gather(1, ids_BV.unsqueeze(-1).expand(-1, -1, tokens_BTD.shape[-1]))


def put_back(tokens_BVD: Tensor, ids_BV: Tensor, mask_token_11D: Tensor, num_tokens: int) -> Tensor:
    """The inverse of `keep_tokens`: [B, T, D] with the mask token where nothing was kept."""
    full_BTD = mask_token_11D.to(tokens_BVD.dtype).expand(len(tokens_BVD), num_tokens, -1)
    return full_BTD.scatter(1, ids_BV.unsqueeze(-1).expand_as(tokens_BVD), tokens_BVD)


def mean_squared_error(prediction_BTC: Tensor, target_BTC: Tensor, where_BT: Tensor | None = None) -> Tensor:
    """Squared error, averaged over numbers and positions: float32 scalar.

    Args:
        prediction_BTC: [B, T, C], computed in float32.
        target_BTC: [B, T, C].
        where_BT: bool [B, T], the positions that count (at least one); None = all.
    """
    error_BT = (prediction_BTC.float() - target_BTC.float()).square().mean(dim=-1)
    if where_BT is None:
        return error_BT.mean()
    weight_BT = where_BT.to(error_BT.dtype)
    return (error_BT * weight_BT).sum() / weight_BT.sum()


@torch.no_grad()
def constant_error(target_BTC: Tensor, where_BT: Tensor | None = None) -> Tensor:
    """The `mean_squared_error` of the best constant prediction, the targets' mean: float32 scalar.

    A loss near it is a trivial solution: one prediction for everything.
    """
    weight_BT1 = torch.ones_like(target_BTC[..., :1]) if where_BT is None else where_BT.unsqueeze(-1).float()
    mean_C = (target_BTC.float() * weight_BT1).sum(dim=(0, 1)) / weight_BT1.sum()
    return mean_squared_error(mean_C.expand_as(target_BTC), target_BTC, where_BT)
