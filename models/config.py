"""All models by name, each with a typed config. No torch here: recipes are checked before anything heavy is imported.

A config class names the module that implements it (`model_class`), so that `MODEL_CONFIGS` is the only list of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.hipt_config import (
    HIPT4KConfig,
    HIPTLocalGlobalConfig,
    HIPTNConfig,
    HIPTPatchConfig,
    HIPTRegionConfig,
    HIPTSlideConfig,
    TimmConfig,
)
from models.mil_config import ABMILConfig, CLAMMBConfig, CLAMSBConfig, DSMILConfig, FCMajorityConfig, PoolMILConfig
from models.model_config import ModelConfig, nearest
from models.vittm_config import ViTTMConfig, ViTTMHMRConfig, ViTTMMAEConfig

__all__ = [
    "MODEL_CONFIGS",
    "ABMILConfig",
    "CLAMMBConfig",
    "CLAMSBConfig",
    "DSMILConfig",
    "FCMajorityConfig",
    "HIPT4KConfig",
    "HIPTLocalGlobalConfig",
    "HIPTNConfig",
    "HIPTPatchConfig",
    "HIPTRegionConfig",
    "HIPTSlideConfig",
    "ModelConfig",
    "PoolMILConfig",
    "TimmConfig",
    "ViTTMConfig",
    "ViTTMHMRConfig",
    "ViTTMMAEConfig",
    "nearest",
    "resolve_config",
]

MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "hipt_patch": HIPTPatchConfig,
    "hipt_region": HIPTRegionConfig,
    "hipt_4k": HIPT4KConfig,
    "hipt_slide": HIPTSlideConfig,
    "hipt_local_global": HIPTLocalGlobalConfig,
    "hipt_n": HIPTNConfig,
    "timm": TimmConfig,
    "vittm_hmr": ViTTMHMRConfig,
    "vittm": ViTTMConfig,
    "vittm_mae": ViTTMMAEConfig,
    "abmil": ABMILConfig,
    "clam_sb": CLAMSBConfig,
    "clam_mb": CLAMMBConfig,
    "dsmil": DSMILConfig,
    "pool_mil": PoolMILConfig,
    "fc_majority": FCMajorityConfig,
}


def resolve_config(name: str, settings: Mapping[str, Any]) -> ModelConfig:
    """The checked config of the model `name`, without building it and without importing torch.

    Raises:
        ValueError: unknown model, unknown setting (the nearest known one is named) or a value that does not fit
            (pydantic's ValidationError is a ValueError).
    """
    if name not in MODEL_CONFIGS:
        raise ValueError(f"there is no model {name!r}; {nearest(name, list(MODEL_CONFIGS))}")
    return MODEL_CONFIGS[name].model_validate(dict(settings))
