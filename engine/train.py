"""`engine train`: dataset to run. Starts the ranks, or is one of those that torchrun started."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

from engine.config import UsageError
from engine.data.regions import check_views
from engine.data.selection import open_datasets, select
from engine.data.weighted import class_shares
from engine.recipes import TrainRecipe
from engine.rundir import prepare_run, read_metrics
from engine.runtime import die_with_parent, ranks_from_environment, usable_cores
from engine.stopping import SIGNALS, Stopped, StopRequest
from sharding.lock import folder_lock

_MEAN_OF = 5


def run(recipe: TrainRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Train and return {run, steps, start_step, samples_seen, replaced, loss_first, loss_last, checkpoint}.

    `loss_first` and `loss_last` are means over the first and last five logged steps of the whole run.
    Raises UsageError before any process starts where recipe, dataset and run folder do not fit together, and Stopped
    after SIGTERM or SIGUSR1, once the run is saved.
    """
    request = StopRequest()
    with request.on_signals():
        return _run(recipe, resume, request)


def _run(recipe: TrainRecipe, resume: bool, request: StopRequest) -> dict[str, Any]:
    datasets = tuple(each.expanduser().resolve() if isinstance(each, Path) else each for each in recipe.datasets)
    places: dict[str, Any] = {
        "dataset": datasets if len(datasets) > 1 else datasets[0],
        "run": recipe.run.expanduser().resolve(),
    }
    if recipe.cache is not None:
        places["cache"] = recipe.cache.expanduser().resolve()
    if recipe.weights is not None:
        places["weights"] = recipe.weights.expanduser().resolve()
        if not places["weights"].is_file():
            raise UsageError(f"weights={recipe.weights}: there is no such file.")
    recipe = recipe.model_copy(update=places)
    _check_datasets(recipe)
    given = ranks_from_environment()
    if given is not None:
        return _as_given_rank(recipe, request, resume=resume, rank=given[0], world_size=given[2])
    made = not recipe.run.exists()
    recipe.run.mkdir(parents=True, exist_ok=True)
    with folder_lock(recipe.run):
        prepare_run(recipe, resume=resume)
        processes = _processes(recipe)
        if recipe.batch_size % processes:
            if made:
                shutil.rmtree(recipe.run)
            raise UsageError(f"batch_size={recipe.batch_size} does not divide evenly over {processes} processes.")
        return train_rank(recipe, request) if processes == 1 else _launch(recipe, processes, request)


def _check_datasets(recipe: TrainRecipe) -> None:
    try:
        datasets = open_datasets(recipe.datasets, cache=recipe.cache, cache_bytes=recipe.cache_bytes)
        locality = recipe.locality.made() if recipe.locality else None
        check_views(datasets, recipe.crop_views(), locality=locality, bad_samples=recipe.bad_samples)
        selection = select(datasets, where=recipe.where, by=recipe.balance)
        if recipe.balance is not None:
            class_shares(selection.labels, recipe.balance_weights)
        if recipe.objective == "supervised":
            from engine.objectives.supervised import labels_of

            labels_of(recipe)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _processes(recipe: TrainRecipe) -> int:
    if recipe.processes != "auto":
        return recipe.processes
    import torch

    return max(1, torch.cuda.device_count())


def _as_given_rank(
    recipe: TrainRecipe, request: StopRequest, *, resume: bool, rank: int, world_size: int
) -> dict[str, Any]:
    if recipe.batch_size % world_size:
        raise UsageError(f"batch_size={recipe.batch_size} does not divide evenly over {world_size} processes.")
    if rank != 0:
        return train_rank(recipe, request)
    recipe.run.mkdir(parents=True, exist_ok=True)
    with folder_lock(recipe.run):
        prepare_run(recipe, resume=resume)
        return train_rank(recipe, request)


def _launch(recipe: TrainRecipe, processes: int, request: StopRequest) -> dict[str, Any]:
    """Start `processes` ranks on this machine under torchrun's agent and return rank 0's result.

    A signal reaches them through `request`: they stop by themselves, and the agent only waits for them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent logs a child's whole traceback; the child's error itself is told below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=recipe.run.name,
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        shutdown_timeout=1,
    )
    try:
        results: dict[int, dict[str, Any]] = elastic_launch(config, _launched_rank)(recipe, os.getpid(), request)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RuntimeError(f"rank {rank} failed: {_failure_text(failure)}") from None
    if "stopped" in results[0]:
        raise Stopped(results[0]["stopped"])
    return results[0]


def _failure_text(failure: Any) -> str:
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", message)
    text = " ".join(str(message).split())
    return text if text and text != "None" else f"it ended with exit code {failure.exitcode}"


def _launched_rank(recipe: TrainRecipe, launcher_pid: int, request: StopRequest) -> dict[str, Any]:
    die_with_parent(launcher_pid)
    # A terminal sends Ctrl-C to every process, and a scheduler its signals; the launcher alone answers them.
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    try:
        return train_rank(recipe, request)
    except Stopped as stopped:
        return {"stopped": str(stopped)}


def train_rank(recipe: TrainRecipe, request: StopRequest) -> dict[str, Any]:
    """One rank's part of a run; the run folder has been prepared. Every rank returns the same shape."""
    import torch

    from engine.data import Balance, open_loader
    from engine.objectives import make_objective
    from engine.runtime import Runtime
    from engine.trainer import process_group, train

    runtime = Runtime.detect(recipe.precision)
    if runtime.world_size > 1:
        torch.set_num_threads(max(1, usable_cores() // runtime.world_size))
        # A 1x1 convolution's gradient has two equally valid stride orders; DDP warns on every rank about it.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    objective = make_objective(recipe)
    with process_group(runtime):
        if runtime.world_size > 1:
            torch.distributed.barrier()  # ranks that torchrun started wait for rank 0 to prepare the run folder
        loader = open_loader(
            recipe.datasets,
            batch_size_per_rank=recipe.batch_size // runtime.world_size,
            views=recipe.crop_views(),
            backend=recipe.loader,
            seed=recipe.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            where=recipe.where,
            balance=Balance(recipe.balance, recipe.balance_weights) if recipe.balance else None,
            locality=recipe.locality.made() if recipe.locality else None,
            bad_samples=recipe.bad_samples,
            cache=recipe.cache,
            cache_bytes=recipe.cache_bytes,
        )
        with loader:
            objective.mpp = loader.mpp
            start, seen, replaced = train(recipe, runtime, objective, loader, request)
    losses = [line["loss"] for line in read_metrics(recipe.run)]
    return {
        "run": str(recipe.run),
        "steps": recipe.steps,
        "start_step": start,
        "samples_seen": seen,
        "replaced": replaced,
        "loss_first": _mean(losses[:_MEAN_OF]),
        "loss_last": _mean(losses[-_MEAN_OF:]),
        "checkpoint": str((recipe.run / "last").resolve()),
        "loader": loader.backend,
        "device": runtime.device,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def describe(result: dict[str, Any]) -> str:
    """The result for a person."""
    first, last = (
        f"{value:.4f}" if value is not None else "none" for value in (result["loss_first"], result["loss_last"])
    )
    replaced = f"{result['replaced']} bad samples were replaced; `engine verify` lists what is damaged"
    return "\n".join(
        [
            f"{result['run']}: step {result['steps']}, {result['samples_seen']} samples seen "
            f"({result['loader']} loader, {result['device']})",
            f"  loss at the start {first}, at the end {last} (means of {_MEAN_OF} steps)",
            f"  checkpoint {result['checkpoint']}",
            *([f"  {replaced}"] if result["replaced"] else []),
        ]
    )
