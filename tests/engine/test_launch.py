"""Ranks as real processes: killed, stalled, started by SLURM's and torchrun's variables, on one machine and on two."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from engine import shard, synth
from engine.config import UsageError
from engine.launch import Nodes, given_ranks
from engine.recipes import ShardRecipe
from engine.runtime import Runtime, lost_connection, meet, process_group
from engine.watchdog import read_heartbeats

BIN = Path(sys.executable).parent
SMALL = ("batch_size=8", "model.dim=32", "model.depth=2", "steps=40", "checkpoint_every=10")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    synth.run(folder / "slides", slides=2, size=1536, workers=1)
    shard.run(ShardRecipe(slides=str(folder / "slides"), out=folder / "dataset", workers=1), local=True)
    return folder / "dataset"


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    command = [str(BIN / "engine"), *_arguments(dataset, run), "processes=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return run


def _arguments(dataset: Path, run: Path, *more: str) -> list[str]:
    return ["train", "train/vittm_hmr_tiny", f"dataset={dataset}", f"run={run}", "--json", *SMALL, *more]


@pytest.fixture
def start(dataset: Path, tmp_path: Path) -> Iterator[Start]:
    """Start `engine train` on `tmp_path/run`; what is left of it is killed at the end, with all that it started."""
    started: list[subprocess.Popen[str]] = []

    def starting(*settings: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        command = [*before, str(BIN / "engine"), *_arguments(dataset, tmp_path / "run", *settings)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield starting
    for process in started:
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _finish(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return json.loads(out) if out else {}, errors


def _wait(what: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _same_end(one: Path, other: Path) -> None:
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)
    ]
    assert losses[0] == losses[1]
    left, right = (load_file(run / "last" / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


# --- a rank is killed


@pytest.mark.slow
def test_a_killed_rank_is_started_anew_and_the_run_ends_as_if_nothing_had_been(
    start: Start, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(
        "processes=2",
        "--max-restarts",
        "2",
        ENGINE_FAULT="train.step:35:stall",
        ENGINE_FAULT_ONCE=str(tmp_path / "once"),
    )
    _wait((run / "checkpoints" / "step-00000030").exists)
    _wait((tmp_path / "once").exists)  # one rank stays at step 35 now, so that the kill cannot come too late
    ranks = read_heartbeats(run)
    os.kill(ranks[1].pid, signal.SIGKILL)
    result, errors = _finish(process)
    assert result["start_step"] in (0, 30)  # the first rank's own start, or that of the restart
    assert "restart 1 of 2 goes on from the last checkpoint" in errors
    assert "Traceback" not in errors
    _same_end(run, straight)
    assert not any(_alive(each.pid) for each in ranks.values())
    assert not (run / ".lock").exists()
    assert not (run / ".heartbeat").exists()


@pytest.mark.slow
def test_without_restarts_the_killed_rank_is_named_and_none_lives_on(start: Start, tmp_path: Path) -> None:
    process = start("processes=2", ENGINE_FAULT="train.step:25", ENGINE_FAULT_RANK="1")
    ranks = _wait(lambda: len(found := read_heartbeats(tmp_path / "run")) == 2 and found)
    _, errors = _finish(process, 1)
    (told,) = [line for line in errors.splitlines() if line.startswith("engine:")]
    assert told.startswith("engine: rank 1 on ")
    assert "was killed by SIGKILL" in told
    assert "--max-restarts" in told
    assert "gloo" not in errors, "the other rank's error is a consequence"
    assert not any(_alive(each.pid) for each in ranks.values())


@pytest.mark.slow
def test_after_a_kill_of_the_launcher_no_rank_of_a_restart_lives_on(start: Start, tmp_path: Path) -> None:
    process = start("processes=2", "steps=100000", "--max-restarts", "2")
    first = _wait(lambda: len(found := read_heartbeats(tmp_path / "run")) == 2 and found)
    os.kill(first[0].pid, signal.SIGKILL)

    def again() -> Any:
        found = read_heartbeats(tmp_path / "run")
        return (
            len(found) == 2
            and not {each.pid for each in found.values()} & {each.pid for each in first.values()}
            and found
        )

    second = _wait(again)
    process.kill()
    process.wait()
    _wait(lambda: not any(_alive(each.pid) for each in second.values()), 30)


# --- a rank stalls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "said"), [("train.step:6", "in fault_point"), ("loader.read:20", "waiting for data at engine/data/")]
)
def test_a_rank_that_stalls_is_named_and_ends_the_run(start: Start, point: str, said: str) -> None:
    process = start("processes=2", "watchdog_s=15", ENGINE_FAULT=f"{point}:stall", ENGINE_FAULT_RANK="1")
    _, errors = _finish(process, 1)
    (told,) = [line for line in errors.splitlines() if line.startswith("engine:")]
    assert told.startswith("engine: rank 1 on ")
    assert said in told
    assert "no step was done for" in told
    assert "rank 0" not in told
    assert "the main thread of this rank is here" in errors


@pytest.mark.slow
def test_a_stall_without_a_launcher_ends_the_process(start: Start) -> None:
    process = start("processes=1", "watchdog_s=15", ENGINE_FAULT="train.step:6:stall")
    _, errors = _finish(process, 1)
    assert "engine: rank 0 on " in errors
    assert "stalls after step 5, at sharding/faults.py" in errors


# --- ranks that others started


def _slurm(rank: int, **more: str) -> dict[str, str]:
    given = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2"}
    return {**given, **job, **more}


@pytest.mark.slow
def test_tasks_of_srun_are_the_ranks_and_rank_0_alone_speaks(start: Start, straight: Path, tmp_path: Path) -> None:
    tasks = [start(**_slurm(rank)) for rank in (1, 0)]
    (silent, quiet), (result, _) = (_finish(task) for task in tasks)
    assert (silent, quiet) == ({}, "")
    assert result["samples_seen"] == 320
    _same_end(tmp_path / "run", straight)


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_started_anew(start: Start, straight: Path, tmp_path: Path) -> None:
    torchrun = (str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "2", "--no-python")
    once = str(tmp_path / "once")
    process = start(before=torchrun, ENGINE_FAULT="train.step:25", ENGINE_FAULT_RANK="1", ENGINE_FAULT_ONCE=once)
    result, errors = _finish(process)
    assert result["start_step"] == 20
    assert "restart 1 of 2" in errors
    _same_end(tmp_path / "run", straight)


def test_one_task_of_srun_is_a_plain_machine_and_nnodes_makes_it_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, **_slurm(1)})
    assert given_ranks(Nodes(2, 2, ("localhost", 1))) is None
    os.environ["SLURM_NTASKS"] = "1"
    assert given_ranks(None) is None
    os.environ["SLURM_NTASKS"] = "2"
    with pytest.raises(UsageError, match="--nnodes"):
        given_ranks(Nodes(max_restarts=3))
    assert given_ranks(None) == (1, 1, 2, 2)


# --- several machines, which are two launchers of this one


@pytest.mark.slow
def test_two_machines_meet_and_outlive_the_kill_of_a_rank(start: Start, straight: Path, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    fault = {"ENGINE_FAULT": "train.step:25", "ENGINE_FAULT_RANK": "1", "ENGINE_FAULT_ONCE": str(tmp_path / "once")}
    asked = ("processes=1", "--nnodes", "2", "--rdzv", f"localhost:{_free_port()}", "--max-restarts", "2")
    # A core for each, as if they were two: threads that share them would wait for each other.
    nodes = [start(*asked, before=("taskset", "-c", str(cores[place % len(cores)])), **fault) for place in (0, 1)]
    results = [_finish(node)[0] for node in nodes]
    (result,) = [each for each in results if each]
    assert result["start_step"] == 20
    _same_end(tmp_path / "run", straight)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_number_of_machines_that_does_not_divide_the_batch_is_refused_by_all(start: Start) -> None:
    port = _free_port()
    asked = ("processes=1", "batch_size=9", "--nnodes", "1:2", "--rdzv", f"localhost:{port}", "--max-restarts", "2")
    for node in [start(*asked), start(*asked)]:
        _, errors = _finish(node, 2)
        assert "batch_size=9 does not divide evenly over 2 processes. That many came together" in errors


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


# --- what is refused, and what it is called


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (("0", "a:1", None), "expected a number of machines"),
        (("3:2", "a:1", None), "MIN:MAX"),
        (("two", "a:1", None), "--nnodes two"),
        (("2", None, None), "without --rdzv"),
        (("2", "host:", None), "HOST or HOST:PORT"),
        (("2", "host:70000", None), "HOST or HOST:PORT"),
    ],
)
def test_machines_that_cannot_be_are_refused(
    asked: tuple[str | None, str | None, str | None], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UsageError, match=match):
        Nodes.parse(*asked, 0)


def test_machines_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Nodes.parse(None, None, None, 0) is None
    assert Nodes.parse(None, None, None, 2) == Nodes(max_restarts=2)
    assert Nodes.parse("2:4", "node01", "job", 1) == Nodes(2, 4, ("node01", 29_400), "job", 1)
    assert Nodes.parse("1", "node01:99", None, 0) == Nodes()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[3-4]")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert Nodes.parse("2", None, None, 0) == Nodes(2, 2, ("node3", 12_007))


@pytest.mark.slow
def test_a_run_in_use_is_refused_with_who_holds_it(start: Start, tmp_path: Path) -> None:
    first = start("processes=2", "steps=100000")
    _wait((tmp_path / "run" / "metrics.jsonl").exists)
    _, errors = _finish(start("processes=2", "steps=100000", "--resume"), 1)
    assert f"is being written by process {first.pid} on " in errors


def test_options_of_a_launcher_are_refused_under_torchrun(start: Start, tmp_path: Path) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    _, errors = _finish(start("--max-restarts", "2", **ranks), 2)
    assert "give them to torchrun" in errors
    assert not (tmp_path / "run").exists()


# --- meeting


def _meet(store: HashStore, world_size: int) -> dict[int, Any]:
    found: dict[int, Any] = {}

    def join(rank: int) -> None:
        found[rank] = meet(store, rank, world_size, join_s=60)
        found[rank].set(str(rank), f"{threading.get_ident()}")

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_meet_again_read_no_word_of_the_ranks_before() -> None:
    store = HashStore()
    first = _meet(store, 3)
    assert all(first[0].check([str(rank)]) for rank in range(3))
    second = _meet(store, 3)
    assert all(second[0].get(str(rank)) == second[2].get(str(rank)) for rank in range(3))
    third = meet(store, 0, 1, join_s=1)
    assert not third.check(["0"])


def test_those_who_do_not_come_are_named() -> None:
    store = HashStore()
    with pytest.raises(RuntimeError, match=r"of 3 ranks these have not come within 0.2 s: 1, 2\."):
        meet(store, 0, 3, join_s=0.2)
    with pytest.raises(RuntimeError, match=r"of 3 ranks these have not come within 0.2 s: 0\."):
        meet(store, 1, 3, join_s=0.2)


def test_a_rank_that_finds_nobody_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    port = _free_port()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    group = process_group(Runtime("cpu", "float32", 1, 1, 2), join_s=1)
    with pytest.raises(RuntimeError, match=f"rank 1 does not reach rank 0 at localhost:{port}"), group:
        pass


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("engine.runtime.usable_cores", lambda: 24)
    assert Runtime("cpu", "float32", 5, 1, 8, 4).cores == 6
    assert Runtime("cpu", "float32", 5, 1, 64, 64).cores == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert Runtime("cpu", "float32", 5, 1, 8, 4).cores == 8
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launched within the task")
    assert Runtime("cpu", "float32", 5, 1, 8, 4).cores == 6


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:552] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("the loss is nan"), False),
        (OSError("gloo/"), False),
    ],
)
def test_which_errors_are_of_another_ranks_making(error: Exception, expected: bool) -> None:
    assert lost_connection(error) is expected


# --- numbers


GRADIENTS = """
import sys
import torch
from engine import train as verb
from engine.config import apply_overrides, read_recipe
from engine.train_recipe import build_train_recipe

