"""Checkpoints: whole or passed over, whatever tore them; what stays, and which is the best."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint import (
    all_checkpoints,
    checkpoint_folder,
    fault_of,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    step_of,
)
from engine.config import UsageError, dump
from engine.recipes import TrainRecipe
from engine.rundir import prepare_run, rewind
from engine.runtime import Runtime
from engine.saving import Checkpoints
from sharding import faults

ALONE = Runtime("cpu", "float32", 0, 0, 1)


def recipe_of(run: Path, **keys: Any) -> TrainRecipe:
    return TrainRecipe(**{"dataset": "d", "run": run, "model": {}, "steps": 12, "checkpoint_every": 3, **keys})


def train(recipe: TrainRecipe, losses: Callable[[int], float] = float, *, until: int | None = None) -> None:
    """Go on with a run of a small model from its last checkpoint, saved as the trainer does it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoints = Checkpoints(recipe, ALONE, "torch")
    last = last_checkpoint(recipe.run)
    if last is not None:
        state = load_checkpoint(last, model)
        optimizer.load_state_dict(state["optimizer"])
        checkpoints.load_state_dict(state["checkpoints"])
    for step in range(step_of(last) + 1, (until or recipe.steps) + 1):
        model(torch.full((1, 3), 1.0 / step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.observe({"loss": losses(step), "accuracy": -losses(step)})
        if checkpoints.is_regular(step):
            checkpoints.save(step, model, {"optimizer": optimizer.state_dict()})


def steps_in(run: Path) -> list[int]:
    return [step_of(folder) for folder in all_checkpoints(run)]


def content(run: Path) -> dict[str, Any]:
    """What a run holds: its checkpoints' weights and states, and where its links point."""
    found: dict[str, Any] = {path.name: path.readlink() for path in run.iterdir() if path.is_symlink()}
    for folder in all_checkpoints(run):
        assert fault_of(folder) is None
        weights = {key: value.tolist() for key, value in load_file(folder / "model.safetensors").items()}
        found[folder.name] = (weights, repr(torch.load(folder / "state.pt", weights_only=True)))
    found["left over"] = [str(path) for path in run.rglob(".tmp-*")]
    return found


def test_a_checkpoint_gives_back_what_was_saved_and_is_pointed_at(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    folder = save_checkpoint(tmp_path, 7, model, {"seen": 56, "momentum": torch.ones(2)}, best=3)
    state = load_checkpoint(folder, other)
    assert state["seen"] == 56
    assert torch.equal(state["momentum"], torch.ones(2))
    assert torch.equal(model.weight, other.weight)
    assert (tmp_path / "last").resolve() == folder == last_checkpoint(tmp_path)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert (manifest["step"], manifest["best"]) == (7, 3)
    assert manifest["files"]["state.pt"]["bytes"] == (folder / "state.pt").stat().st_size


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _zero_the_end(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("tear", [_shorten, _zero, _zero_the_end, _empty, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json"])
def test_a_torn_checkpoint_is_passed_over_and_named(
    tear: Callable[[Path], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    prepare_run(recipe, resume=False)
    train(recipe)
    tear(tmp_path / "last" / name)
    assert last_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 9)
    prepare_run(recipe, resume=True)
    said = capsys.readouterr().err
    assert "step-00000012 is passed over" in said
    assert name in said
    assert (tmp_path / "last").resolve().name == "step-00000009"
    train(recipe)
    assert fault_of(checkpoint_folder(tmp_path, 12)) is None
    assert (tmp_path / "last").resolve().name == "step-00000012"


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_in_silence(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    prepare_run(recipe, resume=False)
    train(recipe, until=3)
    _shorten(tmp_path / "last" / "state.pt")
    with pytest.raises(RuntimeError, match=r"no whole checkpoint of it \(step-00000003: state.pt has"):
        prepare_run(recipe, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0}}\n' for step in range(1, 5)))
    with pytest.raises(RuntimeError, match="has done 4 steps, but there is no whole checkpoint"):
        prepare_run(recipe, resume=True)


def test_a_run_killed_before_its_first_checkpoint_was_through_begins_anew(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    prepare_run(recipe, resume=False)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0}}\n' for step in range(1, 4)))
    prepare_run(recipe, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_checkpoint_without_a_manifest_is_read_where_it_is_of_the_first_version(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    for step in (4, 8):
        folder = checkpoint_folder(tmp_path, step)
        folder.mkdir(parents=True)
        save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
        torch.save({"seen": step}, folder / "state.pt")
    assert last_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 8)
    assert load_checkpoint(checkpoint_folder(tmp_path, 8), model)["seen"] == 8
    _shorten(checkpoint_folder(tmp_path, 8) / "state.pt")
    assert last_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 4)
    _shorten(checkpoint_folder(tmp_path, 4) / "model.safetensors")
    assert last_checkpoint(tmp_path) is None


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-3.old").mkdir(parents=True)
    train(recipe_of(tmp_path))
    assert (tmp_path / "checkpoints" / "step-3.old").is_dir()


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({}, [3, 9, 12]),
        ({"keep_last": 1}, [3, 12]),
        ({"keep_last": 1, "best_of": None}, [12]),
        ({"keep_last": 1, "best_is": "largest"}, [12]),
        ({"keep_last": 1, "best_of": None, "keep_every": 4}, [4, 8, 12]),
        ({"keep_last": 9}, [3, 6, 9, 12]),
    ],
)
def test_the_newest_the_best_and_every_nth_stay(keys: dict[str, Any], left: list[int], tmp_path: Path) -> None:
    train(recipe_of(tmp_path, **keys))
    assert steps_in(tmp_path) == left
    best = {None: None, "smallest": "step-00000003", "largest": "step-00000012"}
    wanted = best[keys.get("best_is", "smallest") if keys.get("best_of", "loss") else None]
    assert ((tmp_path / "best").resolve().name if (tmp_path / "best").is_symlink() else None) == wanted


def test_the_best_is_a_mean_over_the_steps_since_the_checkpoint_before(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 5.0, 3: 5.0, 4: 3.0, 5: 3.0, 6: 3.0, 7: 9.0, 8: 9.0, 9: 0.0, 10: 3.0, 11: 3.0, 12: 3.0}
    train(recipe_of(tmp_path), losses.__getitem__)
    assert (tmp_path / "best").resolve().name == "step-00000006"  # not 9, and 12 is no better


def test_what_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    train(recipe_of(tmp_path), lambda step: float("nan") if step <= 6 else float(step))
    assert (tmp_path / "best").resolve().name == "step-00000009"


def test_a_number_that_is_not_logged_cannot_be_the_best(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best_of=acuracy: .*expected one of accuracy, loss"):
        train(recipe_of(tmp_path, best_of="acuracy"))


def test_the_best_survives_a_checkpoint_that_is_torn_later(tmp_path: Path) -> None:
    def losses(step: int) -> float:
        return {3: 2.0, 6: 4.0, 9: 4.0, 12: 1.0}[-(-step // 3) * 3]

    recipe = recipe_of(tmp_path, keep_last=2)
    prepare_run(recipe, resume=False)
    train(recipe, losses)
    assert (tmp_path / "best").resolve().name == "step-00000012"
    assert steps_in(tmp_path) == [3, 9, 12]  # 3 is the best of a run that goes on from 9
    _zero(tmp_path / "last" / "state.pt")
    prepare_run(recipe, resume=True)
    assert (tmp_path / "best").resolve().name == "step-00000003"
    train(recipe, lambda step: 5.0)
    assert (tmp_path / "best").resolve().name == "step-00000003"


def test_the_best_begins_anew_where_another_one_is_asked_for(tmp_path: Path) -> None:
    train(recipe_of(tmp_path), until=6)
    train(recipe_of(tmp_path, best_of="accuracy"))
    assert (tmp_path / "best").resolve().name == "step-00000012"


def test_saving_out_of_turn_changes_nothing_about_the_best(tmp_path: Path) -> None:
    losses = [9.0, 0.0, 3.0]  # only by itself would the second step be the best
    model = nn.Linear(1, 1)
    for at in (None, 1, 2):
        run = tmp_path / str(at)
        recipe = recipe_of(run, steps=3, keep_last=5)
        checkpoints = Checkpoints(recipe, ALONE, "torch")
        for step in (1, 2, 3):
            checkpoints.observe({"loss": losses[step - 1]})
            if step in (at, 3):
                checkpoints.save(step, model, {})
            if step == at:  # and the run ends and goes on
                state = load_checkpoint(checkpoint_folder(run, step), model)
                checkpoints = Checkpoints(recipe, ALONE, "torch")
                checkpoints.load_state_dict(state["checkpoints"])
        state = torch.load(run / "last" / "state.pt", weights_only=True)
        assert state["checkpoints"]["best"]["so_far"] == {"step": 3, "value": 4.0}


def test_minutes_without_a_checkpoint_make_one_due_by_the_clock_of_rank_0(tmp_path: Path) -> None:
    seconds = 0.0
    recipe = recipe_of(tmp_path, checkpoint_minutes=2)
    checkpoints = Checkpoints(recipe, ALONE, "torch", clock=lambda: seconds)
    other = Checkpoints(recipe, Runtime("cpu", "float32", 1, 1, 2), "torch", clock=lambda: seconds)
    never = Checkpoints(recipe_of(tmp_path), ALONE, "torch", clock=lambda: seconds)
    seconds = 119.0
    assert not checkpoints.is_overdue
    seconds = 120.0
    assert checkpoints.is_overdue
    assert not other.is_overdue
    assert not never.is_overdue
    checkpoints.save(1, nn.Linear(1, 1), {})
    assert not checkpoints.is_overdue
    seconds = 240.0
    assert checkpoints.is_overdue


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Checkpoints(recipe_of(tmp_path), Runtime("cpu", "float32", 1, 1, 2), "torch")
    other.save(3, nn.Linear(1, 1), {})
    assert not list(tmp_path.iterdir())


def test_a_run_carried_out_otherwise_is_told_that_its_last_bits_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    state = Checkpoints(recipe, ALONE, "dali").state_dict()
    Checkpoints(recipe, ALONE, "dali").load_state_dict(state)
    assert capsys.readouterr().err == ""
    parts = recipe_of(tmp_path, accumulate=4)
    Checkpoints(parts, Runtime("cuda:0", "bfloat16", 0, 0, 3), "dali").load_state_dict(state)
    said = capsys.readouterr().err
    assert "processes 1 -> 3, accumulate 1 -> 4, device cpu -> cuda, dtype float32 -> bfloat16:" in said
    assert "last bit" in said


def _in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does `work`, negative for a signal; it is ended after a minute."""
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _begin_or_go_on(run: Path, steps: int = 9) -> None:
    recipe = recipe_of(run, steps=steps, keep_last=1)
    if not (run / "recipe.yaml").exists():
        (run / "checkpoints").mkdir(parents=True)
        (run / "recipe.yaml").write_text(dump(recipe))
    rewind(run)
    train(recipe, lambda step: float(-step if step < 5 else step))


def _dying_at(count: int, run: Path, passed: Path | None = None) -> Callable[[], None]:
    """Work that is killed when it comes to its fault point number `count`; `passed` gets the names of those before."""
    left = count

    def fault_point(name: str) -> None:
        nonlocal left
        left -= 1
        if passed:
            with passed.open("a") as file:
                file.write(name + "\n")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        faults.fault_point = fault_point
        _begin_or_go_on(run)

    return work


def test_a_run_that_dies_at_any_point_of_saving_pointing_and_pruning_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    names = tmp_path / "names"
    assert _in_child(_dying_at(0, tmp_path / "whole", names)) == 0
    _begin_or_go_on(tmp_path / "whole", 12)
    whole = content(tmp_path / "whole")
    points = names.read_text().split()
    calls = "mkdir weights state manifest fsync fsync_folder rename fsync_parent symlink replace_link fsync_run"
    wanted = {f"checkpoint.{call}.{when}" for call in calls.split() for when in ("before", "after")}
    wanted |= {f"checkpoint.{call}_old.{when}" for call in ("rename", "remove") for when in ("before", "after")}
    assert set(points) == wanted
    for count in range(1, len(points) + 1):
        run = tmp_path / str(count)
        assert _in_child(_dying_at(count, run)) == -signal.SIGKILL
        saved = points[:count].count("checkpoint.rename.after")
        last = last_checkpoint(run)
        assert step_of(last) >= 3 * saved, points[count - 1]
        if last is not None:
            load_checkpoint(last, nn.Linear(3, 2))
            assert not (run / "last").is_symlink() or (run / "last" / "state.pt").is_file(), points[count - 1]
        assert _in_child(partial(_begin_or_go_on, run, 12)) == 0
        assert content(run) == whole, points[count - 1]
        shutil.rmtree(run)


@pytest.mark.parametrize("count", [27, 31, 40])
def test_a_run_that_dies_again_and_again_is_finished_in_the_end(count: int, tmp_path: Path) -> None:
    _begin_or_go_on(tmp_path / "whole", 12)
    deaths = 0
    while _in_child(_dying_at(count, tmp_path / "run")) == -signal.SIGKILL:
        deaths += 1
        assert deaths < 10
    assert deaths
    _begin_or_go_on(tmp_path / "run", 12)  # what the last death left unpruned goes with the next checkpoint
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("full_after_bytes", [100, 1000])
def test_a_disk_that_is_full_is_told_and_leaves_what_was_there(full_after_bytes: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, nn.Linear(3, 2), {})

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_after_bytes, full_after_bytes))
        try:
            save_checkpoint(tmp_path, 6, nn.Linear(3, 2), {"much": torch.zeros(10_000)})
        except RuntimeError as error:
            text = str(error)
            os._exit(0 if "step-00000006 could not be written" in text and "--resume" in text else 1)

    assert _in_child(work) == 0
    assert last_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_whose_metrics_a_power_cut_has_garbled_goes_on(tmp_path: Path) -> None:
    prepare_run(recipe_of(tmp_path), resume=False)
    train(recipe_of(tmp_path))
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in range(1, 13)]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([*lines, "\0" * 40, '{"step": 13, "lo']).encode() + b"\n\xff\n{")
    prepare_run(recipe_of(tmp_path), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


def test_what_does_not_change_the_numbers_may_change_on_resume(tmp_path: Path) -> None:
    prepare_run(recipe_of(tmp_path), resume=False)
    train(recipe_of(tmp_path))
    free = {
        "processes": 2,
        "accumulate": 4,
        "loader": "torch",
        "bad_samples": "replace",
        "cache_gib": 1.0,
        "log_every": 5,
        "checkpoint_every": 4,
        "checkpoint_minutes": 5.0,
        "keep_last": 3,
        "keep_every": 6,
        "best_of": "accuracy",
        "best_is": "largest",
        "steps": 20,
    }
    prepare_run(recipe_of(tmp_path, **free), resume=True)
    bound = {
        "seed": 1,
        "batch_size": 32,
        "precision": "bf16",
        "where": "TRUE",
        "flips": False,
        "optim": {"lr": 0.5},
        "model": {"name": "x"},
    }
    for key, value in bound.items():
        with pytest.raises(UsageError, match=f"was started with {key}"):
            prepare_run(recipe_of(tmp_path, **{**free, key: value}), resume=True)


def test_a_run_begun_before_a_key_was_there_may_be_continued(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    prepare_run(recipe, resume=False)
    train(recipe)
    saved = tmp_path / "recipe.yaml"
    lines = [line for line in saved.read_text().splitlines() if not line.startswith(("keep_", "rotations", "best_"))]
    saved.write_text("\n".join(lines))
    prepare_run(recipe, resume=True)
    saved.write_text(saved.read_text() + "\nforgotten: 1\n")
    with pytest.raises(UsageError, match="another version of the engine: unknown key 'forgotten'"):
        prepare_run(recipe, resume=True)
