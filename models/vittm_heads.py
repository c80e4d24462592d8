"""READ and WRITE heads of the ViTTM family, and the ways of fusing what they write with what is there.

Source: ViTTM (arXiv 2409.07613); parameter names as in its released weights. Every head is called with the tokens that
ask and the tokens that answer: forward(query [B, Q, D], source [B, S, D]) -> [B, Q, D].

Shapes: B images, Q asking and S answering tokens, D dim, C latent dim (queries and keys), H heads; O outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn


def kernel_attention(query_BQC: Tensor, key_BSC: Tensor, value_BSD: Tensor, heads: int) -> Tensor:
    """Attention with the feature map phi(t) = elu(t) + 1 instead of a softmax: linear in both token counts.

    out_q = phi(q) [sum_s phi(k_s) v_s^T] / (phi(q) . sum_s phi(k_s) + 1e-6), per head, in float32 also under autocast;
    returns [B, Q, D].
    """
    # Sums over hundreds of tokens divided by each other: bf16 loses the small terms and fp16 the 1e-6.
    with torch.autocast(device_type=query_BQC.device.type, enabled=False):
        q_BHQE, k_BHSE, v_BHSE = (_split(x.float(), heads) for x in (query_BQC, key_BSC, value_BSD))
        q_BHQE = F.elu(q_BHQE) + 1.0
        k_BHSE = F.elu(k_BHSE) + 1.0
        state_BHEE = k_BHSE.transpose(-2, -1) @ v_BHSE
        total_BHE1 = k_BHSE.sum(dim=2).unsqueeze(-1)
        return _merge((q_BHQE @ state_BHEE) / (q_BHQE @ total_BHE1 + 1e-6))


def _split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b t (h e) -> b h t e", h=heads)


def _merge(x: Tensor) -> Tensor:
    return rearrange(x, "b h t e -> b t (h e)")


class LinearHead(nn.Module):
    """`lin`: kernel attention with narrow queries and keys. `proj` is unused there, but is part of released weights."""

    def __init__(self, dim: int, heads: int, latent_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, latent_dim)
        self.k = nn.Linear(dim, latent_dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim).requires_grad_(False)

    def forward(self, query_BQD: Tensor, source_BSD: Tensor) -> Tensor:
        """See the head of this file."""
        return kernel_attention(self.q(query_BQD), self.k(source_BSD), self.v(source_BSD), self.heads)


class CrossAttentionHead(nn.Module):
    """`ca`, and `lca` where `linear`: projections are layer-normalised over their full width, then split into heads.

    ca: softmax(q k^T / sqrt(E)) v; lca: softmax of q over a head's channels, of k over tokens, then q (k^T v).
    """

    def __init__(self, dim: int, heads: int, latent_dim: int, *, linear: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear = linear
        self.q = nn.Linear(dim, latent_dim)
        self.q_norm = nn.LayerNorm(latent_dim)
        self.k = nn.Linear(dim, latent_dim)
        self.k_norm = nn.LayerNorm(latent_dim)
        self.v = nn.Linear(dim, dim)
        self.v_norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query_BQD: Tensor, source_BSD: Tensor) -> Tensor:
        """See the head of this file."""
        q_BHQE = _split(self.q_norm(self.q(query_BQD)), self.heads)
        k_BHSE = _split(self.k_norm(self.k(source_BSD)), self.heads)
        v_BHSE = _split(self.v_norm(self.v(source_BSD)), self.heads)
        if self.linear:
            out_BHQE = q_BHQE.softmax(dim=-1) @ (k_BHSE.softmax(dim=-2).transpose(-2, -1) @ v_BHSE)
        else:
            out_BHQE = F.scaled_dot_product_attention(q_BHQE, k_BHSE, v_BHSE)
        return self.proj(_merge(out_BHQE))


class LatentHead(nn.Module):
    """`la`: small MLPs (hidden width 64) make queries and keys, the raw source tokens are the values; one head.

    softmax of q over channels, of k over tokens, then q (k^T v), without any projection.
    """

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.mlp = Mlp(dim, 64, latent_dim)
        self.mlp2 = Mlp(dim, 64, latent_dim)
        self.norm = nn.LayerNorm(dim)
        self.norm_q = nn.LayerNorm(dim)

    def forward(self, query_BQD: Tensor, source_BSD: Tensor) -> Tensor:
        """See the head of this file."""
        k_BSC = self.mlp(self.norm(source_BSD)).softmax(dim=1)
        q_BQC = self.mlp2(self.norm_q(query_BQD)).softmax(dim=-1)
        return q_BQC @ (k_BSC.transpose(1, 2) @ source_BSD)


class TokenLearnerHead(nn.Module):
    """`tl`: each output is a learned weighting of all source and asking tokens; made for `num_query` asking tokens."""

    def __init__(self, dim: int, num_query: int) -> None:
        super().__init__()
        self.mlp = Mlp(dim, num_query, num_query)
        self.norm = nn.LayerNorm(dim)

    def forward(self, query_BQD: Tensor, source_BSD: Tensor) -> Tensor:
        """See the head of this file; Q is `num_query`."""
        tokens_BTD = torch.cat([source_BSD, query_BQD], dim=1)
        weight_BTO = self.mlp(self.norm(tokens_BTD)).softmax(dim=1)
        return weight_BTO.transpose(1, 2) @ tokens_BTD


def read_write_head(
    kind: Literal["lin", "ca", "lca", "la", "tl"], *, dim: int, heads: int, latent_dim: int, num_query: int
) -> nn.Module:
    """The head `kind`. `heads` concerns lin, ca, lca; `latent_dim` lin, lca, la; `num_query` (asking tokens) tl."""
    if kind == "lin":
        return LinearHead(dim, heads, latent_dim)
    if kind == "la":
        return LatentHead(dim, latent_dim)
    if kind == "tl":
        return TokenLearnerHead(dim, num_query)
    return CrossAttentionHead(dim, heads, dim if kind == "ca" else latent_dim, linear=kind == "lca")


class Fusion(nn.Module):
    """Fuse what a head wrote [B, Q, D] with its target [B, Q, D].

    add: target + written; erase: written; add_erase: (1 - g) target + g written with one gate
    g = sigmoid(linear(mean of written over tokens)) per target token, for `num_target` of them.
    """

    def __init__(self, kind: Literal["add", "erase", "add_erase"], dim: int, num_target: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "add_erase":
            self.linear = nn.Linear(dim, num_target)

    def forward(self, written_BQD: Tensor, target_BQD: Tensor) -> Tensor:
        """[B, Q, D] twice; returns [B, Q, D]."""
        if self.kind == "add":
            return target_BQD + written_BQD
        if self.kind == "erase":
            return written_BQD
        gate_BQ1 = self.linear(written_BQD.mean(dim=1)).sigmoid().unsqueeze(-1)
        return (1.0 - gate_BQ1) * target_BQD + gate_BQ1 * written_BQD
