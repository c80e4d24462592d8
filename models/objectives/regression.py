"""Ordered classes, or any number, as one scalar."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error in float32.

    Args:
        predictions: [B] or [B, 1].
        targets: [B], numbers or class indices.
    """
    return F.mse_loss(predictions.float().reshape(targets.shape), targets.float())


def predict_class(predictions: Tensor, n_classes: int) -> Tensor:
    """int64 [B]: the scalar [B] or [B, 1], rounded (halves to even) and held within [0, n_classes - 1]."""
    return predictions.flatten().round().clamp(0, n_classes - 1).long()
