"""Hierarchical masked reconstruction: masks and targets by hand, the loss and its baselines against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.objectives.hmr import (
    checked_noise,
    constant_cosine,
    masked_targets,
    masked_tokens,
    negative_cosine,
    normalise_targets,
    pixel_targets,
)


def test_the_tokens_of_smallest_noise_stay_visible() -> None:
    hidden = masked_tokens(torch.tensor([[0.4, 0.1, 0.3, 0.2]]), 0.5)
    assert hidden.tolist() == [[True, False, True, False]]


def test_a_hidden_token_hides_the_memory_patches_it_covers() -> None:
    grid = masked_targets(torch.tensor([[True, False, False, True]]), 2).view(4, 4)
    assert grid.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_pixel_targets_are_row_major_patches() -> None:
    image = torch.arange(3 * 4 * 4.0).view(1, 3, 4, 4)
    patches = pixel_targets(image, 2)
    assert patches.shape == (1, 4, 12)
    assert patches[0, 1].tolist() == image[0, :, :2, 2:].flatten().tolist()


@pytest.mark.parametrize(("over", "axis"), [("batch", (0, 1)), ("image", (1,)), ("patch", (2,))])
def test_normalised_targets_are_centred_and_scaled_over_the_named_axis(over: Any, axis: tuple[int, ...]) -> None:
    target = normalise_targets(3 + 2 * torch.randn(4, 9, 16), over)
    assert torch.allclose(target.mean(dim=axis), torch.zeros(()), atol=1e-5)
    assert torch.allclose(target.square().mean(dim=axis), torch.ones(()), atol=1e-4)


def test_constant_cosine_is_what_the_best_constant_scores() -> None:
    torch.manual_seed(0)
    target = torch.randn(3, 8, 5) + 0.5
    where = masked_tokens(torch.rand(3, 8), 0.5)
    best = torch.nn.functional.normalize(target, dim=-1)[where].mean(dim=0)
    scored = -negative_cosine(best.expand_as(target), target, where)
    assert torch.allclose(constant_cosine(target, where), scored, atol=1e-6)
    others = [-negative_cosine(torch.randn(5).expand_as(target), target, where) for _ in range(50)]
    assert max(others) < scored
    assert constant_cosine(target, where, per="image") > scored


def plain_cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_is_minus_the_mean_cosine_of_the_positions_that_count(masked: bool) -> None:
    torch.manual_seed(1)
    prediction, target = torch.randn(3, 8, 5, requires_grad=True), torch.randn(3, 8, 5)
    where = masked_tokens(torch.rand(3, 8), 0.5) if masked else None
    counted = [(b, t) for b in range(3) for t in range(8) if where is None or where[b, t]]
    cosines = [plain_cosine(prediction[b, t].tolist(), target[b, t].tolist()) for b, t in counted]
    loss = negative_cosine(prediction, target, where)
    assert loss.item() == pytest.approx(-sum(cosines) / len(cosines), abs=1e-6)
    loss.backward()
    assert prediction.grad is not None
    # d cos / d p = (t/|t| - cos * p/|p|) / |p|
    (b, t), cosine = counted[0], cosines[0]
    p, unit = prediction[b, t].detach(), target[b, t] / target[b, t].norm()
    expected = -(unit - cosine * p / p.norm()) / p.norm() / len(counted)
    assert torch.allclose(prediction.grad[b, t], expected, atol=1e-6)


def test_noise_is_drawn_or_checked() -> None:
    images = torch.zeros(2, 3, 8, 8)
    torch.manual_seed(3)
    expected = torch.rand(2, 5)
    torch.manual_seed(3)
    drawn: Tensor = checked_noise(None, images, 5)
    assert torch.equal(drawn, expected)
    assert checked_noise(expected, images, 5) is expected
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 4\).*found \(2, 5\)"):
        checked_noise(expected, images, 4)
