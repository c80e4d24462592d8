"""Configs of the HIPT models and of timm's backbones; the modules they name say what the models do. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from models.model_config import ModelConfig

PosInterpolation = Literal["given", "recomputed"]
HeadKind = Literal["classification", "regression", "ordinal", "coral", "survival"]
Positions = Literal["none", "sinusoid_1d", "learned_1d", "sinusoid_2d", "learned_2d"]

_VARIANTS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # dim, heads


class ViTConfig(ModelConfig):
    """What the patch ViT and the region ViT have in common."""

    pos_interpolation: PosInterpolation = Field(
        default="given",
        description="How the table of positions is resampled to another grid of g tokens a side: with the step "
        "pos_grid/(g + 0.1) of the published weights, or with pos_grid/g of later reimplementations.",
    )
    pos_grid: int = Field(
        default=14, gt=0, description="Side of the square table of positions, in tokens: 7/8 of the pre-training grid."
    )
    register_tokens: int = Field(default=0, ge=0, description="Register tokens behind the class token.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of the MLPs over `dim`.")
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="Rate of dropped residual branches in the last block, from 0 in the first."
    )
    grad_checkpointing: bool = Field(
        default=False, description="Recompute each block in the backward pass: less memory, more time."
    )


ViTConfigT = TypeVar("ViTConfigT", bound=ViTConfig)


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim must be a multiple of heads: found {dim} and {heads}")


class HIPTPatchConfig(ViTConfig):
    """The patch ViT of HIPT (ViT-256-16): pixels to one embedding per patch."""

    model_class: ClassVar[str] = "models.vit:PatchViT"

    variant: Literal["tiny", "small", "base"] = Field(
        default="small", description="Width and heads: 192 and 3, 384 and 6 (published), 768 and 12."
    )
    depth: int = Field(default=12, gt=0, description="Number of blocks.")
    dim: int | None = Field(default=None, gt=0, description="Width; null: the variant's.")
    heads: int | None = Field(default=None, gt=0, description="Attention heads; null: the variant's.")

    @model_validator(mode="after")
    def _check_sizes(self) -> HIPTPatchConfig:
        _check_heads(self.resolved_dim, self.resolved_heads)
        return self

    @property
    def resolved_dim(self) -> int:
        """`dim`, or the variant's width."""
        return self.dim or _VARIANTS[self.variant][0]

    @property
    def resolved_heads(self) -> int:
        """`heads`, or the variant's."""
        return self.heads or _VARIANTS[self.variant][1]


class HIPTRegionConfig(ViTConfig):
    """The region ViT of HIPT (ViT-4K-256): a grid of patch embeddings to one embedding per region."""

    model_class: ClassVar[str] = "models.vit:RegionViT"

    in_dim: int = Field(default=384, gt=0, description="Width of the patch embeddings (UNI 1024, Virchow2 2560).")
    dim: int = Field(default=192, gt=0, description="Width of the tokens and of the region embedding.")
    depth: int = Field(default=6, gt=0, description="Number of blocks.")
    heads: int = Field(default=6, gt=0, description="Attention heads.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout behind the projection of patch embeddings.")

    @model_validator(mode="after")
    def _check_sizes(self) -> HIPTRegionConfig:
        _check_heads(self.dim, self.heads)
        return self


