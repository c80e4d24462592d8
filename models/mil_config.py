"""Configs of the slide-level models over bags of embeddings (`models/mil.py`, `models/clam.py`)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from models.model_config import ModelConfig


class BagConfig(ModelConfig):
    """What all of them take and give."""

    in_dim: int = Field(default=384, gt=0, description="Width of an instance's embedding.")
    n_classes: int = Field(
        default=2, gt=0, description="Outputs: classes, or bins of survival, or 1 for a binary or a continuous label."
    )
    dropout: float = Field(default=0.25, ge=0, lt=1, description="Dropout after each hidden layer.")


class ABMILConfig(BagConfig):
    """Attention MIL (Ilse et al. 2018, arXiv 1802.04712)."""

    model_class: ClassVar[str] = "models.mil:ABMIL"

    gated: bool = Field(default=True, description="Gate the attention's tanh by a sigmoid (eq. 9) or not (eq. 8).")
    embed_dims: tuple[int, ...] = Field(
        default=(256,), description="Widths of linear layers with ReLU before the attention; empty: none."
    )
    attention_dim: int = Field(default=128, gt=0, description="Hidden width of the attention.")
    branches: int = Field(default=1, gt=0, description="Attentions side by side; their embeddings are concatenated.")
    classifier_dims: tuple[int, ...] = Field(
        default=(), description="Widths of linear layers with ReLU between the bag's embedding and the outputs."
    )


class PoolMILConfig(BagConfig):
    """Baselines without attention."""

    model_class: ClassVar[str] = "models.mil:PoolMIL"

    pool: Literal["mean", "max", "top"] = Field(
        default="mean",
        description="mean, max: of each embedding channel over the bag, then classified; top: every instance is "
        "classified and the most confident one answers for the bag.",
    )
    embed_dims: tuple[int, ...] = Field(
        default=(256,), description="Widths of linear layers with ReLU before the pooling; empty: none."
    )


class DSMILConfig(BagConfig):
    """Dual-stream MIL (Li et al. 2021, arXiv 2011.08939)."""

    model_class: ClassVar[str] = "models.mil:DSMIL"

    query_dim: int = Field(default=128, gt=0, description="Width in which instances are compared with the top ones.")


class FCMajorityConfig(ModelConfig):
    """A linear classifier of each region, and a vote of the regions (the lymphoma variant of HIPT)."""

    model_class: ClassVar[str] = "models.mil:FCMajority"

    in_dim: int = Field(default=192, gt=0, description="Width of a region's embedding.")
    n_classes: int = Field(default=2, gt=1, description="Classes.")
    aggregate: Literal["vote", "mean"] = Field(
        default="vote", description="vote: share of regions won by each class; mean: mean of their probabilities."
    )


class CLAMSBConfig(BagConfig):
    """CLAM with a single attention branch (Lu et al. 2021, arXiv 2004.09666)."""

    model_class: ClassVar[str] = "models.clam:CLAM"
    multi_branch: ClassVar[bool] = False

    n_classes: int = Field(default=2, gt=1, description="Classes.")
    embed_dim: int = Field(default=512, gt=0, description="Width of the layer before the attention.")
    attention_dim: int = Field(default=256, gt=0, description="Hidden width of the gated attention.")
    k_sample: int = Field(
        default=8, gt=0, description="Most and least attended instances that get a pseudo-label; at most half a bag."
    )
    instance_loss: Literal["svm", "ce"] = Field(
        default="svm", description="Loss of the pseudo-labels: smooth top-1 SVM or cross-entropy."
    )
    subtyping: bool = Field(
        default=False,
        description="Classes exclude each other in a slide: what one attends to most is taught to be no other.",
    )


class CLAMMBConfig(CLAMSBConfig):
    """CLAM with one attention branch and one linear output per class."""

    multi_branch: ClassVar[bool] = True
