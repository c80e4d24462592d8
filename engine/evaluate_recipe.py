"""The recipe of `engine evaluate`: which features, which labels, which probe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Recipe, UsageError, Verbatim, build, nearest, typed
from engine.data.views import Triple
from engine.recipes import Place, Text
from models.config import MODEL_CONFIGS

ENCODERS = ("hipt_patch", "hipt_4k", "vittm_hmr", "vittm", "vittm_mae", "timm")


def _as_list(value: Any) -> Any:
    """One number is a list of one."""
    return value if isinstance(value, list | tuple) else (value,)


Positive = Annotated[float, Field(gt=0)]
Number = Annotated[int, Field(ge=1)]
Penalties = Annotated[tuple[Positive, ...], BeforeValidator(_as_list)]
Neighbours = Annotated[tuple[Number, ...], BeforeValidator(_as_list)]
OptionalText = Annotated[Text | None, Verbatim()]


class EvaluateRecipe(Recipe):
    """`engine evaluate`: frozen features and labels to metrics."""

    store: Place | None = Field(None, description="a store of `engine extract`")
    labels: Place | None = Field(
        None, description="CSV, TSV or Parquet of slide_id and label; null: label is a column of the store's rows"
    )
    label: Text = Field("label", description="column of the classes")
    on: Text = Field(
        "slide_id", description="columns that the labels are joined by, with commas: slide_id, sample_id, region, ..."
    )
    array: Text = Field("embedding", description="which array of the store")
    pool: Literal["none", "mean"] = Field(
        "none", description="none: each row of the store is a sample; mean: each slide is, with its mean embedding"
    )
    rows_per_slide: int | None = Field(
        None, ge=1, description="rows taken of a slide at most, at random by the seed; null is all"
    )
    group: OptionalText = Field(
        None,
        description="column whose values are never parted, and are what is resampled; null is patient_id or case_id "
        "where there is one, else slide_id",
    )
    split: OptionalText = Field(None, description="column of the labels that says train, val or test")
    splits: Place | None = Field(
        None,
        description="folder of splits_0.csv ... (columns train, val, test), such a file, or a CSV of slide_id, fold",
    )
    folds: int = Field(1, ge=1, description="without split and splits: k-fold by groups; 1 is a single split")
    test_fraction: float = Field(0.2, gt=0, le=0.5, description="of the groups, with folds=1")
    val_fraction: float = Field(
        0.2, gt=0, le=0.5, description="of the training groups, where there is something to choose and no val is given"
    )
    allow_leak: bool = Field(False, description="go on where a group is on two sides of a fold; the result lists them")
    missing: Literal["report", "fail"] = Field(
        "report", description="what slides do that lack a label or an embedding; the result names them"
    )
    probe: Literal["logistic", "adam", "knn"] = Field(
        "logistic", description="logistic regression; vittm-hmr's linear layer (5 epochs of Adam); nearest neighbours"
    )
    scale: Literal["none", "standard", "lda", "auto"] = Field(
        "standard",
        description="of the features, learnt in training: as they are, mean 0 and std 1, discriminants, or of these "
        "what the validation chooses",
    )
    c: Penalties = Field(
        (0.001, 0.01, 0.1, 1.0, 10.0, 100.0),
        description="of logistic: inverse of the L2 penalty; of several the validation chooses",
    )
    class_weight: Literal["none", "balanced"] = Field("none", description="of logistic")
    k: Neighbours = Field((20,), description="of knn: neighbours; of several the validation chooses, and all are told")
    votes: Literal["weighted", "uniform"] = Field(
        "weighted", description="of knn: cosine and exp(similarity / temperature), or Euclidean and one each"
    )
    temperature: float = Field(0.07, gt=0, description="of weighted votes")
    refit: bool = Field(True, description="fit what was chosen again, to train and val")
    pcam: Place | None = Field(None, description="folder of PatchCamelyon's h5 files, in place of a store")
    train_images: int | None = Field(None, ge=2, description="of pcam: the first so many; null is all")
    val_images: int | None = Field(None, ge=0, description="of pcam: the first so many; 0 reads no validation")
    test_images: int | None = Field(None, ge=1, description="of pcam: the first so many; null is all")
    resize_px: int = Field(256, ge=16, description="of pcam: side of what the encoder sees, bilinear from 96 px")
    mean: Triple | None = Field(None, description="of pcam: of red, green and blue in 0..1; null: as the weights say")
    std: Triple | None = Field(None, description="of pcam: of red, green and blue; null: as the weights say")
    encoder: Any = Field(None, description="of pcam: name and keys of a config in models.config")
    weights: Annotated[Place | None, Verbatim()] = Field(
        None, description="of pcam: a checkpoint of the encoder, a checkpoint or run of `engine train`, or random"
    )
    batch_size: int = Field(64, ge=1, description="of pcam: images that the encoder sees at a time")
    level: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    resamples: int = Field(1000, ge=2, description="of the bootstrap; its time grows with samples times resamples")
    seed: int = Field(0, ge=0, lt=2**32, description="of splits, sampled rows, the bootstrap, and random weights")
    out: Annotated[Place | None, Verbatim()] = Field(None, description="FILE.json for the result")
    predictions: Annotated[Place | None, Verbatim()] = Field(
        None, description="FILE.csv or FILE.parquet for label and probabilities of each tested sample"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateRecipe:
        if (self.store is None) == (self.pcam is None):
            raise ValueError("give either store=STORE or pcam=FOLDER")
        if self.pcam is not None:
            for name in ("labels", "split", "splits", "group"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} with pcam: its files say what is which")
            if self.folds != 1:
                raise ValueError(f"folds={self.folds} with pcam: its splits are given")
        else:
            for name in ("encoder", "weights", "train_images", "val_images", "test_images", "mean", "std"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is a key of pcam; the features of a store are made already")
        if self.split is not None and self.splits is not None:
            raise ValueError("split and splits exclude each other: give the column or the files")
        if (self.split is not None or self.splits is not None) and self.folds != 1:
            raise ValueError(f"folds={self.folds} with given splits: leave it out")
        if self.split is not None and self.labels is None:
            raise ValueError("split is a column of the labels: give labels=FILE.csv")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both or none")
        for name in ("c", "k"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)}: expected one or several different numbers")
        for name, pattern in (("out", r".*\.json"), ("predictions", r".*\.(csv|parquet)")):
            path = getattr(self, name)
            if path is not None and not re.fullmatch(pattern, path.name):
                raise ValueError(
                    f"{name}={path}: expected a name that ends in {'.json' if name == 'out' else '.csv or .parquet'}"
                )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """`on` as a tuple."""
        return tuple(part.strip() for part in self.on.split(","))

    @property
    def protocol(self) -> str:
        """One word for what is done: linear, knn, slide_linear, slide_knn, pcam_linear or pcam_knn."""
        source = "pcam_" if self.pcam is not None else "slide_" if self.pool == "mean" else ""
        return f"{source}{'knn' if self.probe == 'knn' else 'linear'}"


def build_evaluate_recipe(values: dict[str, Any]) -> EvaluateRecipe:
    """Validate an evaluate recipe; of `encoder.*` the keys alone, as the weights' metadata may add to them."""
    recipe = build(EvaluateRecipe, values)
    if recipe.pcam is None:
        return recipe
    encoder = typed(EvaluateRecipe, values).get("encoder")
    if not isinstance(encoder, dict) or "name" not in encoder:
        raise UsageError("the key 'encoder.name' is missing: give it as encoder.name=hipt_patch.")
    if recipe.weights is None:
        raise UsageError("the key 'weights' is missing: give a checkpoint, or weights=random to see what chance gives.")
    if recipe.mean is None and str(recipe.weights) == "random":
        raise UsageError("weights=random state no normalisation: give mean and std.")
    name = encoder["name"]
    if name not in ENCODERS:
        raise UsageError(f"encoder.name={name}: there is no such encoder of images{nearest(str(name), list(ENCODERS))}")
    config = MODEL_CONFIGS[name]
    options = {key: value for key, value in encoder.items() if key != "name"}
    for key in options:
        if key not in config.model_fields:
            raise UsageError(f"unknown key 'encoder.{key}'{nearest(str(key), list(config.model_fields))}")
    return recipe.model_copy(update={"encoder": {"name": name, **options}})
