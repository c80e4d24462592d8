"""The extraction cases run, and everyone does the work that he is compared by."""

from __future__ import annotations

import os

import pytest

from benchmarks.extract import CASES
from benchmarks.harness import CannotRunError, Setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("bench"), rounds=1, quick=True, cores=frozenset(os.sched_getaffinity(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_layer", "hipt_patch"])
def test_a_case_measures_all_contenders(name: str, setting: Setting) -> None:
    result = CASES[name](setting)
    assert result["value"] > 0
    assert {"model_alone", "pil_loader"} <= set(result["ratio_to"])
    assert all(units > 0 for units in result["units_per_round"].values())
    assert result["units_per_round"]["ours"] >= result["units_per_round"]["pil_loader"]


def test_a_gpu_case_says_what_it_lacks(setting: Setting) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(CannotRunError, match="needs an NVIDIA GPU"):
        CASES["gpu_hipt_patch"](setting)
