"""The recipe of `engine extract`. What a key means stands here, once, and `engine extract --keys` prints it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Recipe, UsageError, Verbatim, build, nearest, typed
from engine.recipes import Place, ShardRecipe, Text, as_place
from models.config import MODEL_CONFIGS

ENCODERS = ("hipt_patch", "hipt_4k", "timm", "vittm", "vittm_hmr")
Output = Literal["local", "global", "mean256", "concat"]
RANDOM = "random"


def _as_list(value: Any) -> Any:
    """`A` is a list of one, `A,B` of two."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class PatchKeys(Recipe):
    """Which patches slides give: keys of `engine shard`, with their defaults."""

    mpp: float | Literal["native"] = Field(0.5, description="spacing of the patches in um/px, or native")
    context_px: int = Field(256, ge=16, le=8192, description="side of a patch")
    stride_px: int | None = Field(None, ge=16, description="step of the grid; context_px where it is left out")
    min_tissue: float = Field(0.5, ge=0, le=1, description="smallest share of tissue in a grid cell, or in a region")
    tissue: Literal["otsu", "clam"] = Field("otsu", description="recipe of the tissue mask")
    min_object_um2: float = Field(1000.0, ge=0, description="smaller pieces of tissue are dropped")
    max_hole_um2: float = Field(4000.0, ge=0, description="smaller holes in the tissue are filled")
    region_patches: int | None = Field(None, ge=2, le=256, description="side of a region in patches")
    reader: Literal["auto", "cucim", "openslide"] = Field("auto", description="a named reader never falls back")
    max_bad_fraction: float = Field(0.5, ge=0, le=1, description="a slide with more damaged patches is quarantined")


class RegionRule(Recipe):
    """What becomes of regions that lack patches; only hipt_4k looks at regions."""

    partial: Literal["mask", "pad", "drop"] = Field(
        "mask",
        description="mask: nobody attends to what is missing, its embedding is 0; pad: it is white; drop: the region "
        "is left out",
    )


class ExtractRecipe(Recipe):
    """`engine extract`: dataset or slides to a store. `encoder.*` is checked against the encoder's own config."""

    dataset: Annotated[Any, BeforeValidator(as_place), Verbatim()] = Field(
        None, description="folder or URL (s3://...) of a dataset of `engine shard`; this or slides"
    )
    slides: Text | None = Field(None, description="folder, glob, CSV or TSV of slides that are read as they are")
    patches: PatchKeys = PatchKeys()
    out: Place = Field(description="folder of the store; made where it is missing")
    encoder: Any = Field(description="name and keys of a config in models.config")
    weights: Text = Field(
        description="a checkpoint (.safetensors, .pth ...), a checkpoint or run of `engine train`, or random, by seed"
    )
    region_weights: Text | None = Field(
        None, description="hipt_4k: the region ViT's, where weights are the patch ViT's alone"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of random weights")
    normalisation: Text | None = Field(
        None, description="half | imagenet | none | R,G,B/R,G,B (mean/std); null: what the weights' metadata say"
    )
    trained_mpp: float | None = Field(
        None, gt=0, description="spacing the encoder was trained at, um/px; null: what the weights' metadata say"
    )
    override: Annotated[tuple[Literal["normalisation", "spacing", "positions"], ...], BeforeValidator(_as_list)] = (
        Field((), description="where this recipe is right and the weights' metadata (or the patches' spacing) is not")
    )
    input_px: int | None = Field(None, ge=16, description="what the encoder sees; null is the patch's own side")
    fit: Literal["exact", "crop", "resize"] = Field(
        "exact", description="how patches of another side are made input_px: refused, cut from the centre, or resized"
    )
    outputs: Annotated[tuple[Output, ...], BeforeValidator(_as_list)] = Field(
        (),
        description="hipt_4k: local [M,256,384], global [M,192], mean256 [M,384], concat [M,576] (global and mean256); "
        "the first becomes the array `embedding`, others keep their names",
    )
    regions: RegionRule = RegionRule()
    intermediate: int | None = Field(
        None, ge=0, description="timm: embed by the mean over places of this stage's output; resnet50's 3 is CLAM's"
    )
    batch_size: int | Literal["auto"] = Field(
        "auto", description="patches that go through the encoder together; auto is 256 on a GPU, 16 on the CPU"
    )
    workers: int | Literal["auto"] = Field("auto", description="auto is one per GPU, else one per cores_per_worker")
    cores_per_worker: int | Literal["auto"] = Field(
        "auto", description="CPU cores of a worker; auto is 4 or what there is, with GPUs an equal share of all"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto is bf16 on a GPU, fp32 on the CPU")
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored embeddings")

    @model_validator(mode="after")
    def _consistent(self) -> ExtractRecipe:
        if (self.dataset is None) == (self.slides is None):
            raise ValueError("give either dataset=DATASET or slides=SLIDES, and not both")
        for name in ("batch_size", "workers", "cores_per_worker"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, or auto")
        if self.fit != "exact" and self.input_px is None:
            raise ValueError(f"fit={self.fit} without input_px: give the side that the encoder sees")
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"outputs={list(self.outputs)}: give each output once")
        if self.slides is not None:
            self.shard_recipe()
        return self

    def shard_recipe(self) -> ShardRecipe:
        """The recipe that would shard the slides as they are read here."""
        return ShardRecipe(slides=self.slides or "", out=self.out, **dict(self.patches))


def build_extract_recipe(values: dict[str, Any]) -> ExtractRecipe:
    """Validate an extract recipe; of `encoder.*` the keys alone, as the weights' metadata may add to them.

    Raises UsageError in one sentence; nothing is opened and torch is not imported.
    """
    values = typed(ExtractRecipe, values)
    encoder = values.get("encoder")
    if not isinstance(encoder, dict) or "name" not in encoder:
        raise UsageError("the key 'encoder.name' is missing: give it as encoder.name=hipt_patch.")
    name = encoder["name"]
    if name not in ENCODERS:
        raise UsageError(f"encoder.name={name}: there is no such encoder{nearest(str(name), list(ENCODERS))}")
    options = {key: value for key, value in encoder.items() if key != "name"}
    known = list(MODEL_CONFIGS[name].model_fields)
    for key in options:
        if key not in known:
            raise UsageError(f"unknown key 'encoder.{key}'{nearest(str(key), known)}")
    if values.get("weights") is None:
        raise UsageError(
            "the key 'weights' is missing: give it as weights=FILE, or weights=random where random features are meant."
        )
    recipe = build(ExtractRecipe, values)
    _check_encoder_keys(recipe, name)
    return recipe.model_copy(update={"encoder": {"name": name, **options}})


def _check_encoder_keys(recipe: ExtractRecipe, name: str) -> None:
    if name == "hipt_4k":
        if recipe.fit == "crop":
            raise UsageError("fit=crop with encoder.name=hipt_4k: patches of a region lie edge to edge; use resize.")
        if not recipe.outputs:
            raise UsageError("the key 'outputs' is missing: give it as outputs=global or outputs='[local, global]'.")
        return
    for key, value, owner in (
        ("outputs", recipe.outputs, "hipt_4k"),
        ("region_weights", recipe.region_weights, "hipt_4k"),
        ("intermediate", recipe.intermediate if name != "timm" else None, "timm"),
    ):
        if value not in (None, ()):
            raise UsageError(f"{key} with encoder.name={name}: only {owner} has that choice; leave it out.")
