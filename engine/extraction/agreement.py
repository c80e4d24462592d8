"""Do recipe, weights and patches agree? What an encoder is in the end, and why it is refused where they do not.

The same weights give other embeddings under another normalisation, spacing or position rule. What their metadata say
counts; a recipe that says otherwise is refused, unless its key `override` names the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from engine.config import UsageError, build
from engine.extract_recipe import RANDOM, ExtractRecipe, Output
from engine.weights import parse_normalisation
from models.config import MODEL_CONFIGS
from sharding.grid import SPACING_TOLERANCE
from sharding.index import read_meta

if TYPE_CHECKING:
    from models.weights_info import WeightsInfo

Triple = tuple[float, ...]
_HUB = "hf-hub:"
_CHECKPOINT = "model.safetensors"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """All that decides an embedding besides the patch. `weights` is a file, a name on the hub, or "random".

    `config` is the whole config of the model `name`. `any_positions`: the metadata's position rule is overridden.
    `side` is that of a region in patches (hipt_4k), `outputs` what is stored of it, the first as `embedding`.
    `batch_size` None is the device's own.
    """

    name: str
    config: dict[str, Any]
    weights: str
    region_weights: str | None
    seed: int
    mean: Triple
    std: Triple
    trained_mpp: float | None
    any_positions: bool
    any_spacing: bool
    patch_px: int
    input_px: int
    fit: Literal["exact", "crop", "resize"]
    outputs: tuple[Output, ...]
    partial: Literal["mask", "pad", "drop"]
    side: int | None
    intermediate: int | None
    precision: Literal["float32", "bfloat16"]
    batch_size: int | None

    def identity(self) -> dict[str, Any]:
        """What a store says of it: the part that is no path, and that other hardware or another run does not change."""
        values = asdict(self)
        for key in ("weights", "region_weights", "any_positions", "any_spacing", "batch_size", "patch_px"):
            del values[key]
        if self.weights != RANDOM:
            del values["seed"]
        if self.side is None:
            del values["outputs"], values["partial"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def agree(
    recipe: ExtractRecipe,
    *,
    patch_px: int,
    mpp: float | None,
    stride_px: int,
    region_patches: int | None,
    precision: Literal["float32", "bfloat16"],
) -> EncoderSpec:
    """The encoder that the recipe and its weights' metadata describe, for patches of `patch_px` px at `mpp` um/px.

    mpp: None where it differs by slide; `check_spacing` then judges each of them.

    Raises UsageError where they do not agree, or where neither says what must be known; ValueError and
    FileNotFoundError as `models.weights.read_checkpoint` does.
    """
    name = recipe.encoder["name"]
    given = {key: value for key, value in recipe.encoder.items() if key != "name"}
    weights = checkpoint_file(recipe.weights)
    region_weights = None if recipe.region_weights is None else checkpoint_file(recipe.region_weights)
    infos = [known_of(place) for place in (weights, region_weights) if place is not None and place != RANDOM]
    any_positions = "positions" in recipe.override
    resolved = resolved_config(name, given, infos, side_px=recipe.input_px or patch_px, any_positions=any_positions)
    if weights != RANDOM:
        _check_positions_known(name, given, infos)
    mean, std = _normalisation(recipe, infos)
    trained_mpp = _trained_mpp(recipe, infos)
    side = region_patches if name == "hipt_4k" else None
    spec = EncoderSpec(
        name=name,
        config=resolved,
        weights=weights,
        region_weights=region_weights,
        seed=recipe.seed,
        mean=mean,
        std=std,
        trained_mpp=trained_mpp,
        any_positions=any_positions,
        any_spacing="spacing" in recipe.override,
        patch_px=patch_px,
        input_px=recipe.input_px or patch_px,
        fit=recipe.fit,
        outputs=recipe.outputs,
        partial=recipe.regions.partial,
        side=side,
        intermediate=recipe.intermediate,
        precision=precision,
        batch_size=None if recipe.batch_size == "auto" else recipe.batch_size,
    )
    _check_patches(spec, stride_px)
    if mpp is not None and (reason := check_spacing(spec, mpp)):
        raise UsageError(f"{reason}; give patches of that spacing, or override=spacing.")
    return spec


def check_spacing(spec: EncoderSpec, mpp: float) -> str:
    """Why patches at `mpp` um/px are not what the encoder was trained on; empty where they are."""
    if spec.any_spacing or spec.trained_mpp is None or abs(mpp / spec.trained_mpp - 1) <= SPACING_TOLERANCE:
        return ""
    if math.isnan(mpp):
        return f"the spacing of the patches is unknown, and the encoder was trained at {spec.trained_mpp:g} um/px"
    return f"the patches have {mpp:g} um/px, and the encoder was trained at {spec.trained_mpp:g} um/px"


def checkpoint_file(place: str) -> str:
    """The checkpoint file of a file, a checkpoint folder or a run. Raises UsageError where there is none."""
    if place == RANDOM or place.startswith(_HUB):
        return place
    path = Path(place).expanduser().absolute()
    for found in (path / "last" / _CHECKPOINT, path / _CHECKPOINT):
        if found.is_file():
            return str(found.resolve())
    if path.is_dir():
        raise UsageError(f"weights={place}: the folder holds neither {_CHECKPOINT} nor last/{_CHECKPOINT}.")
    if not path.is_file():
        raise UsageError(f"weights={place}: there is no such file; give a checkpoint, or random.")
    return str(path)


def known_of(file: str) -> WeightsInfo:
    """What is known of weights: by their metadata, or by the recipe of the run that they are a checkpoint of."""
    from models.weights import read_checkpoint
    from models.weights_info import WeightsInfo, weights_digest

    found = read_checkpoint(file)
    if found.info is not None:
        return found.info
    info = WeightsInfo(weights_digest(found.state))
    saved = Path(file).parents[2] / "recipe.yaml" if len(Path(file).parents) > 2 else None
    if Path(file).name != _CHECKPOINT or saved is None or not saved.is_file():
        return info
    run = yaml.safe_load(saved.read_text(encoding="utf-8"))
    config = {key: value for key, value in run["model"].items() if key != "name"}
    known = replace(info, model=run["model"]["name"], config=config, mean=tuple(run["mean"]), std=tuple(run["std"]))
    return replace(known, mpp=_mpp_of_run(run))


def _mpp_of_run(run: Mapping[str, Any]) -> float | None:
    """The spacing of the dataset that a run was trained on; None where that is not here any more, or has several."""
    places = run["dataset"] if isinstance(run["dataset"], list) else [run["dataset"]]
    found = set()
    for place in places:
        try:
            found.add(read_meta(Path(place))["recipe"]["mpp"])
        except (ValueError, RuntimeError, OSError):
            return None
    mpp = found.pop() if len(found) == 1 else None
    return None if mpp == "native" else mpp


def resolved_config(
    name: str, given: dict[str, Any], infos: list[WeightsInfo], *, side_px: int, any_positions: bool = False
) -> dict[str, Any]:
    """The whole config of the model `name`: the recipe's keys, from the metadata those that it leaves out, defaults.

    side_px is the img_size of a model that has one, where nothing else says it. Raises UsageError where a key
    contradicts the metadata; `any_positions` excepts the position rule.
    """
    known: dict[str, Any] = {}
    parts = {"hipt_patch": "patch", "hipt_region": "region"} if name == "hipt_4k" else {}
    for info in infos:
        if info.model is None:
            continue
        if info.model not in (name, *parts):
            raise UsageError(f"encoder.name={name}: the weights are those of {info.model}, their metadata say.")
        known |= {parts[info.model]: info.config} if info.model in parts else info.config
    for key, value in given.items():
        free = key == "pos_interpolation" and any_positions
        if key in known and known[key] is not None and known[key] != value and not free:
            raise UsageError(
                f"encoder.{key}={value}: the weights' metadata say {known[key]}; leave the key out"
                f"{', or override=positions' if key == 'pos_interpolation' else ''}."
            )
    config = known | given
    if "img_size" in MODEL_CONFIGS[name].model_fields:
        config.setdefault("img_size", side_px)
    return build(MODEL_CONFIGS[name], config, prefix="encoder.").model_dump(mode="json")


def _check_positions_known(name: str, given: dict[str, Any], infos: list[WeightsInfo]) -> None:
    if name not in ("hipt_patch", "hipt_4k") or "pos_interpolation" in given:
        return
    if any(info.pos_interpolation is None for info in infos):
        raise UsageError(
            "the weights' metadata name no position rule; give encoder.pos_interpolation=given (the published HIPT "
            "weights) or recomputed."
        )


def _normalisation(recipe: ExtractRecipe, infos: list[WeightsInfo]) -> tuple[Triple, Triple]:
    stated = {(info.mean, info.std) for info in infos if info.mean is not None and info.std is not None}
    if len(stated) > 1:
        raise UsageError("weights and region_weights were trained with different normalisations, their metadata say.")
    found = next(iter(stated), None)
    if recipe.normalisation is None:
        if found is None or found[0] is None or found[1] is None:
            raise UsageError(
                "the weights' metadata state no normalisation; give it as normalisation=half | imagenet | none | "
                "R,G,B/R,G,B."
            )
        return found[0], found[1]
    mean, std = parse_normalisation(recipe.normalisation, "normalisation=")
    if found is not None and found != (mean, std) and "normalisation" not in recipe.override:
        raise UsageError(
            f"normalisation={recipe.normalisation}: the weights' metadata say mean {list(found[0] or ())}, std "
            f"{list(found[1] or ())}; leave the key out (normalisation=null), or override=normalisation."
        )
    return mean, std


def _trained_mpp(recipe: ExtractRecipe, infos: list[WeightsInfo]) -> float | None:
    stated = {info.mpp for info in infos if info.mpp is not None}
    for mpp in stated:
        known = recipe.trained_mpp or next(iter(stated))
        if abs(known / mpp - 1) > SPACING_TOLERANCE and "spacing" not in recipe.override:
            raise UsageError(
                f"trained_mpp={known:g}: the weights' metadata say {mpp:g} um/px; leave the key out "
                "(trained_mpp=null), or override=spacing."
            )
    if recipe.trained_mpp is None and not stated and recipe.weights != RANDOM and "spacing" not in recipe.override:
        raise UsageError("the weights' metadata state no spacing; give trained_mpp=0.5 (um/px), or override=spacing.")
    return recipe.trained_mpp or next(iter(stated), None)


def _check_patches(spec: EncoderSpec, stride_px: int) -> None:
    """Whether patches become inputs as the recipe says, and regions where the encoder needs them."""
    patch, wanted = spec.patch_px, spec.input_px
    if spec.fit == "exact" and patch != wanted:
        raise UsageError(
            f"the patches have {patch} px, and input_px={wanted}; say with fit=crop or fit=resize how they are made so."
        )
    if spec.fit == "crop" and patch < wanted:
        raise UsageError(f"the patches have {patch} px: fit=crop cuts no {wanted} px out of them; use fit=resize.")
    img_size = spec.config.get("img_size")
    if img_size is not None and img_size != wanted:
        raise UsageError(
            f"the encoder's img_size is {img_size}, and it would see {wanted} px; give input_px={img_size} and "
            "fit=crop or fit=resize."
        )
    if spec.name != "hipt_4k":
        return
    if spec.side is None:
        raise UsageError(
            "encoder.name=hipt_4k needs regions: a dataset of shard/regions4096, or slides with "
            "patches.region_patches=16."
        )
    if stride_px != patch:
        raise UsageError(
            f"the patches have {patch} px on a grid of {stride_px} px: regions need patches that lie edge to edge."
        )
