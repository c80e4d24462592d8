"""What a training run says while it goes on: metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import torch

from engine.console import progress
from engine.recipes import TrainRecipe
from engine.rundir import METRICS
from engine.runtime import Runtime


class TrainLog:
    """Written by rank 0 alone; on other ranks it does nothing."""

    def __init__(self, recipe: TrainRecipe, runtime: Runtime, start: int) -> None:
        self._recipe = recipe
        self._main = runtime.is_main
        self._gpu = runtime.device.startswith("cuda")
        self._start = start
        self._stack = contextlib.ExitStack()
        self._waited = self._total = 0.0
        self._steps = 0

    def __enter__(self) -> TrainLog:
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
        note = f"loss {means['loss']:.4f}  lr {rate:.2g}  {speed:.0f} samples/s  waiting for data {100 * share:.0f} %"
        if self._gpu:
            gib = torch.cuda.max_memory_allocated() / 2**30
            line["gpu_gib"] = round(gib, 3)
            note += f"  {gib:.1f} GiB"
        # JSON has no infinity, which a gradient's norm may reach with fp16.
        plain = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._advance(1, note)


def _rounded(means: dict[str, float]) -> dict[str, float]:
    # Losses keep all their digits: two runs are compared by them.
    return {name: value if name == "loss" else float(f"{value:.6g}") for name, value in means.items()}
