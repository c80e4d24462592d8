"""What a model is trained for: one module per objective, all behind the interface of `base.Objective`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.objectives.base import Objective

if TYPE_CHECKING:
    from engine.recipes import TrainRecipe

__all__ = ["Objective", "make_objective"]


def make_objective(recipe: TrainRecipe) -> Objective:
    """Build the recipe's model, with its starting weights, inside its objective; weights come from the recipe's seed.

    Raises UsageError where starting weights, patterns of `freeze` or labels do not fit.
    """
    import torch

    torch.manual_seed(recipe.seed)
    if recipe.objective == "dino":
        from engine.objectives.dino import DinoObjective

        return DinoObjective(recipe)
    if recipe.objective == "supervised":
        from engine.objectives.supervised import SupervisedObjective

        return SupervisedObjective(recipe)
    from engine.objectives.masked import MaskedObjective

    return MaskedObjective(recipe)
