"""Multiple-instance learning: a bag of instance embeddings to one answer.

Every model here is called as `model(bags, mask)` and returns logits; `outputs` gives attention and embedding too. Bags
of unequal size are padded (`pad_bags`), and what stands in the padding changes nothing: a batch gives what its bags
give one by one. An empty bag is an error.

Sources: Ilse et al. 2018 (arXiv 1802.04712), Li et al. 2021 (arXiv 2011.08939), HIPT's baselines, its lymphoma variant.

Shapes: B bags, N instances of the largest, M their width, D its width after embedding, A attention branches, C outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.mil_config import ABMILConfig, DSMILConfig, FCMajorityConfig, PoolMILConfig


class BagOutput(NamedTuple):
    """What a bag model sees in a batch of bags.

    logits: [B, C].
    embedding: [B, ...], what the logits are computed from.
    attention: float32 [B, A, N], weights that sum to 1 over each bag, 0 in the padding; None without attention.
    """

    logits: Tensor
    embedding: Tensor
    attention: Tensor | None = None


def pad_bags(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags [N_i, M] to (bags [B, N, M] padded with zeros, mask bool [B, N], True = an instance)."""
    sizes_B = torch.tensor([len(bag) for bag in bags])
    mask_BN = torch.arange(int(sizes_B.max())) < sizes_B.unsqueeze(1)
    return pad_sequence(list(bags), batch_first=True), mask_BN.to(bags[0].device)


class BagModel(nn.Module, ABC):
    """A model over bags of embeddings, M wide."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, C]; see `outputs`."""
        return self.outputs(bags, mask).logits

    def features(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings of the bags, flat: [B, ...]; see `outputs`."""
        return self.outputs(bags, mask).embedding.flatten(1)

    def outputs(self, bags: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Everything about a batch of bags.

        Args:
            bags: [B, N, M], or one bag [N, M], which gives a batch of one.
            mask: bool [B, N] or [N], True = an instance, False = padding; None = no padding.

        Raises:
            ValueError: bags or mask of another shape, or a bag without an instance.
        """
        return self._outputs(*self._checked(bags, mask))

    def _checked(self, bags: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bags [B, N, M], zero in the padding, and their mask [B, N]."""
        if bags.ndim == 2:
            bags, mask = bags.unsqueeze(0), None if mask is None else mask.reshape(1, -1)
        if bags.ndim != 3 or bags.shape[2] != self.in_dim:
            raise ValueError(f"bags must have shape [B, N, {self.in_dim}] or [N, {self.in_dim}]: found {[*bags.shape]}")
        if mask is None:
            mask = torch.ones(bags.shape[:2], dtype=torch.bool, device=bags.device)
        elif mask.shape != bags.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool and have shape {[*bags.shape[:2]]}: found {mask.dtype} of {[*mask.shape]}"
            )
        if not mask.any(dim=1).all():
            empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"a bag needs an instance: found none in bags {empty} of the batch; leave them out")
        # Whatever lies in the padding, NaN included, must not meet the zero weights it gets.
        return bags.masked_fill(~mask.unsqueeze(-1), 0), mask

    @abstractmethod
    def _outputs(self, bags_BNM: Tensor, mask_BN: Tensor) -> BagOutput:
        """What `outputs` returns, for bags that are zero in the padding."""


class AttentionPool(nn.Module):
    """Scores w^T tanh(V h), or gated w^T (tanh(V h) * sigmoid(U h)), softmax over the bag, weighted sum of h.

    arXiv 1802.04712, eq. 7 to 9, with biases as in the authors' code. The softmax is computed in float32.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, branches: int = 1, gated: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.V = nn.Linear(dim, hidden_dim)
        self.U = nn.Linear(dim, hidden_dim) if gated else None
        self.w = nn.Linear(hidden_dim, branches)
        self.dropout = nn.Dropout(dropout)

    def scores(self, h_BND: Tensor) -> Tensor:
        """[B, N, D] to [B, A, N], before the softmax."""
        hidden = self.dropout(self.V(h_BND).tanh())
        if self.U is not None:
            hidden = hidden * self.dropout(self.U(h_BND).sigmoid())
        return self.w(hidden).transpose(1, 2)

    def forward(self, h_BND: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, A, D] and weights [B, A, N]."""
        weights_BAN = masked_softmax(self.scores(h_BND), mask_BN)
        return weights_BAN.to(h_BND.dtype) @ h_BND, weights_BAN


def masked_softmax(scores_BAN: Tensor, mask_BN: Tensor) -> Tensor:
    """Softmax over the instances of each bag, float32 (or wider) [B, A, N], 0 in the padding."""
    dtype = torch.promote_types(scores_BAN.dtype, torch.float32)
    return scores_BAN.masked_fill(~mask_BN.unsqueeze(1), -torch.inf).softmax(dim=-1, dtype=dtype)


def hidden_layers(in_dim: int, dims: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear, ReLU, Dropout for each width of `dims`."""
    layers = [(nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)) for a, b in pairwise((in_dim, *dims))]
    return nn.Sequential(*(module for layer in layers for module in layer))


class ABMIL(BagModel):
    """Attention MIL, gated or not; `embedding` is [B, A * D]."""

    def __init__(self, config: ABMILConfig) -> None:
        super().__init__(config.in_dim)
        self.embed = hidden_layers(config.in_dim, config.embed_dims, config.dropout)
        dim = (config.in_dim, *config.embed_dims)[-1]
        self.attention = AttentionPool(dim, config.attention_dim, branches=config.branches, gated=config.gated)
        widths = (dim * config.branches, *config.classifier_dims)
        self.classifier = hidden_layers(widths[0], widths[1:], config.dropout)
        self.classifier.append(nn.Linear(widths[-1], config.n_classes))

    def _outputs(self, bags_BNM: Tensor, mask_BN: Tensor) -> BagOutput:
        pooled_BAD, weights_BAN = self.attention(self.embed(bags_BNM), mask_BN)
        embedding_BX = pooled_BAD.flatten(1)
        return BagOutput(self.classifier(embedding_BX), embedding_BX, weights_BAN)


class PoolMIL(BagModel):
    """Baselines: mean or maximum of the embeddings, or the most confident instance (HIPT's "MIL"); Xavier weights.

    The most confident instance has the highest probability of class 1 (two classes; the highest logit with one), or
    of any class (more). `embedding` is [B, D].
    """

    def __init__(self, config: PoolMILConfig) -> None:
        super().__init__(config.in_dim)
        self.pool = config.pool
        self.embed = hidden_layers(config.in_dim, config.embed_dims, config.dropout)
        self.classifier = nn.Linear((config.in_dim, *config.embed_dims)[-1], config.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def _outputs(self, bags_BNM: Tensor, mask_BN: Tensor) -> BagOutput:
        h_BND = self.embed(bags_BNM)
        if self.pool == "mean":
            weights_BN = mask_BN.to(h_BND.dtype) / mask_BN.sum(dim=1, keepdim=True)
            embedding_BD = (weights_BN.unsqueeze(1) @ h_BND).squeeze(1)
        elif self.pool == "max":
            embedding_BD = h_BND.masked_fill(~mask_BN.unsqueeze(-1), -torch.inf).amax(dim=1)
        else:
            top_B = self._confidence(h_BND).masked_fill(~mask_BN, -torch.inf).argmax(dim=1)
            embedding_BD = h_BND[torch.arange(len(h_BND), device=h_BND.device), top_B]
        return BagOutput(self.classifier(embedding_BD), embedding_BD)

    def _confidence(self, h_BND: Tensor) -> Tensor:
        """[B, N], by which the top instance is found."""
        logits_BNC = self.classifier(h_BND).float()
        if logits_BNC.shape[-1] == 1:
            return logits_BNC[..., 0]
        p_BNC = logits_BNC.softmax(dim=-1)
        return p_BNC[..., 1] if p_BNC.shape[-1] == 2 else p_BNC.amax(dim=-1)


class DSMIL(BagModel):
    """Dual-stream MIL: the top instance of each class, and an attention by likeness to it; the mean of both answers.

    `embedding` is [B, C, M], one per class, and `attention` has one branch per class.
    """

    def __init__(self, config: DSMILConfig) -> None:
        super().__init__(config.in_dim)
        self.instance_classifier = nn.Linear(config.in_dim, config.n_classes)
        self.query = nn.Linear(config.in_dim, config.query_dim)
        self.value = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.in_dim, config.in_dim))
        self.bag_classifier = nn.Conv1d(config.n_classes, config.n_classes, kernel_size=config.in_dim)

    def _outputs(self, bags_BNM: Tensor, mask_BN: Tensor) -> BagOutput:
        instance_BNC = self.instance_classifier(bags_BNM).masked_fill(~mask_BN.unsqueeze(-1), -torch.inf)
        top_logit_BC, top_BC = instance_BNC.max(dim=1)
        top_BCM = bags_BNM.take_along_dim(top_BC.unsqueeze(-1), dim=1)
        likeness_BCN = self.query(top_BCM) @ self.query(bags_BNM).transpose(1, 2)
        weights_BCN = masked_softmax(likeness_BCN * self.query.out_features**-0.5, mask_BN)
        values_BNM = self.value(bags_BNM)
        embedding_BCM = weights_BCN.to(values_BNM.dtype) @ values_BNM
        bag_logit_BC = self.bag_classifier(embedding_BCM).squeeze(-1)
        return BagOutput(0.5 * (bag_logit_BC + top_logit_BC), embedding_BCM, weights_BCN)


