"""The recipes: one frozen class per verb. What a key means stands here, once, and `engine VERB --keys` prints it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Recipe, Verbatim
from engine.data.store import is_url
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, CropView, Triple, dino_views
from engine.objective_recipes import DinoRecipe, OptimRecipe, Patterns, SupervisedRecipe
from engine.view_recipes import AugmentKeys, EctKeys, LocalityKeys
from sharding.plan import ShardOptions


def _as_text(value: Any) -> Any:
    if value == "":
        raise ValueError("it is empty")
    # In a recipe file `out: 2026` is YAML for a number; a path is text all the same.
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_place(value: Any) -> Any:
    """A URL stays the text it is: a path would lose one of its slashes."""
    text = _as_text(value)
    return Path(text) if isinstance(text, str) and not is_url(text) else text


def _as_places(value: Any) -> Any:
    """`A,B` is two places, unless there is one of that name; a single place stays one."""
    if isinstance(value, list | tuple):
        return tuple(as_place(part) for part in value)
    if isinstance(value, str) and "," in value and not Path(value).expanduser().exists():
        return tuple(as_place(part.strip()) for part in value.split(","))
    return as_place(value)


def _with_text_keys(value: Any) -> Any:
    """Labels may look like numbers or truth values."""
    return {str(key): part for key, part in value.items()} if isinstance(value, dict) else value


Place = Annotated[Path, BeforeValidator(_as_text), Verbatim()]
Places = Annotated[Path | str | tuple[Path | str, ...], BeforeValidator(_as_places), Verbatim()]
Text = Annotated[str, BeforeValidator(_as_text), Verbatim()]


class ShardRecipe(Recipe):
    """`engine shard`: slides to a dataset."""

    slides: Text = Field(description="folder (searched below too), glob, or CSV or TSV (path, slide_id, mpp, more)")
    out: Place = Field(description="folder of the dataset; made where it is missing")
    mpp: float | Literal["native"] = Field(0.5, description="spacing of the patches in um/px, or native: level 0 as is")
    context_px: int = Field(256, ge=16, le=8192, description="side of a stored patch")
    stride_px: int | None = Field(None, ge=16, description="step of the grid; context_px where it is left out")
    min_tissue: float = Field(0.5, ge=0, le=1, description="smallest share of tissue in a grid cell, or in a region")
    tissue: Literal["otsu", "clam"] = Field(
        "otsu", description="recipe of the tissue mask: Otsu's threshold on saturation, or CLAM's"
    )
    min_object_um2: float = Field(1000.0, ge=0, description="smaller pieces of tissue are dropped")
    max_hole_um2: float = Field(4000.0, ge=0, description="smaller holes in the tissue are filled")
    region_patches: int | None = Field(
        None, ge=2, le=256, description="side of a region in patches; null is no regions"
    )
    quality: int = Field(85, ge=1, le=100, description="JPEG quality of re-encoded patches (4:4:4)")
    optimize_huffman: bool = Field(True, description="optimised Huffman tables: smaller, slower to write")
    reader: Literal["auto", "cucim", "openslide"] = Field("auto", description="a named reader never falls back")
    routes: Literal["auto", "decode"] = Field("auto", description="auto copies a TIFF tile that is a patch, losslessly")
    check_tiles: bool = Field(True, description="decode each tile strictly before it is copied")
    patch_flags: bool = Field(True, description="flag white and blurred patches (not those copied unchecked)")
    max_bad_fraction: float = Field(0.5, ge=0, le=1, description="a slide with more damaged patches is quarantined")
    permute: Literal["group", "global", "slide"] = Field(
        "group", description="patches are shuffled within groups of slides, over all slides, or within each slide"
    )
    group_slides: int = Field(256, ge=1, description="slides in a group, at most")
    patches_per_shard: int = Field(4096, ge=1, description="patches in a shard, about")
    seed: int = Field(0, ge=0, lt=2**64, description="of groups, shards, their order, and the subset")
    subset: int | None = Field(
        None, ge=1, description="take this many slides, chosen at random by the seed; null is all"
    )
    barcodes: Literal["none", "tcga"] = Field(
        "none", description="columns patient_id, site, sample_type and label from the names of slides"
    )
    md5_manifest: Place | None = Field(None, description="GDC manifest or md5sum output to check slides by")
    plans: Place | None = Field(None, description="folder that keeps plans for later runs; a dry run fills it too")
    workers: int | Literal["auto"] = Field("auto", description="processes; auto is one per CPU core")

    @model_validator(mode="after")
    def _consistent(self) -> ShardRecipe:
        if isinstance(self.mpp, float) and not 0.01 <= self.mpp <= 100:
            raise ValueError(f"mpp={self.mpp:g}: expected um/px between 0.01 and 100, or native")
        if isinstance(self.workers, int) and self.workers < 1:
            raise ValueError(f"workers={self.workers}: expected 1 or more, or auto")
        stride = self.stride_px or self.context_px
        if stride > self.context_px or (self.context_px - stride) % 2:
            raise ValueError(
                f"context_px={self.context_px} with stride_px={stride}: expected stride_px <= context_px with an even "
                "difference, so that a window lies centred on its cell"
            )
        return self

    def options(self) -> ShardOptions:
        """The part that decides the dataset's bytes."""
        names = ShardOptions.__dataclass_fields__.keys() - {"mpp", "stride_px"}
        return ShardOptions(
            mpp=None if self.mpp == "native" else float(self.mpp),
            stride_px=self.stride_px or self.context_px,
            **{name: getattr(self, name) for name in names},
        )


