"""The sum of two classifiers' losses, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from models.objectives.two_heads import two_head_loss


def outputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"memory_logits": torch.randn(3, 4), "process_logits": torch.randn(3, 4)}


def test_cross_entropy_is_summed_over_the_heads() -> None:
    labels = [2, 0, 3]
    expected = {}
    for stream in ("memory", "process"):
        rows = outputs()[f"{stream}_logits"].tolist()
        losses = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(rows, labels, strict=True)]
        expected[stream] = sum(losses) / 3
    values = two_head_loss(outputs(), torch.tensor(labels))
    assert values["memory_loss"].item() == pytest.approx(expected["memory"], abs=1e-6)
    assert values["process_loss"].item() == pytest.approx(expected["process"], abs=1e-6)
    assert values["loss"].item() == pytest.approx(expected["memory"] + expected["process"], abs=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_binary_cross_entropy_is_summed_over_classes(soft: bool) -> None:
    labels = torch.tensor([2, 0, 3])
    shares = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.05 if soft else torch.nn.functional.one_hot(labels, 4)
    expected = 0.0
    for logits in outputs().values():
        for row, target in zip(logits.tolist(), shares.tolist(), strict=True):
            for logit, share in zip(row, target, strict=True):
                p = 1 / (1 + math.exp(-logit))
                expected -= (share * math.log(p) + (1 - share) * math.log(1 - p)) / 3
    values = two_head_loss(outputs(), shares.float() if soft else labels, "bce")
    assert values["loss"].item() == pytest.approx(expected, abs=1e-5)
