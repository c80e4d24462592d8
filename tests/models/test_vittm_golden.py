"""Outputs and gradients of small instances of the ViTTM family stay what they were.

python tests/models/test_vittm_golden.py      writes golden/vittm.npz anew, after a change that was meant
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.objectives.two_heads import two_head_loss

GOLDEN = Path(__file__).parent / "golden" / "vittm.npz"

_HMR: dict[str, Any] = {"img_size": 64, "memory_patch": 8, "process_patch": 16, "dim": 32, "depth": 2, "heads": 2}
_MAE: dict[str, Any] = {**_HMR, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
_PAPER: dict[str, Any] = {"img_size": 64, "memory_patch": 16, "process_patch": 32, "dim": 32, "depth": 2, "heads": 2}
_PAPER["n_classes"] = 5
INSTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    "hmr_original": ("vittm_hmr", {**_HMR, "preset": "original"}),
    "hmr": ("vittm_hmr", _HMR),
    "hmr_image": ("vittm_hmr", {**_HMR, "memory": "image"}),
    "hmr_ema": ("vittm_hmr", {**_HMR, "target": "ema"}),
    "hmr_pixels": ("vittm_hmr", {**_HMR, "target": "pixels"}),
    **{f"paper_{kind}": ("vittm", {**_PAPER, "read_write": kind}) for kind in ("lin", "ca", "lca", "la", "tl")},
    "paper_28_28": ("vittm", {**_PAPER, "img_size": 56, "memory_patch": 28, "process_patch": 28}),
    "paper_erase": ("vittm", {**_PAPER, "fusion": "erase"}),
    "paper_add_erase": ("vittm", {**_PAPER, "fusion": "add_erase"}),
    "paper_mlp": ("vittm", {**_PAPER, "memory_mlp_ratio": 0.5}),
    "mae": ("vittm_mae", _MAE),
    "mae_independent": ("vittm_mae", {**_MAE, "mask": "independent"}),
}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that depend on the name alone."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).float()


def fill(model: nn.Module) -> None:
    """Weights of about the size that keeps activations near one, gains near one, small biases."""
    state = {}
    for key, value in model.state_dict().items():
        spread = value[0].numel() ** -0.5 if value.ndim in (2, 4) else 0.3
        state[key] = spread * draw(key, tuple(value.shape)) + float(value.ndim == 1 and key.endswith("weight"))
    model.load_state_dict(state)


def measure(instance: str) -> dict[str, npt.NDArray[np.float32]]:
    """Every output (a few rows and columns of it), the features, and the norm of every parameter's gradient."""
    name, config = INSTANCES[instance]
    model: Any = build_model(name, **config)
    fill(model)
    images = draw("images", (2, 3, config["img_size"], config["img_size"]))
    if name == "vittm":
        out = model(images)
        out |= two_head_loss(out, torch.tensor([0, 3]))
    else:
        out = model(images, noise=draw("noise", (2, model.config.num_noise)))
    out["loss"].backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in model.parameters()]
    found = {key: value[:, ::7, :9] if value.ndim == 3 else value for key, value in out.items()}
    found |= {"features": model.features(images), "gradients": torch.stack(gradients)}
    return {key: value.detach().numpy() for key, value in found.items()}


@pytest.mark.parametrize("instance", INSTANCES)
def test_outputs_and_gradients_are_what_they_were(instance: str) -> None:
    with np.load(GOLDEN) as golden:
        expected = {key.partition("/")[2]: golden[key] for key in golden.files if key.split("/")[0] == instance}
    found = measure(instance)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


if __name__ == "__main__":
    arrays = {f"{instance}/{key}": value for instance in INSTANCES for key, value in measure(instance).items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
