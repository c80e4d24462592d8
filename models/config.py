"""Typed model configs, one class per model. No torch here: recipes are checked before anything heavy is imported.

A config class names the module that implements it (`model_class`), so that `MODEL_CONFIGS` is the only list of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from models.hipt_config import (
    HIPT4KConfig,
    HIPTLocalGlobalConfig,
    HIPTNConfig,
    HIPTPatchConfig,
    HIPTRegionConfig,
    HIPTSlideConfig,
    TimmConfig,
)
from models.model_config import ModelConfig, nearest


class ViTTMHMRConfig(ModelConfig):
    """ViTTM with hierarchical masked reconstruction (vittm-hmr, commit 2761a40), as published or repaired.

    `preset="original"` reproduces the published model with its defects and its state-dict keys. `"repaired"` mends
    them; `models/vittm.py` lists the differences. Fields whose default is None depend on the preset or on the sizes:
    the `resolved_*` properties say what they become.
    """

    model_class: ClassVar[str] = "models.vittm:ViTTMHMR"

    preset: Literal["repaired", "original"] = Field(
        default="repaired", description="'original' reproduces vittm-hmr bug for bug; 'repaired' mends its defects."
    )
    img_size: int = Field(default=256, gt=0, description="Side of the square input image, in pixels.")
    memory_patch: int = Field(
        default=16, gt=0, description="Side of one reconstruction target in the image, in pixels."
    )
    process_patch: int = Field(
        default=64, gt=0, description="Side of the field one process token covers, in image pixels."
    )
    dim: int = Field(
        default=384, gt=0, description="Width of both token streams; a multiple of 32 (GroupNorm) and of heads."
    )
    depth: int = Field(default=6, gt=0, description="Number of read-compute-write blocks.")
    heads: int = Field(default=6, gt=0, description="Attention heads of READ, COMPUTE and WRITE.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of the MLPs over `dim`.")
    slots: int | None = Field(
        default=None,
        gt=0,
        description="Memory slots. null: one per target, (img_size/memory_patch)^2; original: always 256.",
    )
    target: Literal["random_projection", "pixels"] = Field(
        default="random_projection",
        description="What is predicted for each memory patch of the full-resolution image: a frozen random linear "
        "projection to `dim` numbers, or its pixels.",
    )
    target_norm: Literal["image", "batch", "patch", "none"] | None = Field(
        default=None,
        description="Over what a target is standardised. batch: each channel over all positions of the batch (of this "
        "rank); image: each channel over the positions of its own image; patch: each target over its own channels; "
        "none. null: batch for random_projection, patch for pixels, none for the original.",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> ViTTMHMRConfig:
        for name in ("memory_patch", "process_patch"):
            patch = getattr(self, name)
            if self.img_size % patch:
                raise ValueError(f"img_size must be a multiple of {name}: found {self.img_size} and {patch}")
        if self.process_patch % self.memory_patch:
            raise ValueError(
                "process_patch must be a multiple of memory_patch, because each process token predicts whole memory "
                f"patches: found {self.process_patch} and {self.memory_patch}"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads: found {self.dim} and {self.heads}")
        if self.dim % 32:
            raise ValueError(f"dim must be a multiple of 32, the groups of the decoder's GroupNorm: found {self.dim}")
        if self.mlp_ratio * self.dim != int(self.mlp_ratio * self.dim):
            raise ValueError(f"mlp_ratio * dim must be whole: found {self.mlp_ratio} * {self.dim}")
        if self.preset == "original":
            self._check_original()
        return self

    def _check_original(self) -> None:
        found_and_fixed = {
            "slots": (self.slots, 256),
            "target": (self.target, "random_projection"),
            "target_norm": (self.target_norm, "none"),
        }
        for name, (found, fixed) in found_and_fixed.items():
            if found not in (None, fixed):
                raise ValueError(f"preset='original' fixes {name} at {fixed!r}: found {found!r}; use preset='repaired'")

    @property
    def ratio(self) -> int:
        """Memory patches along the side of one process patch."""
        return self.process_patch // self.memory_patch

    @property
    def process_grid(self) -> int:
        """Process tokens along one side of the image."""
        return self.img_size // self.process_patch

    @property
    def num_process(self) -> int:
        """N, process tokens of an image."""
        return self.process_grid**2

    @property
    def num_targets(self) -> int:
        """T, memory patches (= reconstruction targets) of an image."""
        return (self.img_size // self.memory_patch) ** 2

    @property
    def target_dim(self) -> int:
        """C, numbers per target."""
        return self.dim if self.target == "random_projection" else 3 * self.memory_patch**2

    @property
    def resolved_slots(self) -> int:
        """M, memory slots."""
        if self.preset == "original":
            return 256
        return self.num_targets if self.slots is None else self.slots

    @property
    def resolved_target_norm(self) -> Literal["image", "batch", "patch", "none"]:
        """`target_norm` with None replaced by the rule in its description."""
        if self.target_norm is not None:
            return self.target_norm
        if self.preset == "original":
            return "none"
        return "batch" if self.target == "random_projection" else "patch"


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "hipt_patch": HIPTPatchConfig,
    "hipt_region": HIPTRegionConfig,
    "hipt_4k": HIPT4KConfig,
    "hipt_slide": HIPTSlideConfig,
    "hipt_local_global": HIPTLocalGlobalConfig,
    "hipt_n": HIPTNConfig,
    "timm": TimmConfig,
    "vittm_hmr": ViTTMHMRConfig,
}


def resolve_config(name: str, settings: Mapping[str, Any]) -> ModelConfig:
    """The checked config of the model `name`, without building it and without importing torch.

    Raises:
        ValueError: unknown model, unknown setting (the nearest known one is named) or a value that does not fit
            (pydantic's ValidationError is a ValueError).
    """
    if name not in MODEL_CONFIGS:
        raise ValueError(f"there is no model {name!r}; {nearest(name, list(MODEL_CONFIGS))}")
    return MODEL_CONFIGS[name].model_validate(dict(settings))
