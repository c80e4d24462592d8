"""The loss of a model with two classifiers, such as the paper's ViTTM (arXiv 2409.07613): the plain sum of both."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def two_head_loss(outputs: dict[str, Tensor], labels: Tensor, kind: Literal["ce", "bce"] = "ce") -> dict[str, Tensor]:
    """Both streams' losses against the same labels, unweighted.

    Args:
        outputs: memory_logits and process_logits, [B, K] each.
        labels: classes, int64 [B], or shares of classes, float [B, K] (label smoothing, mixed images).
        kind: ce: cross entropy, as in pre-training; bce: binary cross entropy summed over classes, as in fine-tuning.

    Returns:
        loss, memory_loss, process_loss: float32 scalars, means over images.
    """
    losses = {}
    for stream in ("memory", "process"):
        logits_BK = outputs[f"{stream}_logits"].float()
        if kind == "ce":
            losses[f"{stream}_loss"] = F.cross_entropy(logits_BK, labels)
        else:
            shares_BK = labels if labels.ndim == 2 else F.one_hot(labels, logits_BK.shape[1])
            summed = F.binary_cross_entropy_with_logits(logits_BK, shares_BK.float(), reduction="sum")
            losses[f"{stream}_loss"] = summed / len(logits_BK)
    return {"loss": losses["memory_loss"] + losses["process_loss"], **losses}
