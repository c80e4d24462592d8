"""Masked reconstruction: the model hides a part of each image and predicts it (ViTTM-HMR, masked ViTTM)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.data.batches import PatchBatch
from engine.data.draws import uniforms
from engine.objectives.base import Objective, make_encoder
from engine.recipes import TrainRecipe

# Draws of the mask, beside those of the loader's views, which are numbered from 0.
_MASK_DRAWS = 1 << 20


class MaskedObjective(Objective):
    """The model computes its own loss; the masks are drawn by the samples' positions."""

    def __init__(self, recipe: TrainRecipe) -> None:
        super().__init__(recipe)
        self.model = make_encoder(recipe)
        self.prepare(self.model)
        self.freeze(self.model)
        self._numbers: int = self.model.config.num_noise  # type: ignore[assignment, union-attr]

    def loss(
        self, parallel: nn.Module, batch: PatchBatch, positions: npt.NDArray[np.int64], step: int, *, last: bool
    ) -> dict[str, Tensor]:
        """See `Objective.loss`."""
        images = batch.images[0]
        draws = uniforms(self.recipe.seed, positions, _MASK_DRAWS, self._numbers)
        noise = torch.from_numpy(draws).to(images.device, torch.float32)
        values = parallel(images, mask_ratio=self.recipe.mask_ratio, noise=noise)
        return {name: value for name, value in values.items() if value.ndim == 0 or name == "features"}
