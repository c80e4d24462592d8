"""Positions of regions for the slide level: by their place in the sequence, or by their place in the slide.

The published HIPT has none; these are those of later reimplementations. Shapes: B slides, M regions, D dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.hipt_config import HIPTSlideConfig


def build_positions(config: HIPTSlideConfig) -> nn.Module | None:
    """A module from (x [B, M, D], mask [B, M], coordinates [B, M, 2] or None) to x with positions, or None."""
    if config.positions == "none":
        return None
    if config.positions == "sinusoid_2d":
        return CantorPositions(config.dropout)
    if config.positions == "learned_2d":
        return GridPositions(config.dim, config.max_grid, config.dropout)
    return SequencePositions(config.dim, config.max_regions, config.dropout, learned=config.positions == "learned_1d")


def sinusoid(place: Tensor, dim: int) -> Tensor:
    """sin(place / 10000^(2i/dim)) at the even channel 2i, its cosine at 2i + 1 (arXiv 1706.03762, section 3.5).

    `place` has any shape and is computed in float64 (Cantor numbers are large); the result is float32 [..., dim].
    """
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=place.device)
    angle = place.double().unsqueeze(-1) * torch.exp(even * (-math.log(10000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).float()


class SequencePositions(nn.Module):
    """1-D: entry i of a table `pe` [max_regions, 1, D] for region i of the slide, masked ones not counted."""

    def __init__(self, dim: int, max_regions: int, dropout: float, *, learned: bool) -> None:
        super().__init__()
        if learned:
            self.pe = nn.Parameter(nn.init.trunc_normal_(torch.empty(max_regions, 1, dim), std=0.02))
        else:
            self.register_buffer("pe", sinusoid(torch.arange(max_regions), dim).unsqueeze(1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, coordinates: Tensor | None) -> Tensor:
        """Raises ValueError where a slide has more regions than the table."""
        place_BM = (mask.cumsum(dim=1) - 1).clamp(min=0)
        _refuse_beyond(place_BM, len(self.pe), "max_regions")
        out: Tensor = self.dropout(x + self.pe.squeeze(1)[place_BM])
        return out


class CantorPositions(nn.Module):
    """2-D: the sinusoid of the Cantor number (x + y)(x + y + 1)/2 + y, which no two places share."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, coordinates: Tensor | None) -> Tensor:
        """Raises ValueError where coordinates are missing."""
        column, row = _required(coordinates).unbind(dim=-1)
        cantor_BM = (column + row) * (column + row + 1) // 2 + row
        out: Tensor = self.dropout(x + sinusoid(cantor_BM, x.shape[-1]))
        return out


class GridPositions(nn.Module):
    """2-D: learned entries of the column and of the row, D/2 each, both counted from the slide's first region."""

    def __init__(self, dim: int, max_grid: int, dropout: float) -> None:
        super().__init__()
        self.column = nn.Embedding(max_grid, dim // 2)
        self.row = nn.Embedding(max_grid, dim // 2)
        for table in (self.column, self.row):
            nn.init.trunc_normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, coordinates: Tensor | None) -> Tensor:
        """Raises ValueError where coordinates are missing, or span more than the tables."""
        place_BM2 = _required(coordinates)
        hidden = ~mask.unsqueeze(-1)
        first_B12 = place_BM2.masked_fill(hidden, torch.iinfo(place_BM2.dtype).max).amin(dim=1, keepdim=True)
        place_BM2 = (place_BM2 - first_B12).masked_fill(hidden, 0)
        _refuse_beyond(place_BM2, len(self.column.weight), "max_grid")
        column, row = place_BM2.unbind(dim=-1)
        out: Tensor = self.dropout(x + torch.cat([self.column(column), self.row(row)], dim=-1))
        return out


def _required(coordinates: Tensor | None) -> Tensor:
    if coordinates is None:
        raise ValueError("2-D positions need coordinates, (column, row) of each region: found none")
    return coordinates


def _refuse_beyond(place: Tensor, length: int, name: str) -> None:
    if place.numel() and int(place.max()) >= length:
        raise ValueError(f"{name}={length} is too small for this slide: expected {int(place.max()) + 1} or more")
