"""`engine train --resume`: what was killed, stopped or moved to other ranks ends as the run that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import shard, synth
from engine.recipes import ShardRecipe

# Recipe -> settings that make it quick. Their numbers are compared to the bit.
RECIPES = {
    "train/vittm_hmr_tiny": ("model.dim=32", "model.depth=2"),
    "train/hipt_patch_dino_tiny": (
        "model.dim=24",
        "model.depth=2",
        "crop_px=64",
        "dino.small_px=32",
        "dino.num_small=2",
        "dino.out_dim=64",
        "dino.hidden_dim=32",
        "dino.bottleneck_dim=16",
        "dino.drop_path=0.2",
    ),
}
COMMON = ("steps=60", "checkpoint_every=10", "batch_size=6", "optim.warmup_steps=5")
Straight = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    synth.run(folder / "slides", slides=2, size=1536, workers=1)
    shard.run(ShardRecipe(slides=str(folder / "slides"), out=folder / "dataset", workers=1), local=True)
    return folder / "dataset"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that share few cores would wait for each other's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def arguments(dataset: Path) -> Callable[..., list[str]]:
    def make(recipe: str, run: Path, processes: int) -> list[str]:
        places = (f"dataset={dataset}", f"run={run}", f"processes={processes}")
        return ["train", recipe, *places, *COMMON, *RECIPES[recipe], "--resume", "--json"]

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    return {}


@pytest.fixture
def straight(
    made: dict[tuple[str, int], Path], tmp_path_factory: pytest.TempPathFactory, arguments: Any, command: Any
) -> Straight:
    """(recipe, processes) -> the run that nobody disturbed, made once."""

    def make(recipe: str, processes: int) -> Path:
        if (recipe, processes) not in made:
            run = tmp_path_factory.mktemp("straight") / "run"
            done = command.run(*arguments(recipe, run, processes))
            assert done.returncode == 0, done.stderr
            made[recipe, processes] = run
        return made[recipe, processes]

    return make


def last_step(run: Path) -> int:
    return int((run / "last").resolve().name.removeprefix("step-")) if (run / "last").is_symlink() else 0


def logged(run: Path) -> list[tuple[int, int, float]]:
    """(step, samples seen, loss) of each line; times differ from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["seen"], line["loss"]) for line in lines]


def logged_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_same(run: Path, straight: Path) -> None:
    """Losses, weights, state of the optimiser and of the loader, and the best are equal to the bit."""
    assert logged(run) == logged(straight)
    assert last_step(run) == last_step(straight) == 60
    for link in ("last", "best"):
        assert (run / link).resolve().name == (straight / link).resolve().name
        ours, theirs = (load_file(each / link / "model.safetensors") for each in (run, straight))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    states = [torch.load(each / "last" / "state.pt", weights_only=True) for each in (run, straight)]
    assert_equal(*states)


def assert_equal(one: Any, other: Any) -> None:
    """Nested lists and dicts of tensors and plain values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for each in zip(one, other, strict=True):
            assert_equal(*each)
    else:
        assert one == other


def _until_step(step: int, run: Path, process: subprocess.Popen[bytes], errors: Path) -> None:
    """Wait until `step` is logged."""
    while logged_steps(run) < step:
        assert process.poll() is None, f"the run ended before the moment came: {errors.read_text()}"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_killed_twice_ends_as_if_it_had_not_been(
    recipe: str, processes: int, straight: Straight, arguments: Any, command: Any, tmp_path: Path
) -> None:
    whole, run, errors = straight(recipe, processes), tmp_path / "run", tmp_path / "errors"
    for past in (10, 30):
        process = command.start(*arguments(recipe, run, processes), errors=errors)
        _until_step(past + 3, run, process, errors)  # those past the checkpoint are done again
        process.kill()
        process.wait()
        assert command.survivors(10) == []
        assert past <= last_step(run) < 60
    done = command.run(*arguments(recipe, run, processes))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 30 <= result["start_step"] < 60
    assert result["samples_seen"] == 360
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "processes"), [("train/vittm_hmr_tiny", 2), ("train/hipt_patch_dino_tiny", 1)])
def test_a_run_that_is_told_to_stop_is_saved_where_it_is_and_goes_on(
    recipe: str, processes: int, straight: Straight, arguments: Any, command: Any, tmp_path: Path
) -> None:
    whole, run, errors = straight(recipe, processes), tmp_path / "run", tmp_path / "errors"
    for number, past in ((signal.SIGTERM, 12), (signal.SIGUSR1, 33)):
        process = command.start(*arguments(recipe, run, processes), errors=errors)
        _until_step(past, run, process, errors)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        said = errors.read_text()
        assert f"stopped by {number.name} after step {last_step(run)} of 60, which is saved" in said
        assert "`engine train ... --resume` goes on" in said
        assert "Traceback" not in said
        assert past <= last_step(run) == logged(run)[-1][0] < 60
        assert command.survivors(10) == []
        assert not (run / ".lock").exists()
    done = command.run(*arguments(recipe, run, processes))
    assert done.returncode == 0, done.stderr
    assert_same(run, whole)


# One rank as another launcher starts it. Notes which row it took at which position of the stream.
RANK = """
import os, sys
from engine import cli
from engine.data.opening import StreamLoader

