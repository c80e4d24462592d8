"""Small stores of embeddings whose classes a probe can find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.stores import begin_store, finish_store, write_slide


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    """Write a store of {slide_id: arrays}; rows have sample_id, region and a label of their own."""

    def write(path: Path, slides: dict[str, dict[str, np.ndarray]], labels: dict[str, list[str]] | None = None) -> Path:
        begin_store(path, {"encoder": "drawn", "dtype": "float32"})
        for number, (slide_id, arrays) in enumerate(slides.items()):
            count = len(arrays["embedding"])
            columns: dict[str, Any] = {
                "sample_id": pa.array(np.arange(count, dtype=np.uint64) + 100 * number),
                "region": pa.array(np.arange(count) // 2),
            }
            if labels is not None:
                columns["tissue"] = labels[slide_id]
            xy0 = np.zeros((count, 2), np.int32)
            write_slide(path, slide_id, {"xy0": xy0, **arrays}, pa.table(columns), {})
        finish_store(path)
        return path

    return write


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> tuple[Path, Path]:
    """(store, labels.csv): 40 slides of 20 patients in classes a, b and c, 3 to 6 embeddings [8] each, well apart.

    Slide s.07 has no label, and the label of slide ghost no embedding.
    """
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    slides, lines = {}, ["slide_id,patient_id,label"]
    for number in range(40):
        label = number // 2 % 3
        x = rng.normal(size=(3 + number % 4, 8))
        x[:, label] += 2.5
        slides[f"s.{number:02d}"] = {"embedding": x.astype(np.float32)}
        if number != 7:
            lines.append(f"s.{number:02d},p{number // 2},{'abc'[label]}")
    (folder / "labels.csv").write_text("\n".join([*lines, "ghost,p0,a"]) + "\n")
    return write_store(folder / "store", slides), folder / "labels.csv"
