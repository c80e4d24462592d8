"""Model configs: checked without torch, and refused in sentences that say what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from models.config import MODEL_CONFIGS, ViTTMHMRConfig, resolve_config


def test_importing_models_imports_no_torch() -> None:
    code = (
        "import sys, models, models.config; print([m for m in ('torch', 'ray', 'timm', 'einops') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_every_field_is_described_and_the_config_survives_json(name: str) -> None:
    config_class = MODEL_CONFIGS[name]
    assert all(field.description for field in config_class.model_fields.values())
    fields = config_class.model_fields.items()
    required = {key: "resnet50" if field.annotation is str else 2 for key, field in fields if field.is_required()}
    config = config_class.model_validate(required)
    assert config_class.model_validate(json.loads(config.model_dump_json())) == config


def test_an_unknown_model_names_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"no model 'vitm_hmr'; did you mean 'vittm_hmr'\?"):
        resolve_config("vitm_hmr", {})


def test_an_unknown_setting_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"no setting 'memory_pach'; did you mean 'memory_patch'\?"):
        resolve_config("vittm_hmr", {"memory_pach": 16})


def test_a_config_is_frozen() -> None:
    config = ViTTMHMRConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.dim = 64  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"img_size": 250}, "img_size must be a multiple of memory_patch: found 250 and 16"),
        ({"img_size": 240}, "img_size must be a multiple of process_patch: found 240 and 64"),
        ({"img_size": 192, "process_patch": 24}, "process_patch must be a multiple of memory_patch.*found 24 and 16"),
        ({"heads": 5}, "dim must be a multiple of heads: found 384 and 5"),
        ({"dim": 48, "heads": 4}, "dim must be a multiple of 32.*found 48"),
        ({"mlp_ratio": 1.01}, "mlp_ratio \\* dim must be whole: found 1.01 \\* 384"),
        ({"depth": 0}, "greater than 0"),
        ({"target": "resnet"}, "random_projection"),
        ({"preset": "original", "slots": 64}, "fixes slots at 256: found 64"),
        ({"memory": "image", "slots": 100}, "one slot per memory patch, 256: found slots=100; leave slots out"),
        ({"ema_momentum": 1.5}, "less than or equal to 1"),
        ({"preset": "original", "memory": "image"}, "fixes memory at 'bank': found 'image'"),
        ({"preset": "original", "target": "ema"}, "fixes target at 'random_projection': found 'ema'"),
        ({"preset": "original", "target": "pixels"}, "fixes target at 'random_projection': found 'pixels'"),
        ({"preset": "original", "target_norm": "image"}, "fixes target_norm at 'none': found 'image'"),
        ({"preset": "original", "loss_on": "hidden"}, "fixes loss_on at 'all': found 'hidden'"),
        ({"loss_on": "visible"}, "loss_on"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_config("vittm_hmr", settings)


def test_sizes_follow_from_the_config() -> None:
    config = ViTTMHMRConfig(img_size=224, process_patch=32)
    assert (config.ratio, config.process_grid, config.num_process, config.num_targets) == (2, 7, 49, 196)
    assert config.resolved_slots == 196
    assert ViTTMHMRConfig(slots=10).resolved_slots == 10
    assert ViTTMHMRConfig(preset="original", img_size=128).resolved_slots == 256
    assert ViTTMHMRConfig(target="pixels").target_dim == 3 * 16 * 16


def test_the_loss_counts_hidden_positions_where_nothing_else_is_said() -> None:
    assert ViTTMHMRConfig().resolved_loss_on == "hidden"
    assert ViTTMHMRConfig(loss_on="all").resolved_loss_on == "all"
    assert ViTTMHMRConfig(preset="original").resolved_loss_on == "all"


def test_target_normalisation_follows_the_target_and_the_preset() -> None:
    assert ViTTMHMRConfig().resolved_target_norm == "batch"
    assert ViTTMHMRConfig(target="pixels").resolved_target_norm == "patch"
    assert ViTTMHMRConfig(target="ema").resolved_target_norm == "batch"
    assert ViTTMHMRConfig(target="pixels", target_norm="image").resolved_target_norm == "image"
    assert ViTTMHMRConfig(preset="original").resolved_target_norm == "none"
