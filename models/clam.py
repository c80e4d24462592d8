"""CLAM (Lu et al. 2021, arXiv 2004.09666): attention MIL whose attended instances are pseudo-labelled and classified.

Shapes: as in `models/mil.py`; A is 1 (single branch, SB) or C (multi-branch, MB).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mil import AttentionPool, BagModel, BagOutput, hidden_layers
from models.mil_config import CLAMSBConfig
from models.objectives.classify import classification_loss, smooth_svm_losses


class CLAM(BagModel):
    """CLAM-SB or CLAM-MB; `embedding` is [B, A, D]. Train it by `loss`, which teaches the instances too."""

    def __init__(self, config: CLAMSBConfig) -> None:
        super().__init__(config.in_dim)
        self.config = config
        dim, n_classes = config.embed_dim, config.n_classes
        branches, outputs = (n_classes, 1) if config.multi_branch else (1, n_classes)
        self.embed = hidden_layers(config.in_dim, (dim,), config.dropout)
        self.attention = AttentionPool(dim, config.attention_dim, branches=branches, dropout=config.dropout)
        self.classifiers = nn.ModuleList(nn.Linear(dim, outputs) for _ in range(branches))
        self.instance_classifiers = nn.ModuleList(nn.Linear(dim, 2) for _ in range(n_classes))

    def _outputs(self, bags_BNM: Tensor, mask_BN: Tensor) -> BagOutput:
        return self._pool(self.embed(bags_BNM), mask_BN)

    def _pool(self, h_BND: Tensor, mask_BN: Tensor) -> BagOutput:
        pooled_BAD, weights_BAN = self.attention(h_BND, mask_BN)
        logits_BC = torch.cat([layer(pooled_BAD[:, a]) for a, layer in enumerate(self.classifiers)], dim=1)
        return BagOutput(logits_BC, pooled_BAD, weights_BAN)

    def loss(
        self,
        bags: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        bag_weight: float = 0.7,
        class_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What training minimises: bag_weight * bag_loss + (1 - bag_weight) * instance_loss.

        Args:
            bags, mask: as for `outputs`.
            labels: int64 [B], the bags' classes.
            class_weights: float [C], of the bags' cross-entropy.

        Returns:
            loss, bag_loss, instance_loss: float32 scalars; the instance loss is the mean over bags.
        """
        bags_BNM, mask_BN = self._checked(bags, mask)
        h_BND = self.embed(bags_BNM)
        out = self._pool(h_BND, mask_BN)
        assert out.attention is not None
        bag_loss = classification_loss(out.logits, labels, class_weights=class_weights)
        instance_loss = self._instance_losses(h_BND, out.attention, mask_BN, labels).mean()
        loss = bag_weight * bag_loss + (1 - bag_weight) * instance_loss
        return {"loss": loss, "bag_loss": bag_loss, "instance_loss": instance_loss}

    def _instance_losses(self, h_BND: Tensor, weights_BAN: Tensor, mask_BN: Tensor, labels_B: Tensor) -> Tensor:
        """Loss of the pseudo-labels, float32 [B].

        The classifier of a bag's own class learns its k most attended instances as evidence and the k least attended
        as none; with `subtyping` those of the other classes learn the most attended as none, and the sum is divided
        by C. k is `k_sample`, at most half the bag.
        """
        size_B1 = mask_BN.sum(dim=1, keepdim=True)
        k_B1 = (size_B1 // 2).clamp(max=self.config.k_sample)
        order_BAN = weights_BAN.masked_fill(~mask_BN.unsqueeze(1), -1).argsort(dim=-1, descending=True, stable=True)
        rank_BAN = order_BAN.argsort(dim=-1)
        total_B = torch.zeros(len(h_BND), device=h_BND.device)
        for label, classifier in enumerate(self.instance_classifiers):
            rank_BN = rank_BAN[:, label if self.config.multi_branch else 0]
            own_B1 = (labels_B == label).unsqueeze(1)
            top_BN = rank_BN < k_B1
            bottom_BN = (rank_BN >= size_B1 - k_B1) & mask_BN
            counted_BN = (top_BN | (bottom_BN & own_B1)) & (own_B1 | self.config.subtyping)
            losses_BN = self._losses(classifier(h_BND), (top_BN & own_B1).long())
            total_B = total_B + (losses_BN * counted_BN).sum(dim=1) / counted_BN.sum(dim=1).clamp(min=1)
        return total_B / len(self.instance_classifiers) if self.config.subtyping else total_B

    def _losses(self, logits_BN2: Tensor, targets_BN: Tensor) -> Tensor:
        flat_logits, flat_targets = logits_BN2.flatten(0, 1).float(), targets_BN.flatten()
        if self.config.instance_loss == "svm":
            losses = smooth_svm_losses(flat_logits, flat_targets)
        else:
            losses = F.cross_entropy(flat_logits, flat_targets, reduction="none")
        return losses.view(targets_BN.shape)
