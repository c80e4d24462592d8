"""The recipe keys of what a model is trained for and how: objective, optimiser, schedules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Recipe, Verbatim


class OptimRecipe(Recipe):
    """Optimiser and schedules, in optimiser steps."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum betas[0]")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up; then the schedule")
    schedule: Literal["cosine", "dino", "constant"] = Field(
        "cosine",
        description="after the warm-up; dino as published: step 0 has rate 0, min_lr is not met",
    )
    weight_decay: float = Field(0.05, ge=0, description="at the first step")
    weight_decay_end: float | None = Field(None, ge=0, description="along half a cosine; null stays at weight_decay")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="what decays: all but biases, norms and other 1-D parameters, or really all"
    )
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = Field(1.0, gt=0, description="longest gradient; null does not clip")
    clip: Literal["global", "parameter"] = Field(
        "global", description="clip all gradients together, or each parameter's by itself (DINO)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimRecipe:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: expected two numbers from 0 to below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} with lr={self.lr:g}: expected the smaller one first")
        return self


class DinoRecipe(Recipe):
    """DINO (arXiv 2104.14294): what views=dino has beside its two large crops of crop_px, head, teacher."""

    small_px: int = Field(96, ge=16, description="side of a small crop")
    num_small: int = Field(8, ge=0, description="small crops of each sample")
    large_scale: tuple[float, float] = Field(
        (0.32, 1.0), description="smallest and largest share of the patch's area in a large crop, where ect is null"
    )
    small_scale: tuple[float, float] = Field((0.05, 0.32), description="the same in a small crop")
    solarise: float = Field(0.2, ge=0, le=1, description="probability in the second large crop")
    out_dim: int = Field(65536, ge=2, description="prototypes")
    hidden_dim: int = Field(2048, ge=1, description="width of the head's hidden layers")
    bottleneck_dim: int = Field(256, ge=1, description="width of what is compared with the prototypes")
    norm_last_layer: bool = Field(True, description="prototypes keep unit length")
    freeze_last_layer_steps: int = Field(0, ge=0, description="steps in which the prototypes do not learn")
    student_temp: float = Field(0.1, gt=0, description="temperature of the student's softmax")
    teacher_temp: float = Field(0.04, gt=0, description="temperature of the teacher's softmax")
    warmup_teacher_temp: float = Field(0.04, gt=0, description="the same at the first step")
    warmup_teacher_temp_steps: int = Field(0, ge=0, description="steps from the one to the other")
    teacher_momentum: float = Field(0.996, ge=0, le=1, description="at the first step; rises to 1 along half a cosine")
    center_momentum: float = Field(0.9, ge=0, le=1, description="how much of the centre stays at each step")
    drop_path: float = Field(0.1, ge=0, lt=1, description="of the student's last block; the teacher has none")

    def view_options(self) -> dict[str, Any]:
        """What `dino_views` takes beside sizes that other keys give."""
        names = ("num_small", "large_scale", "small_scale", "solarise")
        return {name: getattr(self, name) for name in names}


class SupervisedRecipe(Recipe):
    """Classification of patches by a column of the dataset."""

    label: Annotated[str | None, Verbatim()] = Field(
        None, description="column of index.parquet or slides.parquet; its values, sorted as text, are the classes"
    )
    loss: Literal["ce", "bce"] = Field("ce", description="cross-entropy, or binary cross-entropy summed over classes")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes (ce)")
    focal_gamma: float = Field(0.0, ge=0, description="factor (1 - p)^gamma on each sample (ce); 0 is none")


def _names(value: Any) -> Any:
    """One pattern may stand without brackets."""
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_names)]
