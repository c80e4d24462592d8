"""Masked autoencoding: dropping and putting back by hand, the error and its baseline against plain loops."""

from __future__ import annotations

import pytest
import torch

from models.objectives.hmr import masked_tokens
from models.objectives.mae import constant_error, keep_tokens, mean_squared_error, put_back, visible_ids


def test_visible_tokens_keep_their_order_and_come_back_to_their_places() -> None:
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    ids = visible_ids(hidden, 2)
    assert ids.tolist() == [[1, 3], [0, 1]]
    tokens = torch.arange(8.0).view(2, 4, 1)
    kept = keep_tokens(tokens, ids)
    assert kept.flatten().tolist() == [1.0, 3.0, 4.0, 5.0]
    back = put_back(kept, ids, torch.full((1, 1, 1), -1.0), 4)
    assert back.flatten().tolist() == [-1.0, 1.0, -1.0, 3.0, 4.0, 5.0, -1.0, -1.0]


@pytest.mark.parametrize("masked", [True, False])
def test_the_error_is_the_mean_over_numbers_of_the_positions_that_count(masked: bool) -> None:
    torch.manual_seed(1)
    prediction, target = torch.randn(3, 8, 5, requires_grad=True), torch.randn(3, 8, 5)
    where = masked_tokens(torch.rand(3, 8), 0.5) if masked else None
    counted = [(b, t) for b in range(3) for t in range(8) if where is None or where[b, t]]
    squares = [(prediction[b, t, c] - target[b, t, c]).item() ** 2 for b, t in counted for c in range(5)]
    loss = mean_squared_error(prediction, target, where)
    assert loss.item() == pytest.approx(sum(squares) / len(squares), abs=1e-6)
    loss.backward()
    assert prediction.grad is not None
    expected = torch.zeros_like(target)
    for b, t in counted:
        expected[b, t] = 2 * (prediction[b, t] - target[b, t]).detach() / len(squares)
    assert torch.allclose(prediction.grad, expected, atol=1e-7)


@pytest.mark.parametrize("masked", [True, False])
def test_constant_error_is_what_the_best_constant_scores(masked: bool) -> None:
    torch.manual_seed(0)
    target = torch.randn(3, 8, 5) + 0.5
    where = masked_tokens(torch.rand(3, 8), 0.5) if masked else None
    best = target[where].mean(dim=0) if where is not None else target.mean(dim=(0, 1))
    least = constant_error(target, where)
    assert torch.allclose(least, mean_squared_error(best.expand_as(target), target, where))
    others = [mean_squared_error((best + 0.1 * torch.randn(5)).expand_as(target), target, where) for _ in range(50)]
    assert min(others) > least
