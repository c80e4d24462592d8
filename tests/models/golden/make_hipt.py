"""Golden outputs and gradients of small HIPT models: `python tests/models/golden/make_hipt.py` writes hipt.npz.

Parameters and inputs are formulas of their names, so that the file holds results alone. It is written again only for a
change that is meant to change numbers.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import build_model

FILE = Path(__file__).with_name("hipt.npz")
VIT = {"dim": 32, "depth": 2, "heads": 2}
REGION = {**VIT, "in_dim": 32}
SLIDE = {"in_dim": 32, "dim": 32, "heads": 2, "n_classes": 4}
GRID = torch.tensor([[0, 0], [1, 0], [0, 2], [3, 2], [1, 1]])

# Case -> model, its config, names and shapes of its inputs, further arguments.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "patch": ("hipt_patch", VIT, {"x": (2, 3, 64, 48)}, {}),
    "patch_recomputed": ("hipt_patch", {**VIT, "pos_interpolation": "recomputed"}, {"x": (2, 3, 64, 48)}, {}),
    "patch_registers": ("hipt_patch", {**VIT, "register_tokens": 3}, {"x": (2, 3, 224, 224)}, {}),
    "region": ("hipt_region", REGION, {"x": (2, 32, 3, 5)}, {}),
    "region_mask": ("hipt_region", REGION, {"x": (1, 32, 2, 2)}, {"mask": torch.tensor([[True, False, True, True]])}),
    "4k": ("hipt_4k", {"patch": VIT, "region": REGION}, {"images": (2, 3, 300, 520)}, {}),
    "slide": ("hipt_slide", SLIDE, {"regions": (5, 32)}, {}),
    "slide_coral": ("hipt_slide", {**SLIDE, "head": "coral"}, {"regions": (5, 32)}, {}),
    "slide_sinusoid_1d": (
        "hipt_slide",
        {**SLIDE, "positions": "sinusoid_1d", "max_regions": 8},
        {"regions": (5, 32)},
        {},
    ),
    "slide_sinusoid_2d": (
        "hipt_slide",
        {**SLIDE, "positions": "sinusoid_2d"},
        {"regions": (5, 32)},
        {"coordinates": GRID},
    ),
    "slide_learned_2d": (
        "hipt_slide",
        {**SLIDE, "positions": "learned_2d", "max_grid": 4},
        {"regions": (5, 32)},
        {"coordinates": GRID},
    ),
    "local_global": ("hipt_local_global", {**SLIDE, "region": REGION}, {"regions": (5, 9, 32)}, {}),
    "n": ("hipt_n", {"in_dim": 32, "dim": 16, "n_classes": 3}, {"regions": (5, 9, 32)}, {}),
}


def normal(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that depend on nothing but the name."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).float()


def fill(model: nn.Module) -> None:
    """Every parameter by its name: around 1 for the weight of a norm, of unit gain for a matrix, around 0 elsewhere."""
    for name, parameter in model.named_parameters():
        value = normal(name, tuple(parameter.shape))
        if parameter.ndim > 1 and parameter.shape[0] > 1:
            value = value / parameter[0].numel() ** 0.5
        else:
            value = 0.1 * value + (1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0)
        parameter.data.copy_(value)


def measure(case: str) -> dict[str, np.ndarray]:
    """`out`, what the model gives, and `gradients` [parameters, 2], norm and sum of each, of a weighted sum of it."""
    name, config, inputs, arguments = CASES[case]
    model = build_model(name, **config).eval()
    fill(model)
    out = model(**{key: normal(f"{case}.{key}", shape) for key, shape in inputs.items()}, **arguments)
    (out * normal(f"{case}.out", tuple(out.shape))).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return {
        "out": out.detach().numpy(),
        "gradients": np.array([[g.norm().item(), g.sum().item()] for g in gradients if g is not None]),
    }


if __name__ == "__main__":
    results = {f"{case}.{key}": value for case in CASES for key, value in measure(case).items()}
    np.savez_compressed(FILE, **{key: value.astype(np.float32) for key, value in results.items()})
