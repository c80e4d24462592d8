"""The training loop: one for every objective; it knows no model by name.

A step is: take a batch, ask the objective for its loss, step the optimiser. All randomness is a function of the seed
and of stream positions, so the state of a run is its weights, its optimiser and one integer, `seen`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from engine.console import progress
from engine.data.batches import PatchBatch
from engine.data.opening import StreamLoader
from engine.optim import learning_rate, make_optimizer, set_learning_rate
from engine.recipes import TrainRecipe
from engine.rundir import METRICS, step_of
from engine.runtime import Runtime
from engine.watchdog import Watchdog
from sharding.faults import fault_point

# (model, batch, positions of the batch's samples in the stream) -> scalars; "loss" is what is minimised.
Objective = Callable[[nn.Module, PatchBatch, npt.NDArray[np.int64]], dict[str, Tensor]]


def train(
    recipe: TrainRecipe,
    runtime: Runtime,
    model: nn.Module,
    objective: Objective,
    loader: StreamLoader,
    watchdog: Watchdog,
) -> tuple[int, int, int]:
    """Train up to `recipe.steps` optimiser steps, from the run's last checkpoint if it has one.

    Every rank calls this. Returns (step it started from, samples seen, bad samples replaced in the whole run), the last
    two of all ranks together.
    Raises RuntimeError where the loss is not finite.
    """
    device = torch.device(runtime.device)
    model.to(device)
    optimizer = make_optimizer(model, recipe.optim)
    start, replaced_before = _restore(recipe.run, model, optimizer, loader)
    replaced = replaced_before
    parallel = _parallel(model, runtime)
    share = recipe.batch_size // runtime.world_size
    if runtime.world_size > 1 and start < recipe.steps:
        _settle_buckets(parallel, objective, loader, recipe, runtime)
    model.train()
    # Not every model has one: whatever follows the weights without gradients, such as a teacher, moves here.
    after_step: Callable[[int, int], None] | None = getattr(model, "after_step", None)
    steps = range(start, recipe.steps)
    with _Log(recipe, runtime, start) as log:
        for step in steps:
            fault_point("train.step")
            began = time.monotonic()
            batch = next(loader)
            waited = time.monotonic() - began
            first = loader.seen - recipe.batch_size + runtime.rank * share
            rate = learning_rate(step, recipe.steps, recipe.optim)
            set_learning_rate(optimizer, rate)
            with torch.autocast(device.type, dtype=runtime.dtype, enabled=runtime.dtype_name != "float32"):
                values = objective(parallel, batch, np.arange(first, first + share))
            values["loss"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm)
            saved = (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps
            logged = (step + 1) % recipe.log_every == 0 or step + 1 == recipe.steps
            # Looking at the loss waits for the GPU, so it is done where it is shown, and before it is kept.
            means = _mean_over_ranks({**values, "grad_norm": norm}, runtime) if logged or saved else {}
            if means and not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
                raise RuntimeError(
                    f"the loss is {means['loss']} at step {step + 1} (learning rate {rate:.3g}, gradient norm "
                    f"{means['grad_norm']:.3g}): lower optim.lr and start anew; to go on from an earlier checkpoint, "
                    f"remove the later ones from {recipe.run / 'checkpoints'}"
                )
            if means and recipe.bad_samples == "replace":
                replaced = replaced_before + _sum_over_ranks(len(loader.replacements), runtime)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step(step + 1, recipe.steps)
            counts = {"seen": loader.seen, "replaced": replaced}
            log.step(step + 1, means if logged else {}, rate, counts, waited, time.monotonic() - began)
            if saved:
                _save(recipe, runtime, step + 1, model, optimizer, loader, replaced)
            watchdog.beat(step + 1)
    return start, loader.seen, replaced


def _restore(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loader: StreamLoader) -> tuple[int, int]:
    """Return the step of the run's last checkpoint and the samples replaced until then; 0 and 0 without one."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        return 0, 0
    state = load_checkpoint(checkpoint, model)
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    return step_of(checkpoint), int(state["replaced"])


