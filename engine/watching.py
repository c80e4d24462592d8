"""Signs of a collapse, seen in the features of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def watch_features(features: Tensor) -> dict[str, float]:
    """How varied the features of a batch are.

    Args:
        features: [n, D], of one batch of one rank.

    Returns:
        feature_std: standard deviation over the batch of the features at unit length, averaged over dimensions, times
            sqrt(D): near 1 where they spread over the sphere, 0 where all are the same.
        rankme: exp of the entropy of the singular values (RankMe, arXiv 2210.02885, eq. 1-2): how many dimensions are
            in use, at most min(n, D); 1 is a collapse.
    """
    rows = features.detach().float()
    unit = torch.nn.functional.normalize(rows, dim=1)
    spread = unit.std(dim=0, correction=0).square().mean().sqrt() * rows.shape[1] ** 0.5
    shares = torch.linalg.svdvals(rows)
    shares = shares / shares.sum().clamp_min(1e-12)
    rank = torch.special.entr(shares).sum().exp()
    return {"feature_std": float(spread), "rankme": float(rank)}