class FCMajority(BagModel):
    """A linear classifier of regions; the bag's logits are the logarithms of what its regions say together.

    * aggregate="vote": the share of regions whose most probable class it is. `logits.argmax(1)` is the most frequent
      class, the lowest of equals. A vote has no gradient, so a model in training mode takes the mean.
    * aggregate="mean": the mean of the regions' probabilities.

    The published classifier learns from regions: give each as a bag of its own, [R, 1, M], with its slide's label. The
    cross-entropy of these logits is then that of the region itself (published: of a softmax of the softmax).
    `embedding` is [B, C], the shares or mean probabilities.
    """

    def __init__(self, config: FCMajorityConfig) -> None:
        super().__init__(config.in_dim)
        self.votes = config.aggregate == "vote"
        self.classifier = nn.Linear(config.in_dim, config.n_classes)

    def _outputs(self, bags_BNM: Tensor, mask_BN: Tensor) -> BagOutput:
        logits_BNC = self.classifier(bags_BNM)
        dtype = torch.promote_types(logits_BNC.dtype, torch.float32)
        log_p_BNC = logits_BNC.log_softmax(dim=-1, dtype=dtype)
        if self.votes and not self.training:
            votes_BNC = F.one_hot(log_p_BNC.argmax(dim=-1), log_p_BNC.shape[-1]).to(dtype)
            log_p_BNC = votes_BNC.log()
        log_p_BNC = log_p_BNC.masked_fill(~mask_BN.unsqueeze(-1), -torch.inf)
        # In logarithms, so that a class far from every region keeps its gradient.
        log_mean_BC = log_p_BNC.logsumexp(dim=1) - mask_BN.sum(dim=1, keepdim=True).to(dtype).log()
        return BagOutput(log_mean_BC, log_mean_BC.exp())
