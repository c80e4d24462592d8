"""The training loop: one for every objective; it knows no model by name.

A step is: take a batch, ask the objective for its loss, step the optimiser. All randomness is a function of the seed
and of stream positions, so the state of a run is its weights, its optimiser and one integer, `seen`.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from engine.checkpoint import checkpoint_folder, last_checkpoint, load_checkpoint, step_of
from engine.data.batches import PatchBatch
from engine.data.opening import StreamLoader
from engine.objectives import Objective
from engine.optim import Schedules, clip, make_average, make_optimizer
from engine.recipes import TrainRecipe
from engine.runtime import Runtime
from engine.saving import Checkpoints
from engine.stopping import Agreement, Stopped, StopRequest
from engine.train_log import TrainLog
from engine.watchdog import Watchdog
from engine.watching import watch_features
from sharding.faults import fault_point

_MOST_SKIPPED = 50  # steps in a row that a scaler may skip before the run stops


@dataclass(slots=True)
class _Parts:
    """What a run's state is made of, beside the loader."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None


def train(
    recipe: TrainRecipe,
    runtime: Runtime,
    objective: Objective,
    loader: StreamLoader,
    request: StopRequest,
    watchdog: Watchdog,
) -> tuple[int, int, int]:
    """Train up to `recipe.steps` optimiser steps, from the run's last checkpoint if it has one.

    Every rank calls this. Returns (step it started from, samples seen, bad samples replaced in the whole run), the last
    two of all ranks together.
    Raises RuntimeError where the loss is not finite, and Stopped, once the run is saved, after a `request` to stop.
    """
    device = torch.device(runtime.device)
    model = objective.model.to(device)
    if device.type == "cuda":
        model = objective.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    parts = _Parts(
        model,
        make_optimizer(model, recipe.optim),
        torch.amp.GradScaler(device.type, enabled=runtime.dtype_name == "float16"),
        make_average(model, recipe.ema_momentum),
    )
    agreement = Agreement(runtime, 2)
    checkpoints = Checkpoints(recipe, runtime, loader.backend)
    start, replaced_before = _restore(recipe.run, runtime, agreement, parts, objective, loader, checkpoints)
    replaced = replaced_before
    if recipe.compile:
        objective.compile()
    model.train()
    parallel = _parallel(model, runtime)
    stepper = _Stepper(recipe, runtime, objective, parallel, parts)
    if runtime.world_size > 1 and start < recipe.steps:
        stepper.settle_buckets(loader)
    share = recipe.batch_size // runtime.world_size
    saved = False
    with TrainLog(recipe, runtime, start) as log:
        for step in range(start, recipe.steps):
            fault_point("train.step")
            began = time.monotonic()
            batch = next(loader)
            waited = time.monotonic() - began
            first = loader.seen - recipe.batch_size + runtime.rank * share
            last_step = step + 1 == recipe.steps
            logged = (step + 1) % recipe.log_every == 0 or last_step
            rate, values, features = stepper.gradients(batch, np.arange(first, first + share), step)
            stop, overdue = agreement.largest(request.number, checkpoints.is_overdue)
            regular = checkpoints.is_regular(step + 1)
            # With several ranks this was said after the step before, of a time before that step was saved.
            saved = regular or bool(stop or (overdue and not saved))
            # Looking at the loss waits for the GPU, so it is done where it is shown, and before it is kept.
            means = _mean_over_ranks(values, runtime) if logged or saved else {}
            if means:
                stepper.check_finite(means, step, rate)
                if logged or regular:
                    checkpoints.observe(means)
                if recipe.bad_samples == "replace":
                    replaced = replaced_before + _sum_over_ranks(len(loader.replacements), runtime)
                if runtime.is_main and features is not None and ((step + 1) % recipe.watch_every == 0 or last_step):
                    means |= watch_features(features)
            stepper.update(step)
            counts = {"seen": loader.seen, "replaced": replaced}
            log.step(step + 1, means if logged else {}, rate, counts, waited, time.monotonic() - began)
            if saved:
                _save(checkpoints, runtime, step + 1, parts, objective, loader, replaced)
            watchdog.beat(step + 1)
            if stop and not last_step:
                raise Stopped.by_signal(stop, step + 1, recipe.steps)
    return start, loader.seen, replaced


