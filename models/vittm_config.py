"""Configs of the ViTTM family. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from models.model_config import ModelConfig


class ViTTMHMRConfig(ModelConfig):
    """ViTTM with hierarchical masked reconstruction (vittm-hmr, commit 2761a40), as published or repaired.

    `preset="original"` reproduces the published model with its defects and its state-dict keys. `"repaired"` mends
    them; `models/vittm_hmr.py` lists the differences. Fields whose default is None depend on the preset or on the
    sizes: the `resolved_*` properties say what they become.
    """

    model_class: ClassVar[str] = "models.vittm_hmr:ViTTMHMR"

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
    memory: Literal["bank", "image"] = Field(
        default="bank",
        description="What memory starts as. bank: learned slots, the same for every image; image: a slot per target, "
        "the learned one plus an embedding of its memory patch at full resolution where that is not hidden.",
    )
    target: Literal["random_projection", "ema", "pixels"] = Field(
        default="random_projection",
        description="What is predicted for each memory patch of the full-resolution image: a frozen random linear "
        "projection to `dim` numbers; what a slowly moving average of the model (the teacher) makes of it; its pixels.",
    )
    ema_momentum: float = Field(
        default=0.996,
        ge=0,
        le=1,
        description="How much of the teacher stays at each step; rises to 1 along a half cosine (target: ema).",
    )
    target_norm: Literal["image", "batch", "patch", "none"] | None = Field(
        default=None,
        description="Over what a target is standardised. batch: each channel over all positions of the batch (of all "
        "ranks); image: each channel over the positions of its own image; patch: each target over its own channels; "
        "none. null: batch for random_projection and ema, patch for pixels, none for the original.",
    )
    loss_on: Literal["hidden", "all"] | None = Field(
        default=None,
        description="Positions whose predictions count. all: visible ones too, where the answer can be read off the "
        "input: a reconstruction that teaches texture early. null: hidden, all for the original.",
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
        if self.memory == "image" and self.slots not in (None, self.num_targets):
            raise ValueError(
                f"memory='image' has one slot per memory patch, {self.num_targets}: found slots={self.slots}; "
                "leave slots out"
            )
        if self.preset == "original":
            self._check_original()
        return self

    def _check_original(self) -> None:
        found_and_fixed = {
            "slots": (self.slots, 256),
            "memory": (self.memory, "bank"),
            "target": (self.target, "random_projection"),
            "target_norm": (self.target_norm, "none"),
            "loss_on": (self.loss_on, "all"),
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
    def num_noise(self) -> int:
        """Random numbers that the mask of one image takes."""
        return self.num_process

    @property
    def num_targets(self) -> int:
        """T, memory patches (= reconstruction targets) of an image."""
        return (self.img_size // self.memory_patch) ** 2

    @property
    def target_dim(self) -> int:
        """C, numbers per target."""
        return 3 * self.memory_patch**2 if self.target == "pixels" else self.dim

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
        return "patch" if self.target == "pixels" else "batch"

    @property
    def resolved_loss_on(self) -> Literal["hidden", "all"]:
        """`loss_on` with None replaced by the preset's."""
        return self.loss_on or ("all" if self.preset == "original" else "hidden")


