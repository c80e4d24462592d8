"""Where this process runs: device, dtype, rank and world size, decided once. Importing it imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1
_DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
_JOIN_S = 600.0
_CONNECT_S = 10.0
_POLL_S = 0.05


class Ranks(NamedTuple):
    """This process among those of the run: of all, of its node, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


@dataclass(frozen=True, slots=True)
class Runtime:
    """`device` is `cuda:N` or `cpu`; `dtype_name` is the autocast dtype, `float32` for none."""

    device: str
    dtype_name: Literal["float32", "bfloat16", "float16"]
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1

    @classmethod
    def detect(cls, precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto") -> Runtime:
        """Read the ranks from the environment, and take the GPU that belongs to the local rank.

        Raises ValueError where torchrun or the launcher started more ranks here than there are GPUs. (A task of srun
        may see its own GPU alone, whatever its local number.)
        """
        import torch

        ranks = ranks_from_environment() or Ranks()
        cuda = torch.cuda.is_available()
        gpus = torch.cuda.device_count() if cuda else 0
        if cuda and ranks.local_rank >= gpus and "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError(
                f"{ranks.local_world_size} processes on {socket.gethostname()}, which shows {gpus} GPUs: NCCL takes "
                f"one rank per GPU; give processes={gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU."
            )
        device = f"cuda:{ranks.local_rank % gpus}" if cuda else "cpu"
        wanted = ("bf16" if cuda else "fp32") if precision == "auto" else precision
        return cls(device, _DTYPES[wanted], *ranks)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of the usable cores of its node; srun binds its tasks to theirs already."""
        given = os.environ.get("SLURM_CPUS_PER_TASK")
        if given is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            return min(int(given), usable_cores())
        return max(1, usable_cores() // self.local_world_size)


def ranks_from_environment() -> Ranks | None:
    """What torchrun or the launcher gave this process, or None where it was started by hand."""
    environ = os.environ
    try:
        rank, local_rank, world_size = (int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except KeyError:
        return None
    return Ranks(rank, local_rank, world_size, int(environ.get("LOCAL_WORLD_SIZE", world_size)))


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


@contextlib.contextmanager
def process_group(runtime: Runtime, *, timeout_s: float | None = None, join_s: float = _JOIN_S) -> Iterator[None]:
    """Join the other ranks: NCCL on GPUs, gloo on the CPU. One rank alone needs none.

    A collective that takes `timeout_s` seconds is an error (None: torch's own limit). RuntimeError where not all ranks
    have come within `join_s` seconds; it names the missing ones.
    """
    if runtime.world_size == 1:
        yield
        return
    import torch

    device = torch.device(runtime.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=meet(_open_store(runtime.rank, join_s), runtime.rank, runtime.world_size, join_s=join_s),
        rank=runtime.rank,
        world_size=runtime.world_size,
        timeout=timedelta(seconds=timeout_s) if timeout_s else None,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _open_store(rank: int, join_s: float) -> torch.distributed.Store:
    import torch

    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=join_s)
    try:
        return torch.distributed.TCPStore(host, port, is_master=hosts, timeout=limit, wait_for_workers=False)
    except torch.distributed.DistError as error:
        raise RuntimeError(
            f"rank {rank} does not reach rank 0 at {host}:{port} ({' '.join(str(error).split())}); start all ranks, "
            "and give them a MASTER_ADDR and a free MASTER_PORT that they can reach"
        ) from None


def meet(store: torch.distributed.Store, rank: int, world_size: int, *, join_s: float) -> torch.distributed.Store:
    """Wait for all ranks, and return the part of `store` that belongs to this start of theirs.

    The store may outlive ranks and hold words of earlier ones. So each greets rank 0 with a number of its own, and
    takes only an answer to that. Raises RuntimeError that names the ranks that have not come within `join_s` seconds.
    """
    import torch

    mine, end = uuid.uuid4().hex, time.monotonic() + join_s
    others = set(range(1, world_size)) if rank == 0 else {0}
    start = mine if rank == 0 else ""
    store.set(f"hello/{rank}", mine)
    while others:
        if time.monotonic() > end:
            missing = ", ".join(str(other) for other in sorted(others))
            raise RuntimeError(
                f"of {world_size} ranks these have not come within {join_s:g} s: {missing}. Start them all, each with "
                "its number; under SLURM start them with srun, or ask for one task."
            )
        if rank == 0:
            for other in others:
                store.set(f"welcome/{other}", f"{_said(store, f'hello/{other}')} {mine}")
            others = {other for other in others if _said(store, f"answer/{other}") != mine}
        else:
            greeted, _, start = _said(store, f"welcome/{rank}").partition(" ")
            if greeted == mine:
                store.set(f"answer/{rank}", start)
                others = set()
        time.sleep(_POLL_S)
    return torch.distributed.PrefixStore(start, store)


def _said(store: torch.distributed.Store, name: str) -> str:
    return store.get(name).decode() if store.check([name]) else ""


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: that rank's own error is the one to tell."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/" in str(error)


def check_listens(address: str, what: str) -> None:
    """Raise RuntimeError where nobody listens at HOST:PORT, or ray://HOST:PORT; another kind of address passes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"no {what} answers at {address}: {error}.") from None
