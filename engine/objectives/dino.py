"""DINO on patches: the first stage of HIPT, and the same for other encoders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from engine.data.batches import PatchBatch
from engine.objectives.base import Objective, make_encoder, width_of
from engine.recipes import TrainRecipe
from models.objectives.dino import DINO, DINOHead, DINOLoss, MultiCropWrapper, cancel_last_layer_gradients


class DinoObjective(Objective):
    """Student, teacher and centre; temperatures and freezing are counted in optimiser steps."""

    model: DINO
    prefix = "teacher.backbone."

    def __init__(self, recipe: TrainRecipe) -> None:
        super().__init__(recipe)
        keys = recipe.dino
        # timm takes it by the same name, among an architecture's own settings.
        of_timm = recipe.model["name"] == "timm"
        settings = recipe.model.get("settings", {})
        drop = {"settings": settings | {"drop_path_rate": keys.drop_path}} if of_timm else {"drop_path": keys.drop_path}
        student, teacher = make_encoder(recipe, **drop), make_encoder(recipe)
        self.prepare(student)
        width = width_of(student)
        heads = [
            DINOHead(width, keys.out_dim, keys.hidden_dim, keys.bottleneck_dim, norm_last_layer=keys.norm_last_layer)
            for _ in range(2)
        ]
        loss = DINOLoss(
            keys.out_dim,
            2 + keys.num_small,
            keys.warmup_teacher_temp,
            keys.teacher_temp,
            min(keys.warmup_teacher_temp_steps, recipe.steps),
            recipe.steps,
            student_temp=keys.student_temp,
            center_momentum=keys.center_momentum,
        )
        self.model = DINO(
            MultiCropWrapper(student, heads[0]),
            MultiCropWrapper(teacher, heads[1]),
            loss,
            teacher_momentum=keys.teacher_momentum,
        )
        self.freeze(self.model.student)

    def loss(
        self, parallel: nn.Module, batch: PatchBatch, positions: npt.NDArray[np.int64], step: int, *, last: bool
    ) -> dict[str, Tensor]:
        """See `Objective.loss`."""
        values: dict[str, Tensor] = parallel(batch.images, step, move_center=last)
        return values

    def before_step(self, step: int) -> None:
        """Spare the prototypes at first."""
        if step < self.recipe.dino.freeze_last_layer_steps:
            cancel_last_layer_gradients(self.model.student)

    def compile(self) -> None:
        """Compile the encoders; the loss changes its centre and stays as it is."""
        for wrapper in (self.model.student, self.model.teacher):
            wrapper.backbone.compile()
