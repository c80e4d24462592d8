"""Classification losses: cross-entropy with class weights, label smoothing and focus; the smooth top-1 SVM.

Shapes: B samples, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def balanced_class_weights(labels: Tensor, n_classes: int) -> Tensor:
    """Weights B/(C count_c), float32 [C]: their mean over the samples is 1, and each class has the same total.

    Args:
        labels: int64 [B], each in [0, n_classes).

    Raises:
        ValueError: a class without a sample, or a label outside the range.
    """
    counts_C = torch.bincount(labels, minlength=n_classes)
    if len(counts_C) != n_classes or not counts_C.all():
        raise ValueError(
            f"each of the {n_classes} classes needs a sample for its weight: found counts {counts_C.tolist()}"
        )
    return len(labels) / (n_classes * counts_C.float())


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Cross-entropy, float32 scalar: the sum over samples divided by the sum of their classes' weights.

    Args:
        logits: [B, C].
        labels: int64 [B].
        class_weights: float [C]; None = 1.
        label_smoothing: share of the target spread evenly over all classes.
        focal_gamma: factor (1 - p_label)^gamma on each sample (focal loss, arXiv 1708.02002, eq. 4); 0 = none.
    """
    logits = logits.float()
    if class_weights is not None:
        class_weights = class_weights.to(logits)
    loss_B = F.cross_entropy(logits, labels, class_weights, reduction="none", label_smoothing=label_smoothing)
    if focal_gamma:
        p_B = logits.softmax(dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        loss_B = loss_B * (1 - p_B) ** focal_gamma
    return loss_B.mean() if class_weights is None else loss_B.sum() / class_weights[labels].sum()


def smooth_svm_losses(logits: Tensor, labels: Tensor, *, margin: float = 1.0, temperature: float = 1.0) -> Tensor:
    """The smooth top-1 SVM (arXiv 1802.07595), float32 [B]: a soft maximum of s_j + margin [j != y], minus s_y.

    Args:
        logits: s, [B, C].
        labels: y, int64 [B].
        temperature: of the log-sum-exp; towards 0 the loss becomes the multi-class hinge.
    """
    logits = logits.float()
    own_BC = F.one_hot(labels, logits.shape[1])
    soft_max_B = temperature * ((logits + margin * (1 - own_BC)) / temperature).logsumexp(dim=1)
    return soft_max_B - (logits * own_BC).sum(dim=1)