class ViTTMTrunkConfig(ModelConfig):
    """The token streams of the paper's ViTTM and what runs on them; `ViTTMConfig` and `ViTTMMAEConfig` add the rest.

    Published sizes (dim/depth/heads): tiny 192/12/3, small 384/12/6 (default), base 768/12/12, large 1024/24/16; patch
    pairs (memory/process) 28/28 (default, the released weights) and 16/32, at 224 px.
    """

    img_size: int = Field(
        default=224, gt=0, description="Side of the square images that the position tables are made for, in pixels."
    )
    memory_patch: int = Field(default=28, gt=0, description="Side of the patch of one memory token, in pixels.")
    process_patch: int = Field(default=28, gt=0, description="Side of the patch of one process token, in pixels.")
    dim: int = Field(default=384, gt=0, description="Width of both token streams; a multiple of heads.")
    depth: int = Field(default=12, gt=0, description="Number of read-compute-write layers.")
    heads: int = Field(default=6, gt=0, description="Attention heads of READ, COMPUTE and WRITE.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of the process stream's MLPs over `dim`.")
    memory_mlp_ratio: float = Field(
        default=0.0,
        ge=0,
        description="Hidden width over `dim` of an MLP on memory in each layer; 0: none (released).",
    )
    read_write: Literal["lin", "ca", "lca", "la", "tl"] = Field(
        default="lin",
        description="READ and WRITE heads. lin: linear attention; ca: cross attention; lca: cross attention with "
        "separate softmaxes; la: the same with MLPs for projections; tl: token learner (fixed image size).",
    )
    latent_scale: int = Field(
        default=4, gt=0, description="`dim` over the width of queries and keys in the heads lin, lca and la."
    )
    fusion: Literal["add", "erase", "add_erase"] = Field(
        default="add",
        description="How what a head writes meets its target: summed; in its place; or mixed by a learned gate per "
        "target token (fixed image size).",
    )
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="Stochastic depth of the last process block; grows linearly from 0."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> ViTTMTrunkConfig:
        for name in ("memory_patch", "process_patch"):
            patch = getattr(self, name)
            if self.img_size % patch:
                raise ValueError(f"img_size must be a multiple of {name}: found {self.img_size} and {patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads: found {self.dim} and {self.heads}")
        if self.read_write in ("lin", "lca") and self.dim % (self.latent_scale * self.heads):
            raise ValueError(
                f"dim must be a multiple of latent_scale * heads: found {self.dim}, {self.latent_scale} and "
                f"{self.heads}"
            )
        if self.read_write == "la" and self.dim % self.latent_scale:
            raise ValueError(f"dim must be a multiple of latent_scale: found {self.dim} and {self.latent_scale}")
        return self

    @property
    def latent_dim(self) -> int:
        """Width of queries and keys in the heads lin, lca and la."""
        return self.dim // self.latent_scale

    @property
    def num_memory(self) -> int:
        """M, memory tokens of an image of img_size."""
        return (self.img_size // self.memory_patch) ** 2

    @property
    def num_process(self) -> int:
        """N, process tokens of an image of img_size."""
        return (self.img_size // self.process_patch) ** 2

    @property
    def fixed_counts(self) -> bool:
        """Whether a head or the gate is made for these numbers of tokens and no others."""
        return self.read_write == "tl" or self.fusion == "add_erase"


class ViTTMConfig(ViTTMTrunkConfig):
    """The paper's supervised ViTTM (arXiv 2409.07613) with a classifier on each stream, under its published keys."""

    model_class: ClassVar[str] = "models.vittm:ViTTM"

    n_classes: int = Field(default=1000, gt=0, description="Outputs of each of the two classifiers.")


class ViTTMMAEConfig(ViTTMTrunkConfig):
    """ViTTM as a masked autoencoder: hidden patches are dropped from the streams and their pixels predicted."""

    model_class: ClassVar[str] = "models.vittm_mae:ViTTMMAE"

    mask: Literal["aligned", "independent", "process", "memory"] = Field(
        default="aligned",
        description="What is hidden. aligned: the same places in both streams, so that neither shows what the other "
        "must predict; independent: each stream its own; process, memory: that stream alone.",
    )
    target_norm: Literal["image", "batch", "patch", "none"] = Field(
        default="patch",
        description="Over what pixels are standardised: each patch over itself; each pixel of the patch over the "
        "positions of its image, or of the batch; none.",
    )
    decoder_dim: int = Field(default=512, gt=0, description="Width of the two decoders; a multiple of decoder_heads.")
    decoder_depth: int = Field(default=8, gt=0, description="Blocks of each decoder.")
    decoder_heads: int = Field(default=16, gt=0, description="Attention heads of the decoders.")

    @model_validator(mode="after")
    def _check_mask(self) -> ViTTMMAEConfig:
        if self.fixed_counts:
            raise ValueError(
                f"read_write={self.read_write!r} with fusion={self.fusion!r} needs every token, and the masked "
                "autoencoder drops some: take read_write lin, ca, lca or la, and fusion add or erase"
            )
        if self.mask == "aligned" and self.process_patch % self.memory_patch:
            raise ValueError(
                "mask='aligned' needs process_patch to be a multiple of memory_patch: found "
                f"{self.process_patch} and {self.memory_patch}; take mask='independent'"
            )
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim must be a multiple of decoder_heads: found {self.decoder_dim} and {self.decoder_heads}"
            )
        return self

    @property
    def num_noise(self) -> int:
        """Random numbers that the masks of one image take: those of the process stream, then those of memory."""
        return {
            "aligned": self.num_process,
            "process": self.num_process,
            "memory": self.num_memory,
            "independent": self.num_process + self.num_memory,
        }[self.mask]
