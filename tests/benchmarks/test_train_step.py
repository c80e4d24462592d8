"""The training cases of `engine bench step`: the trainer's loop with the loader, and with one batch in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, train_step
from benchmarks.harness import OURS, CannotRunError, Setting
from benchmarks.slides import sharded
from engine import trainer
from engine.config import apply_overrides, read_recipe
from engine.recipes import TrainRecipe
from engine.runtime import Runtime
from engine.train import open_train_loader
from engine.train_recipe import build_train_recipe

CPU = ["train_vittm_hmr_tiny", "train_hipt_patch_dino_tiny"]
GPU = [name for name in train_step.CASES if name.startswith("gpu_")]
SMALL = ("batch_size=2", "model.dim=32", "model.depth=1", "steps=1000")


@pytest.fixture
def recipe(setting: Setting, tmp_path: Path) -> TrainRecipe:
    keys = [f"dataset={sharded(setting, 'tiny')}", f"run={tmp_path}", *SMALL]
    return build_train_recipe(apply_overrides(read_recipe("train", "train/vittm_hmr_tiny"), keys))


def _clocked(recipe: TrainRecipe, *, in_memory: bool) -> train_step._Clocked:
    loader = open_train_loader(recipe, Runtime.detect(recipe.precision))
    return train_step._Clocked(loader, train_step._Work(recipe, warm=1, timed=2, in_memory=in_memory))


def test_the_cases_are_cases_of_the_bench() -> None:
    assert [*CPU, *GPU] == list(train_step.CASES)
    assert set(train_step.CASES) < set(step.CASES)
    names = ("vittm_hmr", "hipt_patch_dino")
    assert [f"gpu_train_{name}{suffix}" for name in names for suffix in ("", "_compiled")] == GPU


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU)
def test_a_case_gives_our_rate_and_its_ratio_to_batches_in_memory(name: str, setting: Setting) -> None:
    result = train_step.CASES[name](setting)
    assert result["value"] > 0
    assert result["unit"] == "samples/s"
    assert set(result["ratio_to"]) == {"synthetic"}
    assert set(result["units_per_round"].values()) == {2 * result["batch_size"]}
    for key in ("data_wait_share", "peak_gib", "gpu_peak_gib"):
        assert set(result[key]) == {"ours", "synthetic"}
    assert 0 <= result["data_wait_share"]["synthetic"] < result["data_wait_share"]["ours"] < 1
    assert min(result["peak_gib"].values()) > 0.1  # torch alone is more
    assert set(result["gpu_peak_gib"].values()) == {0}
    assert list((setting.work / "runs").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", GPU)
def test_a_gpu_case_says_that_there_is_none(name: str, setting: Setting) -> None:
    with pytest.raises(CannotRunError, match="torch sees no CUDA device"):
        train_step.CASES[name](setting)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", GPU)
def test_a_gpu_case_gives_a_rate(name: str, setting: Setting) -> None:
    result = train_step.CASES[name](setting)
    assert result["value"] > 0
    assert result["gpu_peak_gib"][OURS] > 0


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_trainer_runs_up_to_the_end_of_the_window(
    recipe: TrainRecipe, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    update = trainer._Stepper.update

    def counted(self: Any, number: int) -> None:
        steps.append(number)
        update(self, number)

    monkeypatch.setattr(trainer._Stepper, "update", counted)
    window = train_step._train(train_step._Work(recipe, warm=2, timed=3, in_memory=in_memory))
    assert steps == [0, 1, 2, 3, 4]
    assert window.round.units == 3 * 2
    assert 0 < window.waited_s < window.round.seconds
    assert list(recipe.run.iterdir()) == []


def test_the_batch_in_memory_is_the_loaders_first_one_again_and_again(recipe: TrainRecipe) -> None:
    real, synthetic = _clocked(recipe, in_memory=False), _clocked(recipe, in_memory=True)
    with real._loader:
        first, second = next(real), next(real)
    assert next(synthetic) is next(synthetic)
    assert torch.equal(next(synthetic).images[0], first.images[0])
    assert not torch.equal(first.images[0], second.images[0])
    assert (synthetic.seen, synthetic.backend) == (2, real.backend)


def test_a_window_ends_with_the_request_after_its_last_batch(recipe: TrainRecipe) -> None:
    synthetic = _clocked(recipe, in_memory=True)
    for _ in range(3):
        next(synthetic)
    with pytest.raises(train_step._WindowEnd):
        next(synthetic)


def test_a_failure_in_a_contenders_process_is_told(setting: Setting, recipe: TrainRecipe) -> None:
    work = train_step._Work(recipe.model_copy(update={"dataset": Path("nowhere")}), 1, 2, in_memory=False)
    with train_step._process(setting, gpu=False) as pool, pytest.raises(ValueError, match="nowhere"):
        train_step._once(pool, work, [])
