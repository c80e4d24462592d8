"""Optimiser and learning-rate schedule, in optimiser steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.recipes import OptimRecipe


def make_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and tables only, not on biases, norms and other 1-D parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


def learning_rate(step: int, steps: int, recipe: OptimRecipe) -> float:
    """Learning rate of optimiser step `step` (0-based) of `steps`: linear warm-up, then a cosine down to min_lr."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, steps - 1 - recipe.warmup_steps)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