class _Stepper:
    """One optimiser step, in its two halves: up to the gradients, and what is made of them."""

    def __init__(
        self, recipe: TrainRecipe, runtime: Runtime, objective: Objective, parallel: nn.Module, parts: _Parts
    ) -> None:
        self._recipe, self._runtime = recipe, runtime
        self._objective, self._parallel, self._parts = objective, parallel, parts
        self._schedules = Schedules(recipe.optim, recipe.steps)
        self._skipped = 0

    def gradients(
        self, batch: PatchBatch, positions: np.ndarray[Any, np.dtype[np.int64]], step: int
    ) -> tuple[float, dict[str, Tensor], Tensor | None]:
        """Clipped gradients of a batch: (learning rate, scalars of this rank, features to watch).

        A batch in parts has each part's loss weighted by its share of samples, so that parts may differ in size.
        """
        recipe, runtime, parts = self._recipe, self._runtime, self._parts
        rate = self._schedules.apply(parts.optimizer, step)
        values: dict[str, Tensor] = {}
        features: list[Tensor] = []
        pieces = np.array_split(np.arange(len(positions)), min(recipe.accumulate, len(positions)))
        for number, piece in enumerate(pieces):
            last = number + 1 == len(pieces)
            # What a model draws by itself follows from seed and step too, and stochastic depth from the samples.
            torch.manual_seed(_seed_of(recipe.seed, step))
            self._say_share(runtime.rank * len(positions) + int(piece[0]), len(piece))
            whole = len(pieces) == 1
            part = batch if whole else _part(batch, slice(int(piece[0]), int(piece[-1]) + 1))
            with self._without_sync(not last):
                with self._autocast():
                    found = self._objective.loss(self._parallel, part, positions[piece], step, last=last)
                watched = found.pop("features", None)
                if watched is not None:
                    features.append(watched)
                weight = len(piece) / len(positions)
                parts.scaler.scale(found["loss"] if whole else found["loss"] * weight).backward()
            for name, value in found.items():
                weighed = value.detach().float() * weight
                values[name] = values[name] + weighed if name in values else weighed
        parts.scaler.unscale_(parts.optimizer)
        values["grad_norm"] = clip(parts.model, recipe.optim)
        return rate, values, torch.cat(features) if features else None

    def _say_share(self, first: int, count: int) -> None:
        share = self._objective.share
        share.rows = torch.arange(first, first + count, device=self._runtime.device)
        share.total = self._recipe.batch_size

    def _autocast(self) -> torch.autocast:
        runtime = self._runtime
        return torch.autocast(torch.device(runtime.device).type, runtime.dtype, enabled=runtime.dtype_name != "float32")

    def _without_sync(self, wanted: bool) -> AbstractContextManager[None]:
        """Leave the ranks' gradients apart until the batch's last part."""
        parallel = self._parallel
        return parallel.no_sync() if wanted and isinstance(parallel, DistributedDataParallel) else nullcontext()

    def check_finite(self, means: dict[str, float], step: int, rate: float) -> None:
        """Raise RuntimeError where the loss is not finite, or gradients have not been for long."""
        finite = math.isfinite(means["grad_norm"])
        # With fp16 the scaler skips such a step and lowers its factor.
        self._skipped = 0 if finite else self._skipped + 1
        if self._parts.scaler.is_enabled():
            means["loss_scale"] = self._parts.scaler.get_scale()
            finite = self._skipped < _MOST_SKIPPED
        if math.isfinite(means["loss"]) and finite:
            return
        raise RuntimeError(
            f"the loss is {means['loss']} at step {step + 1} (learning rate {rate:.3g}, gradient norm "
            f"{means['grad_norm']:.3g}): lower optim.lr and start anew; to go on from an earlier checkpoint, "
            f"remove the later ones from {self._recipe.run / 'checkpoints'}"
        )

    def update(self, step: int) -> None:
        """Step the optimiser, and whatever follows the weights."""
        parts = self._parts
        self._objective.before_step(step)
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        self._objective.after_step(step + 1, self._recipe.steps)
        if parts.average is not None:
            parts.average.update_parameters(parts.model)

    def settle_buckets(self, loader: StreamLoader) -> None:
        """One backward pass that changes nothing, right after wrapping.

        DDP orders its buckets anew after the first backward, which changes the order of sums with three and more ranks;
        a resumed run would then differ from an uninterrupted one in the last bits of its first step.
        """
        share = self._recipe.batch_size // self._runtime.world_size
        size = math.ceil(share / self._recipe.accumulate)  # no more than a step takes at once
        kept = [buffer.clone() for buffer in self._parts.model.buffers()]
        images = [
            torch.zeros((size, 3, view.size_px, view.size_px), device=self._runtime.device) for view in loader.views
        ]
        batch = PatchBatch(images, torch.zeros(size, dtype=torch.int64), np.zeros(size, np.uint64))
        self._say_share(0, size)
        with self._autocast():
            values = self._objective.loss(self._parallel, batch, np.arange(size), 0, last=True)
        values["loss"].backward()
        self._parallel.zero_grad(set_to_none=True)
        for buffer, before in zip(self._parts.model.buffers(), kept, strict=True):
            buffer.copy_(before)


def _seed_of(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _part(batch: PatchBatch, piece: slice) -> PatchBatch:
    images = [images[piece] for images in batch.images]
    return replace(batch, images=images, rows=batch.rows[piece], sample_ids=batch.sample_ids[piece])


def _restore(
    run: Path,
    runtime: Runtime,
    agreement: Agreement,
    parts: _Parts,
    objective: Objective,
    loader: StreamLoader,
    checkpoints: Checkpoints,
) -> tuple[int, int]:
    """Return the step of the run's last checkpoint and the samples replaced until then; 0 and 0 without one."""
    step = agreement.of_main(step_of(last_checkpoint(run)) if runtime.is_main else 0)
    if step == 0:
        return 0, 0
    state = load_checkpoint(checkpoint_folder(run, step), parts.model, parts.average)
    parts.optimizer.load_state_dict(state["optimizer"])
    if "scaler" in state:  # not in those of the first version
        parts.scaler.load_state_dict(state["scaler"])
    loader.load_state_dict(state["loader"])
    if "objective" in state:
        objective.load_state_dict(state["objective"])
    if "checkpoints" in state:
        checkpoints.load_state_dict(state["checkpoints"])
    return step, int(state["replaced"])


def _save(
    checkpoints: Checkpoints,
    runtime: Runtime,
    step: int,
    parts: _Parts,
    objective: Objective,
    loader: StreamLoader,
    replaced: int,
) -> None:
    state = {
        "step": step,
        "seen": loader.seen,
        "replaced": replaced,
        "optimizer": parts.optimizer.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "loader": loader.state_dict(),
        "objective": objective.state_dict(),
        "world_size": runtime.world_size,
    }
    checkpoints.save(step, parts.model, state, average=parts.average, describe=objective.describe)
    if runtime.world_size > 1:
        torch.distributed.barrier()


def _parallel(model: nn.Module, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return model
    device = torch.device(runtime.device)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


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
