"""Models: tensors in, tensors out. Nothing here knows slides, shards, recipes or GPUs.

    model = build_model("vittm_hmr", img_size=256, dim=384)
    load_weights(model, Path("model.safetensors"))

Importing this package or `models.config` does not import torch, so that a recipe can be checked, and the command line
can answer, in milliseconds. torch is imported when a model is built.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.config import MODEL_CONFIGS, resolve_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from models.weights_info import WeightsInfo

__all__ = ["MODEL_CONFIGS", "build_model", "load_weights", "resolve_config"]


def build_model(name: str, /, **config: Any) -> nn.Module:
    """Build the model `name` with freshly drawn weights (torch's global generator) on the CPU, in float32.

    Args:
        name: a key of `MODEL_CONFIGS`.
        config: fields of that model's config class; those left out take its defaults.

    Raises:
        ValueError: unknown model, unknown setting (the nearest known one is named) or a value that does not fit.
    """
    parsed = resolve_config(name, config)
    module, _, class_name = parsed.model_class.partition(":")
    model: nn.Module = getattr(import_module(module), class_name)(parsed)
    return model


def load_weights(model: nn.Module, path: Path | str) -> WeightsInfo:
    """Load a published or saved checkpoint into `model`, in place; see `models.weights.load_weights`."""
    from models.weights import load_weights as load

    return load(model, path)
