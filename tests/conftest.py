"""The order of test files, and numbers of the published models, which lie beside the repository and not in it."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PARITY = Path(__file__).parents[1] / "../shared/parity"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first: where files run side by side, none of them is left alone at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


class Published:
    """Formulas that fill parameters and inputs, and the arrays that published code made of them."""

    def formulas(self, name: str) -> Any:
        """The module `name`: `param`, `normal`, `inp` and so on."""
        spec = importlib.util.spec_from_file_location(name, PARITY / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(PARITY / f"{name}.npz") as file:
            return dict(file)

    def keys(self, name: str) -> Any:
        return json.loads((PARITY / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def published() -> Published:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    return Published()
