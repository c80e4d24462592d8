"""What tests of models share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

PARITY = Path(__file__).parents[2] / "../shared/parity"


@dataclass(frozen=True)
class Parity:
    """Published numbers, and the formulas that weights and inputs were made with."""

    param: Callable[..., np.ndarray]
    inp: Callable[..., np.ndarray]

    def fill(self, model: nn.Module, prefix: str = "") -> None:
        """Give every parameter its value by the name it has in the published code."""
        state = model.state_dict()
        model.load_state_dict({k: torch.from_numpy(self.param(prefix + k, v.shape)) for k, v in state.items()})

    def input(self, name: str, *shape: int) -> Tensor:
        return torch.from_numpy(self.inp(name, shape))

    def arrays(self, name: str) -> Any:
        return np.load(PARITY / f"{name}.npz")

    def keys(self, name: str) -> Any:
        """State-dict keys and shapes of every model in the file."""
        return json.loads((PARITY / f"keys_{name}.json").read_text())


@pytest.fixture(scope="session")
def vittm_parity() -> Parity:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    spec = importlib.util.spec_from_file_location("fill_vittm", PARITY / "fill_vittm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Parity(module.param, module.inp)
