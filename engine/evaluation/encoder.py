"""A frozen encoder of images, with the normalisation that its weights were trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.runtime import Runtime
from models import build_model, load_weights


@dataclass(frozen=True, slots=True)
class Encoder:
    """`embed` maps float [B, 3, height, width], normalised by mean and std, to float32 [B, D], on `device`.

    `facts` are what a result says of it: name, config, weights (digest or random), mean, std, mpp.
    """

    embed: Callable[[Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: str
    facts: dict[str, Any]


def open_encoder(
    name: str,
    config: Mapping[str, Any],
    weights: Path,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
) -> Encoder:
    """Build a model of `models.config`, in evaluation mode, float32, on the GPU where there is one.

    Args:
        weights: what `load_weights` reads, or the word random: drawn by the seed.
        mean, std: of the normalisation; None takes what is recorded with the weights.

    Raises:
        ValueError: weights that do not fit, or that state no normalisation where none is given.
    """
    torch.manual_seed(seed)
    model = build_model(name, **config)
    digest, mpp = "random", None
    if str(weights) != "random":
        info = load_weights(model, weights)
        digest, mpp = info.digest, info.mpp
        mean, std = (info.mean, info.std) if mean is None else (mean, std)
    if mean is None or std is None:
        raise ValueError(f"{weights} does not say how pixels are normalised: give mean and std")
    device = Runtime.detect("fp32").device
    model = model.eval().requires_grad_(False).to(device)
    # ViTTM's forward masks or classifies; HIPT's and timm's are the embedding.
    forward: Any = model.features if name.startswith("vittm") else model
    facts = {"name": name, "config": dict(config), "weights": digest, "mean": list(mean), "std": list(std), "mpp": mpp}

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        found: Tensor = forward(images)
        return found.float()

    return Encoder(embed, mean, std, device, facts)