take, name = StreamLoader.__next__, f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}"

def noting(loader):
    batch = take(loader)
    share = len(batch.rows)
    first = loader.seen - share * (int(os.environ["WORLD_SIZE"]) - int(os.environ["RANK"]))
    with open(f"{os.environ['TEST_ROWS']}/{name}", "a") as file:
        file.writelines(f"{first + at} {row}\\n" for at, row in enumerate(batch.rows.tolist()))
    return batch

if "TEST_ROWS" in os.environ:
    StreamLoader.__next__ = noting
cli.main()
"""


@pytest.fixture
def start_ranks(dataset: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start the ranks of a run, each by itself; those that a failing test leaves are killed."""
    ranks: list[subprocess.Popen[str]] = []

    def start(
        world_size: int, run: Path, *settings: str, steps: int, rows: Path | None = None
    ) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        recipe = "train/vittm_hmr_tiny"
        arguments = ["train", recipe, f"dataset={dataset}", f"run={run}", *COMMON, *RECIPES[recipe], f"steps={steps}"]
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"TEST_ROWS": str(rows)} if rows else {}
        started = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", RANK, *arguments, *settings],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        ranks.extend(started)
        return started

    yield start
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
def test_one_rank_that_is_told_to_stop_stops_all_at_the_same_step(start_ranks: Any, tmp_path: Path) -> None:
    """As under SLURM or another launcher: the signal reaches one rank, which is not the one that writes."""
    run = tmp_path / "run"
    ranks = start_ranks(2, run, steps=3000)
    while logged_steps(run) < 5:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR1)
    told = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130]
    step = last_step(run)
    assert 5 <= step < 3000
    assert f"stopped by SIGUSR1 after step {step} of 3000" in told[0]
    assert "stopped" not in told[1]  # once is enough
    assert torch.load(run / "last" / "state.pt", weights_only=True)["seen"] == 6 * step


@pytest.mark.slow
def test_minutes_make_checkpoints_between_those_of_steps(start_ranks: Any, tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path / "run", "checkpoint_minutes=1e-6", "keep_last=9", steps=6)
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    # What rank 0 says after one step is known to all after the next; by then that step may have been saved.
    assert found == [f"step-{step:08d}" for step in (2, 4, 6)]


@pytest.mark.slow
def test_other_ranks_take_every_sample_exactly_once(start_ranks: Any, dataset: Path, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows"
    rows.mkdir()
    num_rows = json.loads((dataset / "dataset.json").read_text())["counts"]["patches"]
    for world_size, steps in ((2, 4), (1, 7), (3, 13)):
        ranks = start_ranks(world_size, run, "--resume", steps=steps, rows=rows)
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world_size, told
    assert "processes 1 -> 3" in told[0]
    lines = [line.split() for path in rows.iterdir() for line in path.read_text().splitlines()]
    taken = sorted((int(at), int(row)) for at, row in lines)
    assert [at for at, _ in taken] == list(range(13 * 6))
    assert 2 * num_rows <= 13 * 6, "two epochs at least"
    for epoch in range(2):
        seen = Counter(row for _, row in taken[epoch * num_rows : (epoch + 1) * num_rows])
        assert seen == dict.fromkeys(range(num_rows), 1)


# Runs of the real loop that die at one fault point after the other, in children of a process that has imported all.
DIE = """
import json, os, signal, sys
from pathlib import Path

import nvidia.dali.fn, torch
from engine import train
from engine.config import apply_overrides, read_recipe
from engine.train_recipe import build_train_recipe
from engine.data import open_loader
from models import build_model
from sharding import faults

recipe, folder, every, *settings = sys.argv[1:]
folder, every = Path(folder), int(every)

def child(run, fatal):
    passed = 0

    def fault_point(name):
        nonlocal passed
        passed += name.startswith("checkpoint.")
        if passed == fatal > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    faults.fault_point = fault_point
    values = apply_overrides(read_recipe("train", recipe), [*settings, f"run={run}"])
    train.run(build_train_recipe(values), resume=True)
    (folder / "passed").write_text(str(passed))

def in_child(run, fatal):
    pid = os.fork()
    if not pid:
        try:
            child(run, fatal)
            os._exit(0)
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert in_child(folder / "whole", 0) == 0
last = int((folder / "passed").read_text())
for fatal in range(1, last + 1, every):
    ended = in_child(folder / f"died-{fatal}", fatal), in_child(folder / f"died-{fatal}", 0)
    assert ended == (-signal.SIGKILL, 0), (fatal, ended)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_dies_while_it_saves_ends_as_if_it_had_not(recipe: str, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the script imports DALI before it forks")
    settings = [*COMMON, *RECIPES[recipe], f"dataset={dataset}", "steps=9", "checkpoint_every=3", "processes=1"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", DIE, recipe, str(tmp_path), "25", *settings],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    died = list(tmp_path.glob("died-*"))
    assert len(died) > 3
    weights = load_file(tmp_path / "whole" / "last" / "model.safetensors")
    for run in died:
        assert logged(run) == logged(tmp_path / "whole"), run.name
        ours = load_file(run / "last" / "model.safetensors")
        assert all(torch.equal(ours[key], weights[key]) for key in weights), run.name
        assert not list(run.rglob(".tmp-*"))
        shutil.rmtree(run)
