"""The cases of `engine bench step`, on small batches."""

from __future__ import annotations

import pytest
import torch

from benchmarks import step, train_step
from benchmarks.harness import CannotRunError, Setting
from models import build_model
from models.hipt import HIPT4K

PEERS = {"hipt_patch_224": {"timm"}, "hipt_patch_256": {"timm"}, "hipt_4k": {"one_by_one", "as_published"}}
GPU = {name for name in step.CASES if name.startswith("gpu_")} - set(train_step.CASES)


def test_the_cases_are_the_documented_ones() -> None:
    assert set(step.CASES) - GPU - set(train_step.CASES) == set(PEERS)
    assert len(GPU) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_case_gives_our_rate_and_a_ratio_to_each_of_its_peers(name: str, setting: Setting) -> None:
    threads = torch.get_num_threads()
    result = step.CASES[name](setting)
    assert torch.get_num_threads() == threads
    assert result["unit"] == ("regions/s" if name == "hipt_4k" else "images/s")
    assert result["value"] > 0
    assert set(result["ratio_to"]) == PEERS[name]
    assert set(result["units_per_round"].values()) == {2}


def test_the_published_arithmetic_gives_our_numbers() -> None:
    vit = {"dim": 32, "depth": 2, "heads": 2}
    model = build_model("hipt_4k", patch=vit, region={**vit, "in_dim": 32}).eval()
    assert isinstance(model, HIPT4K)
    region = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        assert torch.allclose(step._as_published(model, region), model(region), atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", sorted(GPU))
def test_a_gpu_case_says_that_there_is_none(name: str, setting: Setting) -> None:
    with pytest.raises(CannotRunError, match="torch sees no CUDA device"):
        step.CASES[name](setting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", sorted(GPU))
def test_a_gpu_case_gives_a_rate(name: str, setting: Setting) -> None:
    result = step.CASES[name](setting)
    assert result["value"] > 0
    if name != "gpu_hipt_4k":
        assert 0 < result["matmul_share"] < 1


def test_operations_are_counted_forward_and_three_times_that_for_a_step() -> None:
    model = build_model("hipt_patch", dim=32, depth=2, heads=2)
    image = torch.randn(1, 3, 64, 64)
    forward, training = (step._flops(model, image, train) for train in (False, True))
    assert 2 < training / forward <= 3
    assert all(parameter.grad is None for parameter in model.parameters())
