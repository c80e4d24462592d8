"""`engine train`: dataset to run; `launch.py` starts the ranks, and each does `train_rank`."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint import WEIGHTS
from engine.config import UsageError
from engine.data.regions import check_views
from engine.data.selection import open_datasets, select
from engine.data.weighted import class_shares
from engine.errors import is_out_of_memory
from engine.launch import Nodes, as_given_rank, given_ranks, launch, quiet_unless_main
from engine.recipes import TrainRecipe
from engine.rundir import read_metrics
from engine.stopping import StopRequest

if TYPE_CHECKING:
    from engine.data.opening import StreamLoader
    from engine.runtime import Runtime

_MEAN_OF = 5


def run(recipe: TrainRecipe, *, resume: bool = False, nodes: Nodes | None = None) -> dict[str, Any]:
    """Train and return {run, steps, start_step, samples_seen, replaced, loss_first, loss_last, checkpoint}.

    `loss_first` and `loss_last` are means over the first and last five logged steps of the whole run. Where this is not
    rank 0, nor its machine's launcher, the result is {}.
    Raises UsageError before any process starts where recipe, dataset and run folder do not fit together, and Stopped
    after SIGTERM or SIGUSR1, once the run is saved.
    """
    request = StopRequest()
    with request.on_signals():
        return _run(recipe, resume, nodes, request)


def _run(recipe: TrainRecipe, resume: bool, nodes: Nodes | None, request: StopRequest) -> dict[str, Any]:
    datasets = tuple(each.expanduser().resolve() if isinstance(each, Path) else each for each in recipe.datasets)
    places: dict[str, Any] = {
        "dataset": datasets if len(datasets) > 1 else datasets[0],
        "run": recipe.run.expanduser().resolve(),
    }
    if recipe.cache is not None:
        places["cache"] = recipe.cache.expanduser().resolve()
    if recipe.weights is not None:
        places["weights"] = _weights_file(recipe.weights)
    recipe = recipe.model_copy(update=places)
    ranks = given_ranks(nodes)
    if ranks is None or ranks.rank == 0:
        _check_datasets(recipe)
    main = partial(train_rank, request=request)
    if ranks is not None:
        return as_given_rank(recipe, main, ranks, resume=resume)
    return launch(recipe, main, nodes or Nodes(), processes=_processes(recipe), resume=resume)


def _weights_file(place: Path) -> Path:
    """The file that is meant: `place`, or the weights in it where it is a run or a checkpoint."""
    path = place.expanduser().resolve()
    for file in (path, path / "last" / WEIGHTS, path / WEIGHTS):
        if file.is_file():
            return file.resolve()
    raise UsageError(f"weights={place}: there is no such file, nor a run or a checkpoint with {WEIGHTS} in it.")


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


def train_rank(recipe: TrainRecipe, request: StopRequest) -> dict[str, Any]:
    """One rank's part of a run; the run folder has been prepared. Every rank returns the same shape."""
    try:
        return _train_rank(recipe, request)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        found = " ".join(str(error).split("\n", 1)[0].split())
        raise RuntimeError(
            f"out of memory ({found or 'no more could be had'}) with batch_size={recipe.batch_size} and "
            f"accumulate={recipe.accumulate}: raise accumulate, set checkpoint_activations=true or precision=bf16, "
            "lower batch_size, or take a smaller model"
        ) from error


def _train_rank(recipe: TrainRecipe, request: StopRequest) -> dict[str, Any]:
    import torch

    from engine.objectives import make_objective
    from engine.runtime import Runtime, process_group
    from engine.trainer import train
    from engine.watchdog import Watchdog

    runtime = Runtime.detect(recipe.precision)
    if runtime.world_size > 1:
        torch.set_num_threads(runtime.cores)
        # A 1x1 convolution's gradient has two equally valid stride orders; DDP warns on every rank about it.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    objective = make_objective(recipe)
    watchdog = Watchdog(runtime.rank, recipe.watchdog_s, folder=recipe.run, world_size=runtime.world_size)
    with quiet_unless_main(), watchdog, process_group(runtime, timeout_s=watchdog.longest_s):
        if runtime.world_size > 1:
            torch.distributed.barrier()  # ranks that torchrun started wait for rank 0 to prepare the run folder
        loader = open_train_loader(recipe, runtime)
        with loader:
            objective.mpp = loader.mpp
            start, seen, replaced = train(recipe, runtime, objective, loader, request, watchdog)
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


def open_train_loader(recipe: TrainRecipe, runtime: Runtime) -> StreamLoader:
    """This rank's part of the recipe's stream of batches, from its beginning; raises what `open_loader` does."""
    from engine.data import Balance, open_loader

    return open_loader(
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
        threads=min(16, runtime.cores),
        # A model on the CPU has all cores at work: the less runs beside it, the less it waits for its own threads.
        prefetch=2 if runtime.device.startswith("cuda") else 1,
    )


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
