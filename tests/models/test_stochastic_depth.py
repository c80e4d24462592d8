"""Stochastic depth by sample: whoever computes a sample drops the same branches of it."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from models import build_model
from models.stochastic_depth import SampleShare, StochasticDepth, share_draws

SAMPLES, VIEWS = 12, 3


def _kept(layer: StochasticDepth, rows: Tensor) -> Tensor:
    """Which views of the samples `rows` are kept, bool [views, samples]."""
    torch.manual_seed(5)
    layer.share.rows, layer.share.total = rows, SAMPLES
    return layer(torch.ones(VIEWS * len(rows), 2, 2)).view(VIEWS, len(rows), 4)[..., 0] > 0


@pytest.mark.parametrize("cuts", [(6,), (4, 8), (1, 5, 6)])
def test_a_sample_loses_the_same_branches_however_the_batch_is_divided(cuts: tuple[int, ...]) -> None:
    layer = StochasticDepth(0.5, SampleShare())
    rows = torch.arange(SAMPLES)
    whole = _kept(layer, rows)
    assert 0 < whole.sum() < whole.numel()
    assert not (whole[0] == whole[1]).all()
    parts = [_kept(layer, part) for part in rows.tensor_split(cuts)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    layer = StochasticDepth(0.25, SampleShare())
    torch.manual_seed(0)
    out = layer(torch.ones(40_000, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    x = torch.rand(5, 3)
    assert torch.equal(StochasticDepth(0.9, SampleShare()).eval()(x), x)
    assert torch.equal(StochasticDepth(0.0, SampleShare())(x), x)


def test_an_input_that_does_not_hold_the_samples_has_draws_of_its_own() -> None:
    layer = StochasticDepth(0.5, SampleShare(torch.arange(4), 8))
    assert layer(torch.ones(7, 2)).shape == (7, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hipt_patch", {"variant": "tiny", "depth": 3, "drop_path": 0.3}),
        ("timm", {"architecture": "convnext_atto", "settings": {"drop_path_rate": 0.3}}),
    ],
)
def test_all_of_timm_s_are_replaced(name: str, options: dict[str, object]) -> None:
    model: nn.Module = build_model(name, **options)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    keys = list(model.state_dict())
    share = SampleShare()
    share_draws(model, share)
    found = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert [module.drop_prob for module in found] == rates != []
    assert all(module.share is share for module in found)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert list(model.state_dict()) == keys