def _save(
    recipe: TrainRecipe,
    runtime: Runtime,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: StreamLoader,
    replaced: int,
) -> None:
    if runtime.is_main:
        state = {
            "step": step,
            "seen": loader.seen,
            "replaced": replaced,
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict(),
            "world_size": runtime.world_size,
        }
        save_checkpoint(recipe.run, step, model, state)
    if runtime.world_size > 1:
        torch.distributed.barrier()


def _parallel(model: nn.Module, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return model
    device = torch.device(runtime.device)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _settle_buckets(
    parallel: nn.Module, objective: Objective, loader: StreamLoader, recipe: TrainRecipe, runtime: Runtime
) -> None:
    """One backward pass that changes nothing, right after wrapping.

    DDP orders its buckets anew after the first backward, which changes the order of sums with three and more ranks; a
    resumed run would then differ from an uninterrupted one in the last bits of its first step.
    """
    share = recipe.batch_size // runtime.world_size
    images = [torch.zeros((share, 3, view.size_px, view.size_px), device=runtime.device) for view in loader.views]
    rows = torch.zeros(share, dtype=torch.int64)
    batch = PatchBatch(images, rows, np.zeros(share, np.uint64))
    objective(parallel, batch, np.arange(share))["loss"].backward()
    parallel.zero_grad(set_to_none=True)


def _mean_over_ranks(values: dict[str, Tensor], runtime: Runtime) -> dict[str, float]:
    names = sorted(values)
    stacked = torch.stack([values[name].detach().float() for name in names])
    if runtime.world_size > 1:
        torch.distributed.all_reduce(stacked)
        stacked /= runtime.world_size
    return dict(zip(names, stacked.tolist(), strict=True))


def _sum_over_ranks(count: int, runtime: Runtime) -> int:
    if runtime.world_size == 1:
        return count
    total = torch.tensor(count, device=runtime.device)
    torch.distributed.all_reduce(total)
    return int(total)


class _Log:
    """metrics.jsonl, TensorBoard and the progress line, written by rank 0 alone."""

    def __init__(self, recipe: TrainRecipe, runtime: Runtime, start: int) -> None:
        self._recipe = recipe
        self._main = runtime.is_main
        self._start = start
        self._stack = contextlib.ExitStack()
        self._waited = self._total = 0.0
        self._steps = 0

    def __enter__(self) -> _Log:
        if self._main:
            from torch.utils.tensorboard import SummaryWriter

            self._file = self._stack.enter_context(open(self._recipe.run / METRICS, "a", encoding="utf-8"))
            # purge_step hides what an interrupted run logged beyond the checkpoint that this one goes on from.
            folder = str(self._recipe.run / "tensorboard")
            self._board = self._stack.enter_context(SummaryWriter(folder, purge_step=self._start + 1))
            total = self._recipe.steps - self._start
            self._advance = self._stack.enter_context(progress("train", total, "steps"))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def step(
        self, step: int, means: dict[str, float], rate: float, counts: dict[str, int], waited: float, total: float
    ) -> None:
        """Note one step; `means` is empty for a step that is not logged. Times in seconds, this rank's."""
        if not self._main:
            return
        self._waited += waited
        self._total += total
        self._steps += 1
        if not means:
            self._advance(1, "")
            return
        speed = self._steps * self._recipe.batch_size / max(self._total, 1e-9)
        share = self._waited / max(self._total, 1e-9)
        self._waited = self._total = 0.0
        self._steps = 0
        line = {"step": step, **_rounded(means), "lr": rate, **counts}
        line |= {"samples_per_s": round(speed, 2), "data_wait": round(share, 4)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        note = f"loss {means['loss']:.4f}  {speed:.0f} samples/s  waiting for data {100 * share:.0f} %"
        self._advance(1, note)


def _rounded(means: dict[str, float]) -> dict[str, float]:
    # Losses keep all their digits: two runs are compared by them.
    return {name: value if name == "loss" else float(f"{value:.6g}") for name, value in means.items()}
