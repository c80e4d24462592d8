"""What slide-level models end with, and how their outputs are read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from models.heads import build_head, predictions
from models.hipt_config import HeadKind

PARITY = Path(__file__).parents[2] / "../shared/parity"


@pytest.mark.parametrize(
    ("kind", "outputs"), [("classification", 4), ("regression", 1), ("ordinal", 3), ("coral", 3), ("survival", 4)]
)
def test_a_head_has_the_outputs_of_its_kind(kind: HeadKind, outputs: int) -> None:
    assert build_head(kind, 8, 4)(torch.randn(2, 8)).shape == (2, outputs)


def test_coral_differs_between_grades_in_its_thresholds_only() -> None:
    head = build_head("coral", 8, 4)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == {
        "score.weight": (1, 8),
        "bias": (3,),
    }
    head.bias.data = torch.tensor([2.0, 0.0, -1.0])
    logits = head(torch.randn(5, 8))
    assert torch.allclose(logits - logits[:, 1:2], torch.tensor([2.0, 0.0, -1.0]).expand(5, 3), atol=1e-6)


def test_classes_are_the_most_probable_ones() -> None:
    found = predictions("classification", torch.tensor([[0.0, 2.0, 1.0]]), 3)
    assert found["class"].tolist() == [1]
    assert found["probabilities"].sum().item() == pytest.approx(1)


def test_values_are_rounded_to_grades_within_range() -> None:
    found = predictions("regression", torch.tensor([[-0.7], [1.4], [1.6], [9.0]]), 4)
    assert found["value"].shape == (4,)
    assert found["class"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["ordinal", "coral"])
def test_grades_are_counted_up_to_the_first_that_is_not_exceeded(kind: HeadKind) -> None:
    found = predictions(kind, torch.tensor([[-1.0, 3.0, 3.0], [1.0, -1.0, 3.0], [1.0, 1.0, 1.0]]), 4)
    assert found["class"].tolist() == [0, 1, 3]
    assert found["above"].shape == (3, 3)


def test_survival_is_the_product_of_what_no_interval_took() -> None:
    hazards = torch.tensor([[0.1, 0.5, 0.2]])
    found = predictions("survival", hazards.logit(), 3)
    assert torch.allclose(found["hazards"], hazards)
    assert torch.allclose(found["survival"], torch.tensor([[0.9, 0.45, 0.36]]))
    assert found["risk"].item() == pytest.approx(-1.71)


def test_survival_is_the_published_one() -> None:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    spec = importlib.util.spec_from_file_location("fill_hipt", PARITY / "fill_hipt.py")
    assert spec is not None
    assert spec.loader is not None
    formulas = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formulas)
    expected = np.load(PARITY / "hipt_slide.npz")
    found = predictions("survival", torch.from_numpy(formulas.normal("survlogits", (8, 4))), 4)
    for key in ("hazards", "survival", "risk"):
        assert np.abs(found[key].numpy() - expected[f"surv.{key}"]).max() < 1e-6