RECIPE, *SETTINGS = sys.argv[1:]
train_rank = verb.train_rank

def keeping(recipe, *arguments, **more):
    step = torch.optim.AdamW.step

    def note(optimizer, *given, **also):
        gradients = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        torch.save(gradients, recipe.run / "gradients.pt")
        return step(optimizer, *given, **also)

    torch.optim.AdamW.step = note
    return train_rank(recipe, *arguments, **more)

if __name__ == "__main__":
    verb.train_rank = keeping
    verb.run(build_train_recipe(apply_overrides(read_recipe("train", RECIPE), SETTINGS)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("train/vittm_hmr_tiny", ("model.dim=32",)),  # with the shipped target_norm, over the batch of all ranks
        (
            "train/hipt_patch_dino_tiny",
            ("model.dim=24", "crop_px=64", "dino.small_px=32", "dino.drop_path=0.3", "dino.freeze_last_layer_steps=0"),
        ),
    ],
)
def test_two_ranks_have_the_gradients_of_one(recipe: str, more: tuple[str, ...], dataset: Path, tmp_path: Path) -> None:
    """As they are, unclipped. Stochastic depth is drawn by each rank for itself, so it is off."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        settings = [f"dataset={dataset}", f"run={run}", "batch_size=8", "model.depth=2", *more]
        settings += ["steps=1", "optim.warmup_steps=0", "optim.clip_norm=1e9", f"processes={processes}"]
        command = [sys.executable, "-P", str(script), recipe, *settings]
        subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        found.append(torch.load(run / "gradients.pt"))
    assert len(found[0]) == len(found[1]) > 10
    for one, two in zip(*found, strict=True):
        assert torch.linalg.norm(one - two) <= 1e-6 * torch.linalg.norm(one) + 1e-12
