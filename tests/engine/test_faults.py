"""Killed at every kind of step, in driver and workers: the dataset is the same in the end, and nothing is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

POINTS = [
    "atomic.before_write",
    "atomic.before_fsync",
    "atomic.before_rename",
    "atomic.after_rename",
    "stage.patch",
    "gather.window",
]


def arguments(slides: Path, out: Path) -> list[str]:
    settings = [f"slides={slides}", f"out={out}", "patches_per_shard=16", "workers=2"]
    return ["shard", "shard/tiny", *settings, "--local", "--json"]


@pytest.fixture(scope="module")
def undisturbed(slides: Path, tmp_path_factory: pytest.TempPathFactory, content: Callable[[Path], Any]) -> Any:
    from engine import shard
    from engine.recipes import ShardRecipe

    out = tmp_path_factory.mktemp("undisturbed") / "dataset"
    shard.run(ShardRecipe(slides=str(slides), out=out, patches_per_shard=16, workers=2), local=True)
    return content(out)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("time", [1, 3])
def test_a_worker_that_dies_once_at_a_step_changes_nothing(
    point: str, time: int, slides: Path, undisturbed: Any, content: Any, command: Any, tmp_path: Path
) -> None:
    """The first process that comes to the step dies: a worker, or the driver, which is then run again."""
    out, token = tmp_path / "out", tmp_path / "token"
    done = command.run(*arguments(slides, out), ENGINE_FAULT=f"{point}:{time}", ENGINE_FAULT_ONCE=str(token))
    assert token.exists(), "nobody came to the step"
    if done.returncode == -9:
        done = command.run(*arguments(slides, out))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slides"] == {"done": 3, "quarantined": 0}
    assert content(out) == undisturbed
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 8, 13])
def test_a_driver_that_dies_again_and_again_is_finished_in_the_end(
    steps: int, slides: Path, undisturbed: Any, content: Any, command: Any, tmp_path: Path
) -> None:
    """It dies each time after so many files, workers likewise, until a run comes through."""
    out = tmp_path / "out"
    deaths = 0
    for number in range(40):
        token = tmp_path / f"token-{number}"
        fault = {"ENGINE_FAULT": f"atomic.after_rename:{steps}", "ENGINE_FAULT_ONCE": str(token)}
        done = command.run(*arguments(slides, out), **fault)
        deaths += token.exists()
        if done.returncode != -9:
            break
    assert deaths
    assert done.returncode == 0, done.stderr
    assert content(out) == undisturbed
