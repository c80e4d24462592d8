"""Where this process runs: device, dtype, rank and world size, decided once. Importing it imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1
_DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """`device` is `cuda:N` or `cpu`; `dtype_name` is the autocast dtype, `float32` for none."""

    device: str
    dtype_name: Literal["float32", "bfloat16", "float16"]
    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def detect(cls, precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto") -> Runtime:
        """Read the ranks that torchrun or SLURM gave, and take the GPU that belongs to the local rank."""
        import torch

        rank, local_rank, world_size = ranks_from_environment() or (0, 0, 1)
        cuda = torch.cuda.is_available()
        device = f"cuda:{local_rank % torch.cuda.device_count()}" if cuda else "cpu"
        wanted = ("bf16" if cuda else "fp32") if precision == "auto" else precision
        return cls(device, _DTYPES[wanted], rank, local_rank, world_size)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> tuple[int, int, int] | None:
    """(rank, local rank, world size) given by torchrun, or None where this process was started by hand."""
    try:
        return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        return None


def usable_cores() -> int:
    """Cores this process may use (a container's or SLURM's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when process `parent_pid`, its parent, is gone, SIGKILL included.

    Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before the request
            os._exit(1)
