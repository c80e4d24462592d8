"""Optimisers, their schedules in optimiser steps, gradient clipping, and moving averages of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.objective_recipes import OptimRecipe
from models.objectives.dino import clip_gradients, cosine_schedule, parameter_groups


def make_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.Optimizer:
    """The optimiser over what learns in `model`, in two groups: what decays (the first), and what does not."""
    if recipe.decay == "all":
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        groups = parameter_groups(model)
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.betas[0], weight_decay=recipe.weight_decay)
    fused = all(p.is_cuda for p in model.parameters())
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=fused)


class Schedules:
    """Learning rate and weight decay of each step.

    Args:
        recipe: shapes and end points.
        steps: optimiser steps in all.
    """

    def __init__(self, recipe: OptimRecipe, steps: int) -> None:
        self._recipe = recipe
        self._steps = steps
        self._published = None
        if recipe.schedule == "dino":
            warmup = min(recipe.warmup_steps, steps)
            self._published = cosine_schedule(recipe.lr, recipe.min_lr, steps, warmup_steps=warmup)

    def learning_rate(self, step: int) -> float:
        """Of optimiser step `step` (0-based).

        "cosine" rises over warmup_steps, lr at the last of them, then falls along half a cosine to min_lr at the last
        step. "dino" is `cosine_schedule` of models/objectives/dino.py. "constant" stays at lr after the warm-up.
        """
        recipe = self._recipe
        if self._published is not None:
            return float(self._published[step])
        if step < recipe.warmup_steps:
            return recipe.lr * (step + 1) / recipe.warmup_steps
        if recipe.schedule == "constant":
            return recipe.lr
        progress = (step - recipe.warmup_steps) / max(1, self._steps - 1 - recipe.warmup_steps)
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def weight_decay(self, step: int) -> float:
        """Of the group that decays, at optimiser step `step` (0-based): half a cosine."""
        start, end = self._recipe.weight_decay, self._recipe.weight_decay_end
        if end is None:
            return start
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / self._steps))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set both for a step and return the learning rate."""
        rate = self.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.param_groups[0]["weight_decay"] = self.weight_decay(step)
        return rate


def clip(model: nn.Module, recipe: OptimRecipe) -> Tensor:
    """Clip gradients as the recipe says; the global L2 norm before, a 0-d tensor."""
    if recipe.clip_norm is not None and recipe.clip == "global":
        return nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    if recipe.clip_norm is not None:
        norms = list(clip_gradients(model, recipe.clip_norm).values())
        return torch.linalg.vector_norm(torch.stack(norms))
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def make_average(model: nn.Module, momentum: float | None) -> AveragedModel | None:
    """An exponential moving average of the model's parameters, its buffers copied; None for none."""
    if momentum is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(momentum), use_buffers=False)
