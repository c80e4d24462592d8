"""From keys to a train recipe whose parts fit together: model, objective, views."""

from __future__ import annotations

from typing import Any

from engine.config import UsageError, build, nearest, typed
from engine.recipes import TrainRecipe
from models.config import MODEL_CONFIGS, ModelConfig

# Models of one image to one vector: what DINO and a classifier are put on.
ENCODERS = ("hipt_patch", "timm")


def build_train_recipe(values: dict[str, Any]) -> TrainRecipe:
    """Validate a train recipe, `model.*` against the named model's config; `objective` becomes the one that is meant.

    A model that has an img_size takes crop_px for it. Raises UsageError.
    """
    values = typed(TrainRecipe, values)
    name, options = _model_keys(values)
    config_class = MODEL_CONFIGS[name]
    if "img_size" in config_class.model_fields:
        crop_px = values.get("crop_px", TrainRecipe.model_fields["crop_px"].default)
        if options.setdefault("img_size", crop_px) != crop_px:
            raise UsageError(
                f"model.img_size={options['img_size']} with crop_px={crop_px}: the model sees the crop, so they are "
                "equal."
            )
    known = list(config_class.model_fields)
    for key in options:
        if key not in known:
            raise UsageError(f"unknown key 'model.{key}'{nearest(str(key), known)}")
    recipe = build(TrainRecipe, values)
    config = build(config_class, options, prefix="model.")
    objective = _objective(recipe, name, config)
    resolved = {"name": name, **config.model_dump(mode="json")}
    return recipe.model_copy(update={"model": resolved, "objective": objective})


def _model_keys(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    model = values.get("model")
    if not isinstance(model, dict) or "name" not in model:
        raise UsageError("the key 'model.name' is missing: give it as model.name=vittm_hmr.")
    name = model["name"]
    if name not in MODEL_CONFIGS:
        raise UsageError(f"model.name={name}: there is no such model{nearest(str(name), list(MODEL_CONFIGS))}")
    return name, {key: value for key, value in model.items() if key != "name"}


def _objective(recipe: TrainRecipe, name: str, config: ModelConfig) -> str:
    """The objective that is meant, once it fits model and views."""
    masks = hasattr(config, "num_noise")
    asked = recipe.objective
    if asked == "auto":
        if recipe.views == "dino" and not masks:
            asked = "dino"
        elif masks:
            asked = "masked"
        elif recipe.supervised.label is not None:
            asked = "supervised"
        else:
            raise UsageError(
                f"model.name={name}: it is unclear what to train it for; give views=dino or objective=dino for "
                "self-supervision, or supervised.label=COLUMN for classification."
            )
    if (recipe.views == "dino") != (asked == "dino"):
        raise UsageError(f"views={recipe.views} with objective={asked}: views=dino and objective=dino go together.")
    if asked == "masked" and not masks:
        raise UsageError(f"objective=masked with model.name={name}: it does not mask; vittm_hmr and vittm_mae do.")
    if asked == "dino" and name not in ENCODERS:
        raise UsageError(f"objective=dino with model.name={name}: expected one of {', '.join(ENCODERS)}.")
    if asked == "dino" and recipe.ema_momentum is not None:
        raise UsageError("ema_momentum with objective=dino: its teacher is that average already.")
    if asked == "supervised":
        _check_supervised(recipe, name)
    if asked == "masked" and int(config.num_process * (1 - recipe.mask_ratio)) < 1:  # type: ignore[attr-defined]
        raise UsageError(
            f"mask_ratio={recipe.mask_ratio:g} leaves none of {config.num_process} process tokens "  # type: ignore[attr-defined]
            "visible; lower it."
        )
    return asked


def _check_supervised(recipe: TrainRecipe, name: str) -> None:
    if name not in (*ENCODERS, "vittm"):
        raise UsageError(f"objective=supervised with model.name={name}: expected vittm or {', '.join(ENCODERS)}.")
    keys = recipe.supervised
    if keys.label is None:
        raise UsageError("objective=supervised needs supervised.label: the column that holds the classes.")
    if keys.focal_gamma and (keys.loss == "bce" or name == "vittm"):
        raise UsageError("supervised.focal_gamma: only for supervised.loss=ce of a model with one classifier.")
    if keys.label_smoothing and keys.loss == "bce":
        raise UsageError("supervised.label_smoothing: only for supervised.loss=ce.")
