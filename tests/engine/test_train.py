"""`engine train`: runs that end, refuse what does not fit, and leave no rank behind."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import shard, synth
from engine.recipes import ShardRecipe

ENGINE = str(Path(sys.executable).parent / "engine")
REAL_SLIDE = Path(__file__).parents[2] / ".." / "shared" / "data" / "slides" / "CMU-1-Small-Region.svs"
SMALL = ("batch_size=8", "model.dim=32", "model.depth=2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    synth.run(folder / "slides", slides=2, size=1536, workers=1)
    shard.run(ShardRecipe(slides=str(folder / "slides"), out=folder / "dataset", workers=1), local=True)
    return folder / "dataset"


def _train(dataset: Path, run: Path, *settings: str, code: int = 0) -> Any:
    """Run the command; the JSON object of stdout, or stderr where an error is expected."""
    command = [ENGINE, "train", "train/vittm_hmr_tiny", f"dataset={dataset}", f"run={run}", "--json", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    if code:
        assert "Traceback" not in done.stderr
        return done.stderr
    return json.loads(done.stdout)


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def _assert_same_weights(one: Path, other: Path) -> None:
    left, right = _weights(one), _weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_twenty_steps_on_a_real_slide(tmp_path: Path) -> None:
    if not REAL_SLIDE.is_file():
        pytest.skip(f"the real slide is not here: {REAL_SLIDE}")
    recipe = ShardRecipe(slides=str(REAL_SLIDE), out=tmp_path / "dataset", mpp="native", workers=1)
    made = shard.run(recipe, local=True)
    assert made["patches"]["decode"] > 0
    result = _train(tmp_path / "dataset", tmp_path / "run", "steps=20", "batch_size=16")
    assert result["steps"] == 20
    assert result["start_step"] == 0
    assert result["samples_seen"] == 320
    assert all(math.isfinite(loss) for loss in _losses(tmp_path / "run"))
    assert result["loss_last"] < result["loss_first"]


def test_a_run_leaves_recipe_environment_metrics_and_checkpoint(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = _train(dataset, run, *SMALL, "steps=6")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["seen"] for line in lines] == [8, 16, 24, 32, 40, 48]
    assert {"loss", "lr", "samples_per_s", "data_wait", "grad_norm"} <= lines[0].keys()
    assert all(0 <= line["data_wait"] <= 1 for line in lines)
    assert result["loss_first"] == pytest.approx(sum(line["loss"] for line in lines[:5]) / 5)
    assert result["loss_last"] == pytest.approx(sum(line["loss"] for line in lines[-5:]) / 5)
    assert Path(result["checkpoint"]) == (run / "checkpoints" / "step-00000006")
    assert (run / "last").resolve() == Path(result["checkpoint"])
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    assert state["seen"] == 48
    assert (run / "environment.json").is_file()
    assert list((run / "tensorboard").iterdir())
    assert not list(run.rglob(".tmp-*"))
    assert not (run / ".lock").exists()


def test_two_runs_of_one_recipe_are_identical(dataset: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _train(dataset, tmp_path / name, *SMALL, "steps=4")
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    _assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(dataset: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        _train(dataset, tmp_path / str(seed), *SMALL, "steps=2", f"seed={seed}")
    assert _losses(tmp_path / "0") != _losses(tmp_path / "1")


def _wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
def test_ranks_die_with_their_launcher(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [ENGINE, "train", "train/vittm_hmr_tiny", f"dataset={dataset}", f"run={run}", *SMALL]
    command += ["steps=100000", "processes=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(run / "metrics.jsonl")
        children = _children(process.pid)
        assert len(children) >= 2
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and not _zombie(pid) for pid in children):
        assert time.monotonic() < deadline, f"{children} outlive their launcher"
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_two_processes_see_the_samples_of_one(dataset: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        _train(dataset, tmp_path / str(processes), *SMALL, "steps=4", f"processes={processes}")
    assert _losses(tmp_path / "1") == pytest.approx(_losses(tmp_path / "2"), rel=1e-4)


def test_an_interrupted_run_exits_130(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [ENGINE, "train", "train/vittm_hmr_tiny", f"dataset={dataset}", f"run={run}", *SMALL, "steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(run / "metrics.jsonl")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (run / ".lock").exists()


def test_an_existing_run_is_refused_without_resume(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _train(dataset, run, *SMALL, "steps=1")
    assert "--resume" in _train(dataset, run, *SMALL, "steps=1", code=2)
    assert "lr" in _train(dataset, run, *SMALL, "steps=2", "optim.lr=0.5", "--resume", code=2)
    assert _train(dataset, run, *SMALL, "steps=2", "--resume")["start_step"] == 1


def test_a_run_that_cannot_work_is_refused_before_it_starts(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "256" in _train(dataset, run, "crop_px=320", code=2)
    assert "divide" in _train(dataset, run, "batch_size=9", "processes=2", code=2)
    assert "no-dataset" in _train(tmp_path / "no-dataset", run, code=2)
    assert "did you mean 'dim'" in _train(dataset, run, "model.dimm=3", code=2)
    assert not run.exists()


def test_a_run_does_not_go_on_with_another_dataset(dataset: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    _train(dataset, run, *SMALL, "steps=1")
    synth.run(other / "slides", slides=1, size=1536, seed=9, workers=1)
    shard.run(ShardRecipe(slides=str(other / "slides"), out=other / "dataset", workers=1), local=True)
    before = (run / "last" / "model.safetensors").read_bytes()
    errors = _train(other / "dataset", run, *SMALL, "steps=2", "--resume", code=2)
    assert "dataset" in errors
    assert (run / "last" / "model.safetensors").read_bytes() == before
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(dataset), str(moved)], check=True)
    assert _train(moved, run, *SMALL, "steps=2", "--resume")["start_step"] == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_that_memory_does_not_hold_is_told_in_a_sentence(dataset: Path, tmp_path: Path, processes: int) -> None:
    huge = ("batch_size=8", "model.dim=1048576", f"processes={processes}")
    errors = _train(dataset, tmp_path / "run", *huge, code=1)
    assert "out of memory" in errors
    assert "batch_size=8" in errors
    assert "accumulate" in errors


def test_a_run_that_cannot_be_written_is_told_in_a_sentence(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in _train(dataset, tmp_path / "file" / "run", *SMALL, code=1)


def test_a_damaged_sample_stops_the_run_by_name(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    subprocess.run(["cp", "-r", str(dataset), str(copy)], check=True)
    tar = sorted((copy / "shards").glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[512 + 2000] ^= 4
    tar.write_bytes(data)
    for processes in (1, 2):
        errors = _train(copy, tmp_path / str(processes), *SMALL, "steps=40", f"processes={processes}", code=1)
        assert tar.stem in errors
        assert "engine verify" in errors


def test_a_loss_that_is_not_finite_stops_the_run(dataset: Path, tmp_path: Path) -> None:
    errors = _train(dataset, tmp_path / "run", *SMALL, "steps=50", "optim.lr=1e30", "optim.warmup_steps=0", code=1)
    assert "the loss is" in errors


def test_the_teacher_follows_the_student(dataset: Path, tmp_path: Path) -> None:
    for steps in (1, 3):  # the last step leaves the teacher where it is
        _train(dataset, tmp_path / str(steps), *SMALL, "model.target=ema", "model.ema_momentum=0.5", f"steps={steps}")
    still, moved = _weights(tmp_path / "1"), _weights(tmp_path / "3")
    key = "blocks.0.mlp_process.0.weight"
    assert not torch.equal(still[f"teacher.{key}"], moved[f"teacher.{key}"])
    assert (moved[f"teacher.{key}"] - moved[key]).abs().max() < (still[f"teacher.{key}"] - moved[key]).abs().max()


@pytest.mark.parametrize(
    "model", [("model.target=ema", "model.memory=image"), ("model.name=vittm_mae", "model.decoder_depth=1")]
)
def test_masked_models_train_on_two_processes(dataset: Path, tmp_path: Path, model: tuple[str, str]) -> None:
    _train(dataset, tmp_path / "run", *SMALL, *model, "steps=3", "processes=2")
    assert len(_losses(tmp_path / "run")) == 3


def test_a_model_without_an_objective_is_refused(dataset: Path, tmp_path: Path) -> None:
    errors = _train(dataset, tmp_path / "run", *SMALL, "model.name=vittm", "steps=3", code=2)
    assert "model.name=vittm: it is unclear what to train it for" in errors