class HIPT4KConfig(ModelConfig):
    """HIPT_4K: regions of pixels through the patch ViT and the region ViT."""

    model_class: ClassVar[str] = "models.hipt:HIPT4K"

    patch: HIPTPatchConfig = Field(default=HIPTPatchConfig(), description="Settings of the patch ViT.")
    region: HIPTRegionConfig = Field(default=HIPTRegionConfig(), description="Settings of the region ViT.")
    pos_interpolation: PosInterpolation | None = Field(
        default=None, description="For both ViTs at once; null: as `patch` and `region` say."
    )
    chunk: int | None = Field(
        default=None,
        gt=0,
        description="Patches that go through the patch ViT at a time. null: 256 on a GPU; 8 on a CPU, whose caches "
        "hold the activations of no more.",
    )
    bf16: bool = Field(
        default=False, description="Run both ViTs under bfloat16 autocast (norms and softmax stay in float32)."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> HIPT4KConfig:
        if self.patch.resolved_dim != self.region.in_dim:
            raise ValueError(
                "region.in_dim must be the width of the patch embeddings: "
                f"found {self.region.in_dim} and {self.patch.resolved_dim}"
            )
        return self

    @property
    def resolved_patch(self) -> HIPTPatchConfig:
        """`patch` under the common position rule."""
        return _with_positions(self.patch, self.pos_interpolation)

    @property
    def resolved_region(self) -> HIPTRegionConfig:
        """`region` under the common position rule."""
        return _with_positions(self.region, self.pos_interpolation)


class HeadConfig(ModelConfig):
    """What a slide-level model predicts."""

    n_classes: int = Field(
        gt=0,
        description="Classes (classification), grades (ordinal, coral), time intervals (survival); regression has one "
        "output, whose rounded value is kept below n_classes.",
    )
    head: HeadKind = Field(
        default="classification",
        description="Outputs: n_classes logits; 1 value; n_classes - 1 cumulative logits, with weights of their own "
        "(ordinal) or common ones (coral); n_classes logits of hazards.",
    )
    dropout: float = Field(default=0.25, ge=0, lt=1, description="Dropout in every layer of the slide level.")

    @model_validator(mode="after")
    def _check_classes(self) -> HeadConfig:
        if self.head in ("ordinal", "coral") and self.n_classes < 2:
            raise ValueError(f"head={self.head} needs n_classes of 2 or more: found {self.n_classes}")
        return self


class HIPTSlideConfig(HeadConfig):
    """The slide level of HIPT on region embeddings (published as HIPT_GP_FC, GlobalHIPT)."""

    model_class: ClassVar[str] = "models.hipt_slide:HIPTSlide"

    in_dim: int = Field(default=192, gt=0, description="Width of the region embeddings.")
    dim: int = Field(default=192, gt=0, description="Width of the slide level.")
    depth: int = Field(default=2, gt=0, description="Transformer layers over the regions.")
    heads: int = Field(default=3, gt=0, description="Attention heads of these layers.")
    positions: Positions = Field(
        default="none",
        description="What is added to the region tokens: nothing; a sinusoid or a learned entry of the place in the "
        "sequence (1d); a sinusoid of the Cantor number or two learned entries of the place in the slide (2d).",
    )
    max_regions: int = Field(default=1024, gt=0, description="Length of the table of 1-D positions.")
    max_grid: int = Field(default=256, gt=0, description="Length of either table of learned 2-D positions, in regions.")

    @model_validator(mode="after")
    def _check_sizes(self) -> HIPTSlideConfig:
        _check_heads(self.dim, self.heads)
        if self.positions != "none" and self.dim % 2:
            raise ValueError(f"positions={self.positions} needs an even dim: found {self.dim}")
        return self


class HIPTLocalGlobalConfig(HIPTSlideConfig):
    """The region ViT and the slide level in one model, on patch embeddings (published as HIPT_LGP_FC)."""

    model_class: ClassVar[str] = "models.hipt_slide:HIPTLocalGlobal"

    region: HIPTRegionConfig = Field(default=HIPTRegionConfig(), description="Settings of the region ViT.")
    pos_interpolation: PosInterpolation | None = Field(
        default=None, description="Of the region ViT; null: as `region` says."
    )
    freeze: Literal["none", "all", "all_but_positions"] = Field(
        default="none", description="Which parameters of the region ViT stay as they are."
    )

    @model_validator(mode="after")
    def _check_region(self) -> HIPTLocalGlobalConfig:
        if self.region.dim != self.in_dim:
            raise ValueError(
                f"in_dim must be the width of the region embeddings: found {self.in_dim} and {self.region.dim}"
            )
        return self

    @property
    def resolved_region(self) -> HIPTRegionConfig:
        """`region` under `pos_interpolation`."""
        return _with_positions(self.region, self.pos_interpolation)


class HIPTNConfig(HeadConfig):
    """The slide level without transformers (published as HIPT_None_FC): gated attention over patches, then regions."""

    model_class: ClassVar[str] = "models.hipt_slide:HIPTN"

    in_dim: int = Field(default=384, gt=0, description="Width of the patch embeddings.")
    dim: int = Field(default=256, gt=0, description="Width of both levels.")


class TimmConfig(ModelConfig):
    """Any image encoder of timm, without its classifier and with random weights."""

    model_class: ClassVar[str] = "models.timm_encoder:build_encoder"

    architecture: str = Field(description="timm's name of it: resnet50, vit_large_patch16_224, hf-hub:owner/model.")
    settings: dict[str, Any] = Field(
        default={}, description="Its own settings; UNI: img_size 224, init_values 1e-5, dynamic_img_size true."
    )


def _with_positions(config: ViTConfigT, rule: PosInterpolation | None) -> ViTConfigT:
    """`config` under another position rule; None leaves it as it is."""
    return config if rule is None else config.model_copy(update={"pos_interpolation": rule})
