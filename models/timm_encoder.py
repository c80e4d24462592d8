"""timm's image encoders under our `build_model`: ResNet-50, ViT-B/16, UNI and its kind."""

from __future__ import annotations

from difflib import get_close_matches

import timm
from torch import nn

from models.hipt_config import TimmConfig


def build_encoder(config: TimmConfig) -> nn.Module:
    """timm's model of that name without a classifier: float [B, 3, height, width] to [B, features], random weights.

    Its state-dict keys are timm's, so that `load_weights` reads the file that a hub or torchvision gives out.

    Raises:
        ValueError: there is no such architecture, or it has no such setting.
    """
    name, known = config.architecture, timm.list_models()
    if not name.startswith("hf-hub:") and name.partition(".")[0] not in known:
        near = get_close_matches(name.partition(".")[0], known, n=3, cutoff=0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"timm has no architecture {name!r}{hint}; timm.list_models() lists all")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **config.settings)
    except TypeError as error:
        raise ValueError(f"timm's {name} refuses the settings {config.settings}: {error}") from None
    return model
