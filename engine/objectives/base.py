"""What the training loop asks of an objective, and what all objectives do alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config import UsageError
from engine.data.batches import PatchBatch
from engine.recipes import TrainRecipe
from models import build_model, load_weights
from models.stochastic_depth import SampleShare, share_draws
from models.weights_info import PREFIX, WeightsInfo, weights_digest


class Objective(ABC):
    """A model and what it is trained for.

    Attributes:
        model: everything that learns or is remembered; its state dict, `model.safetensors` of a checkpoint, is all that
            a resumed run needs beside the optimiser. Models of one name of `models.config` carry its name and config.
        prefix: where in the state dict the encoder lies that others want.
        mpp: spacing of the patches that it learns from, in um/px; None is unknown or several.
        share: which samples of the whole batch `loss` has; whoever calls it says so before.
    """

    model: nn.Module
    prefix = ""
    mpp: float | None = None

    def __init__(self, recipe: TrainRecipe) -> None:
        self.recipe = recipe
        self.share = SampleShare()

    @abstractmethod
    def loss(
        self, parallel: nn.Module, batch: PatchBatch, positions: npt.NDArray[np.int64], step: int, *, last: bool
    ) -> dict[str, Tensor]:
        """The scalars of a batch or of a part of one, `loss` among them, means over its samples.

        Args:
            parallel: the model as it is called: itself, or DDP around it.
            positions: int64[B], places of the samples in the stream; all that is random is drawn by them.
            step: optimiser steps done.
            last: whether this is the batch's last part.

        Returns:
            `loss`, what is minimised; other 0-d tensors, which are logged; and `features` [n, D], which are watched.
        """

    def before_step(self, step: int) -> None:
        """Change gradients, after they were clipped; `step` counts the optimiser steps done."""
        return

    def after_step(self, step: int, total: int) -> None:
        """Let a teacher follow, after optimiser step `step` (1-based) of `total`."""
        follow = getattr(self.model, "after_step", None)
        if follow is not None:
            follow(step, total)

    def state_dict(self) -> dict[str, Any]:
        """What else decides the numbers of a run, as plain values; a checkpoint keeps it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where a run must not go on from `state` with what is here."""
        return

    def compile(self) -> None:
        """Have torch compile the model where it is called."""
        self.model.compile()

    def describe(self, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """The metadata of a file that holds the model's state dict: what `load_weights` should know of its encoder."""
        own = {key.removeprefix(self.prefix): value for key, value in weights.items() if key.startswith(self.prefix)}
        config = {key: value for key, value in self.recipe.model.items() if key != "name"}
        info = WeightsInfo(
            weights_digest(own),
            model=self.recipe.model["name"],
            config=config,
            mean=self.recipe.mean,
            std=self.recipe.std,
            mpp=self.mpp,
            pos_interpolation=config.get("pos_interpolation"),
        )
        return info.to_metadata() | ({PREFIX: self.prefix} if self.prefix else {})

    def prepare(self, encoder: nn.Module) -> None:
        """Give the encoder what the recipe asks for: starting weights, and blocks that are computed twice.

        Its stochastic depth is drawn by sample from here on.
        """
        share_draws(encoder, self.share)
        if self.recipe.weights is not None:
            try:
                load_weights(encoder, self.recipe.weights)
            except (OSError, ValueError) as error:
                raise UsageError(f"weights={self.recipe.weights}: {error}") from None
        if self.recipe.checkpoint_activations:
            checkpoint_blocks(encoder)

    def freeze(self, module: nn.Module) -> None:
        """Have the parameters that `freeze` names not learn."""
        named = dict(module.named_parameters())
        for pattern in self.recipe.freeze:
            found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
            if not found:
                raise UsageError(f"freeze={pattern}: no parameter has such a name; the first are {list(named)[:5]}.")
            for parameter in found:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in named.values()):
            raise UsageError(f"freeze={list(self.recipe.freeze)} leaves no parameter to learn.")


def make_encoder(recipe: TrainRecipe, **changes: Any) -> nn.Module:
    """The recipe's model, with fresh weights; `changes` are settings that differ."""
    options = {key: value for key, value in recipe.model.items() if key != "name"}
    try:
        return build_model(recipe.model["name"], **(options | changes))
    except ValueError as error:
        raise UsageError(f"model: {error}") from None


def width_of(encoder: nn.Module) -> int:
    """Numbers in an encoder's embedding of an image: `dim` of ours, `num_features` of timm's."""
    return int(getattr(encoder, "dim", None) or encoder.num_features)  # type: ignore[arg-type]


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only the inputs of the model's blocks for the backward pass, and compute the rest there again."""
    if hasattr(model, "set_grad_checkpointing"):  # timm's
        model.set_grad_checkpointing(True)  # type: ignore[operator]
        return
    if hasattr(model, "grad_checkpointing"):
        model.grad_checkpointing = True  # type: ignore[assignment]
        return
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
