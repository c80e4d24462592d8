"""Ordinal classes 0 < 1 < ... < C - 1 as C - 1 questions "is it above k?": cumulative BCE and CORAL.

Shapes: B samples, T = C - 1 thresholds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cumulative_bits(labels: Tensor, n_thresholds: int) -> Tensor:
    """Labels int64 [B] in [0, T] to float32 [B, T]: bit k is 1 where the label is above k."""
    return (labels.unsqueeze(-1) > torch.arange(n_thresholds, device=labels.device)).float()


def ordinal_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the cumulative bits, mean over samples and thresholds.

    Args:
        logits: [B, T].
        labels: int64 [B] in [0, T].
    """
    return F.binary_cross_entropy_with_logits(logits.float(), cumulative_bits(labels, logits.shape[1]))


def coral_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The same, summed over thresholds, mean over samples (CORAL, arXiv 1901.07884, eq. 4 with importance 1).

    CORAL's head gives all thresholds one score and each its own bias, so that the probabilities fall with k.
    """
    return ordinal_bce_loss(logits, labels) * logits.shape[1]


def predict_ordinal(logits: Tensor) -> Tensor:
    """int64 [B]: the number of leading thresholds whose probability is above one half."""
    return (logits > 0).long().cumprod(dim=1).sum(dim=1)
