"""Stochastic depth (arXiv 1603.09382) whose draws belong to samples, so that ranks and parts of a batch share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn


@dataclass(slots=True)
class SampleShare:
    """Which samples of the whole batch go through a model: `rows`, int64 [n] on its device, of `total`."""

    rows: Tensor | None = None
    total: int = 0


class StochasticDepth(nn.Module):
    """Drops the residual branch of some samples while training, and scales that of the others by 1 / (1 - drop_prob).

    Every rank draws for the whole batch, from torch's default generator, and takes what belongs to its samples: with
    equal seeds the same samples lose the same branches however the batch is divided. An input holds the samples once
    for each view, view by view; one that does not (windows of an image, say) has draws of its own.
    """

    def __init__(self, drop_prob: float, share: SampleShare) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] to the same shape."""
        if not self.training or self.drop_prob == 0:
            return x
        rows, total = self.share.rows, self.share.total
        if rows is None or len(x) % len(rows):
            drawn = torch.rand(len(x), device=x.device)
        else:
            drawn = torch.rand(len(x) // len(rows), total, device=x.device)[:, rows].flatten()
        kept = (drawn >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        """Shown in the model's text."""
        return f"drop_prob={self.drop_prob}"


def share_draws(model: nn.Module, share: SampleShare) -> None:
    """Put a StochasticDepth of the same rate in place of each of timm's DropPath."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, StochasticDepth(child.drop_prob, share))
