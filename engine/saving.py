"""When a run is saved, which of its checkpoints stay, and which is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from engine.checkpoint import (
    all_checkpoints,
    checkpoint_folder,
    fault_of,
    point,
    read_manifest,
    remove_checkpoint,
    save_checkpoint,
    step_of,
)
from engine.console import say
from engine.recipes import TrainRecipe
from engine.runtime import Runtime


class Checkpoints:
    """The checkpoints of one run. Every rank has one and asks it at the same steps; rank 0 writes.

    Regular are those of `checkpoint_every`, of `keep_every` and of the last step. Only they compete for the best, by
    the mean of `best_of` since the regular one before: where a clock or a signal had a run saved in between, the
    best is that of an undisturbed run.
    """

    def __init__(
        self, recipe: TrainRecipe, runtime: Runtime, backend: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`backend` is the loader's; `clock` tells seconds."""
        self._recipe = recipe
        self._is_main = runtime.is_main
        # Other sums, or pixels within the loaders' tolerance: where these change, the numbers change in the last bits.
        self._means = {
            "processes": runtime.world_size,
            "accumulate": recipe.accumulate,
            "device": runtime.device.partition(":")[0],
            "dtype": runtime.dtype_name,
            "loader": backend,
        }
        self._clock = clock
        self._saved_s = clock()
        self._best: dict[str, Any] | None = None  # step, value
        self._sum, self._count = 0.0, 0

    def is_regular(self, step: int) -> bool:
        """Whether there is a checkpoint after `step` in any case."""
        keys = self._recipe
        return (
            step % keys.checkpoint_every == 0
            or (keys.keep_every is not None and step % keys.keep_every == 0)
            or step == keys.steps
        )

    @property
    def is_overdue(self) -> bool:
        """Whether `checkpoint_minutes` have passed by rank 0's clock since the last one; False on other ranks."""
        minutes = self._recipe.checkpoint_minutes
        return self._is_main and minutes is not None and self._clock() - self._saved_s >= 60 * minutes

    def observe(self, means: dict[str, float]) -> None:
        """Take in what is logged of a step, or known at a regular checkpoint.

        Raises ValueError where `best_of` is not among it.
        """
        name = self._recipe.best_of
        if name is None:
            return
        if name not in means:
            raise ValueError(
                f"best_of={name}: no such number is known of every step; expected one of {', '.join(sorted(means))}"
            )
        self._sum += means[name]
        self._count += 1

    def save(self, step: int, model: nn.Module, state: dict[str, Any], **more: Any) -> None:
        """Save the run after `step` and delete what need not stay; `more` as `save_checkpoint` takes it.

        Raises RuntimeError where it cannot be written.
        """
        if self.is_regular(step) and self._count:
            self._compete(step, self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if self._is_main:
            run = self._recipe.run
            best = None if self._best is None else int(self._best["step"])
            save_checkpoint(run, step, model, {**state, "checkpoints": self.state_dict()}, best=best, **more)
            if best == step:
                point(run / "best", checkpoint_folder(run, step))
            self._prune()
        self._saved_s = self._clock()

    def _compete(self, step: int, value: float) -> None:
        sign = 1 if self._recipe.best_is == "largest" else -1
        if not math.isnan(value) and (self._best is None or sign * value > sign * self._best["value"]):
            self._best = {"step": step, "value": value}

    def _prune(self) -> None:
        run, keep_every = self._recipe.run, self._recipe.keep_every
        found = all_checkpoints(run)
        whole = [folder for folder in found if fault_of(folder, digests=False) is None]
        kept = {folder for folder in whole if keep_every and step_of(folder) % keep_every == 0}
        for folder in whole[-self._recipe.keep_last :]:
            # Should the run go on from this one, what was the best then is there.
            best = (read_manifest(folder) or {}).get("best")
            kept |= {folder, *([checkpoint_folder(run, best)] if best else [])}
        for folder in found:
            if folder not in kept:
                remove_checkpoint(folder)

    def state_dict(self) -> dict[str, Any]:
        """Return the best so far, the numbers since the last regular checkpoint, and how the run is carried out."""
        best = {"of": self._recipe.best_of, "is": self._recipe.best_is, "so_far": self._best}
        return {"best": best, "sum": self._sum, "count": self._count, "means": dict(self._means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. The best begins anew where another one is asked for; other means are told to the user."""
        best = state["best"]
        if (best["of"], best["is"]) == (self._recipe.best_of, self._recipe.best_is):
            self._best, self._sum, self._count = best["so_far"], state["sum"], state["count"]
        changed = [
            f"{key} {state['means'].get(key)} -> {now}"
            for key, now in self._means.items()
            if state["means"].get(key) != now
        ]
        if changed and self._is_main:
            say(
                f"the run goes on with {', '.join(changed)}: every sample still comes once per epoch, but the numbers "
                "are no longer those of an undisturbed run to the last bit"
            )
