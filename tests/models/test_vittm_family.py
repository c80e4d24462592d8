"""What holds for every model of the ViTTM family: no dead parameter, bf16 and compiled numbers close to plain ones."""

from __future__ import annotations

import shutil
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.config import MODEL_CONFIGS
from models.objectives.two_heads import two_head_loss

FAMILY = ("vittm", "vittm_hmr", "vittm_mae")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILY),
    ("vittm_hmr", {"target": "ema", "memory": "image"}),
    ("vittm_hmr", {"target": "pixels"}),
    ("vittm", {"memory_patch": 16, "process_patch": 32}),
]
SMALL: dict[str, dict[str, Any]] = {
    "vittm": {"img_size": 56, "dim": 32, "depth": 1, "heads": 2, "n_classes": 5},
    "vittm_hmr": {"img_size": 64, "memory_patch": 8, "process_patch": 16, "dim": 32, "depth": 2, "heads": 2},
    "vittm_mae": {
        **{"img_size": 56, "dim": 32, "depth": 1, "heads": 2},
        **{"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    },
}


def build(name: str, **config: Any) -> Any:
    """A model whose parameters are numbers drawn by their names."""
    model = build_model(name, **config)
    state = {}
    for key, value in model.state_dict().items():
        drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(value.shape)
        if value.ndim in (2, 4):
            drawn /= np.sqrt(np.prod(value.shape[1:]))
        else:
            drawn = 0.1 * drawn + (value.ndim == 1 and key.endswith("weight"))
        state[key] = torch.from_numpy(drawn).float()
    model.load_state_dict(state)
    return model


def images(model: nn.Module, batch: int = 2) -> Tensor:
    config: Any = model.config
    drawn = np.random.RandomState(7).standard_normal((batch, 3, config.img_size, config.img_size))
    return torch.from_numpy(drawn).float()


def loss(model: nn.Module, name: str) -> Tensor:
    if name == "vittm":
        return two_head_loss(model(images(model)), torch.tensor([0, 1]))["loss"]
    config: Any = model.config
    noise = torch.from_numpy(np.random.RandomState(8).random_sample((2, config.num_noise)))
    value: Tensor = model(images(model), noise=noise)["loss"]
    return value


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_every_parameter_of_every_default_model_gets_a_gradient(name: str, config: dict[str, Any]) -> None:
    model = build(name, **config)
    loss(model, name).backward()
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert [key for key, gradient in trained.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_bf16_features_point_where_float32_features_do(name: str, config: dict[str, Any]) -> None:
    model = build(name, **config).eval()
    with torch.no_grad():
        exact = model.features(images(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.features(images(model))
    assert not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(rough.float(), exact, dim=-1).min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vittm", "vittm_mae"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_model_gives_the_same_numbers(name: str) -> None:
    model = build(name, **SMALL[name])
    compiled: Any = torch.compile(model)
    with torch.no_grad():
        assert loss(compiled, name).item() == pytest.approx(loss(model, name).item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_model_gives_the_same_loss_and_gradients() -> None:
    model = build("vittm_hmr", **SMALL["vittm_hmr"])
    plain = loss(model, "vittm_hmr")
    plain.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled: Any = torch.compile(model)
    found = loss(compiled, "vittm_hmr")
    found.backward()
    assert found.item() == pytest.approx(plain.item(), abs=1e-5)
    for key, gradient in expected.items():
        assert torch.allclose(model.get_parameter(key).grad, gradient, atol=1e-5), key


def test_the_family_is_all_there_is() -> None:
    assert {name for name in MODEL_CONFIGS if name.startswith("vittm")} == set(FAMILY)