class TrainRecipe(Recipe):
    """`engine train`: dataset to a run. `model.*` is checked against the model's own config."""

    dataset: Places = Field(description="folder or URL (s3://...) of a dataset of `engine shard`, or several as A,B")
    where: Annotated[Text | None, Verbatim()] = Field(
        None, description="SQL condition on columns of index.parquet and slides.parquet"
    )
    balance: Annotated[Text | None, Verbatim()] = Field(
        None, description="column of either table (class, slide, patient, site) whose values come equally often"
    )
    balance_weights: Annotated[dict[str, float] | None, BeforeValidator(_with_text_keys)] = Field(
        None, description="how often each value of balance comes, as {tumour: 2, normal: 1}; null is equally often"
    )
    locality: LocalityKeys = Field(
        None, description="true or its keys: read neighbouring samples together, for slow disks and object stores"
    )
    bad_samples: Literal["fail", "replace"] = Field(
        "fail", description="what a sample that cannot be read or decoded does; replaced ones are counted, exit code 3"
    )
    run: Place = Field(description="folder of the run; made where it is missing")
    model: Any = Field(description="name and keys of a config in models.config")
    objective: Literal["auto", "masked", "dino", "supervised"] = Field(
        "auto",
        description="auto is dino with views=dino, masked for models that mask, else supervised.label",
    )
    weights: Place | None = Field(
        None, description="file, run or checkpoint that the model starts from; null is random"
    )
    freeze: Patterns = Field((), description="patterns of names of parameters that do not learn, as [blocks.0.*]")
    steps: int = Field(ge=1, description="optimiser steps in all")
    batch_size: int = Field(64, ge=1, description="global, per optimiser step; divisible by the number of processes")
    views: Literal["crop", "twins", "dino"] = Field(
        "crop", description="of each sample: one crop, the same one twice, or DINO's large and small ones"
    )
    crop_px: int = Field(224, ge=16, description="what the model sees; not larger than the stored patch")
    flips: bool = Field(True, description="random horizontal and vertical flips")
    rotations: bool = Field(False, description="random turns by 0, 90, 180 or 270 degrees; views=dino always has them")
    ect: EctKeys = Field(
        None, description="true or its keys: extended-context translation, see `engine shard` context_px"
    )
    augment: AugmentKeys = Field(None, description="its keys; views=dino brings its own")
    dino: DinoRecipe = DinoRecipe()
    supervised: SupervisedRecipe = SupervisedRecipe()
    mean: Triple = Field(IMAGENET_MEAN, description="of red, green and blue in 0..1; images are (pixel - mean) / std")
    std: Triple = Field(IMAGENET_STD, description="of red, green and blue")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of process tokens that is masked")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, sample order, crops and masks")
    processes: int | Literal["auto"] = Field("auto", description="ranks; auto is one per visible GPU, else one")
    loader: Literal["auto", "dali", "torch"] = Field(
        "auto", description="auto is DALI where that gains; a named loader never falls back"
    )
    cache: Place | None = Field(
        None, description="folder on a local disk for what is read from an object store; null is below ~/.cache"
    )
    cache_gib: float = Field(16.0, ge=0, description="how much of the samples it keeps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto is bf16 on a GPU, fp32 on the CPU"
    )
    accumulate: int = Field(1, ge=1, description="parts that a rank's batch is computed in, one after the other")
    compile: bool = Field(False, description="torch.compile: slow to start, faster on a GPU")
    checkpoint_activations: bool = Field(False, description="compute blocks twice: less memory, more time")
    ema_momentum: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights too (ema.safetensors); null does not"
    )
    watch_every: int = Field(
        50,
        ge=1,
        description="steps between looks at the features (spread, RankMe), in steps that are logged",
    )
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; the last step always has one")
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="minutes without a checkpoint, at most, whatever the steps; null is no limit"
    )
    keep_last: int = Field(2, ge=1, description="the newest checkpoints, which stay; RUN/last is one")
    keep_every: int | None = Field(None, ge=1, description="steps between checkpoints that stay for good; null is none")
    best_of: Text | None = Field(
        "loss", description="number in metrics.jsonl whose mean between checkpoints makes RUN/best; null is no best"
    )
    best_is: Literal["smallest", "largest"] = Field("smallest", description="which mean is the best")
    watchdog_s: float | None = Field(
        600.0, ge=0, description="seconds without a finished step after which a run ends; 0 or null is never"
    )
    optim: OptimRecipe = OptimRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if isinstance(self.processes, int) and (self.processes < 1 or self.batch_size % self.processes):
            raise ValueError(
                f"batch_size={self.batch_size} with processes={self.processes}: expected a batch that divides evenly"
            )
        if self.balance_weights is not None and self.balance is None:
            raise ValueError("balance_weights without balance: name the column whose values they weight")
        if self.balance is not None and self.locality is not None:
            raise ValueError("balance and locality exclude each other: members of a class are not neighbours")
        if self.views == "dino" and (self.augment is not None or not self.flips):
            raise ValueError("views=dino brings its own flips and augmentations: leave out flips and augment")
        if self.views != "dino" and self.dino != DinoRecipe():
            raise ValueError(f"dino.* with views={self.views}: only views=dino has large and small crops")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate}: more parts than batch_size={self.batch_size} samples")
        self.crop_views()
        return self

    def crop_views(self) -> list[CropView]:
        """What the loader delivers of each sample."""
        mean, std, ect = self.mean, self.std, self.ect.made() if self.ect else None
        if self.views == "dino":
            return dino_views(self.crop_px, self.dino.small_px, ect=ect, mean=mean, std=std, **self.dino.view_options())
        augment = self.augment.made() if self.augment else None
        view = CropView(
            self.crop_px, flips=self.flips, rotations=self.rotations, ect=ect, augment=augment, mean=mean, std=std
        )
        return [view, replace(view, draws_of=0)] if self.views == "twins" else [view]

    @property
    def datasets(self) -> tuple[Path | str, ...]:
        """`dataset` as a tuple; the URLs among them are text."""
        return self.dataset if isinstance(self.dataset, tuple) else (self.dataset,)

    @property
    def cache_bytes(self) -> int:
        """`cache_gib` in bytes."""
        return int(self.cache_gib * 2**30)
