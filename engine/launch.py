"""Starts the ranks of a run, or is one of those that torchrun or srun started.

On one machine the launcher locks and prepares the run folder before any rank starts. On several, the launcher on the
machine of the rendezvous does, before it opens it: no rank of any machine starts earlier, and a job whose rendezvous is
gone has ended. Ranks that others started have their rank 0 do it, and the others meet it at a barrier.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.config import UsageError
from engine.console import say
from engine.errors import sentence
from engine.recipes import TrainRecipe
from engine.rundir import prepare_run
from engine.runtime import Ranks, die_with_parent, lost_connection, ranks_from_environment
from engine.slurm import rendezvous, task_variables
from engine.stopping import SIGNALS, Stopped
from engine.watchdog import ENDING, error_text, forget_heartbeats, read_heartbeats
from sharding.lock import folder_lock

Result = dict[str, Any]
Main = Callable[[TrainRecipe], Result]

_PORT = 29_400
# How long a rank that lost another waits to be ended with it, before it ends by itself.
_PATIENCE_S = 10.0
# Marks an error of usage on its way from a rank to its launcher.
_USAGE = UsageError.__name__ + ": "


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines that take part, `least` to `most`, where they meet (HOST, port), and how often ranks restart."""

    least: int = 1
    most: int = 1
    meeting: tuple[str, int] | None = None
    job: str | None = None
    max_restarts: int = 0

    @classmethod
    def parse(cls, nnodes: str | None, rdzv: str | None, rdzv_id: str | None, max_restarts: int) -> Nodes | None:
        """What the command line says (`N` or `MIN:MAX`, `HOST[:PORT]`); None where it says nothing of other machines.

        Raises UsageError where it cannot be meant so. Under SLURM machines meet at the first one where it says nothing.
        """
        if nnodes is None and rdzv is None and rdzv_id is None:
            return cls(max_restarts=max_restarts) if max_restarts else None
        first, _, last = (nnodes or "1").partition(":")
        if not (first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first)):
            raise UsageError(f"--nnodes {nnodes}: expected a number of machines or MIN:MAX, such as 2 or 2:4.")
        least, most = int(first), int(last or first)
        meeting = _host_and_port(rdzv) if rdzv else rendezvous(os.environ)
        if most > 1 and meeting is None:
            raise UsageError(f"--nnodes {nnodes} without --rdzv: name the machine where all meet, as --rdzv HOST:PORT.")
        return cls(least, most, meeting if most > 1 else None, rdzv_id, max_restarts)


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(_PORT))
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise UsageError(f"--rdzv {text}: expected HOST or HOST:PORT, such as node01:{_PORT}.")
    return host, int(port)


def given_ranks(nodes: Nodes | None) -> Ranks | None:
    """This process as one of those that torchrun or srun started; None where it is to start its own.

    srun's variables become torchrun's. `--nnodes` makes a task of srun the launcher of its machine.
    """
    if ranks_from_environment() is None and (nodes is None or nodes.most == 1):
        os.environ.update(task_variables(os.environ) or {})
    found = ranks_from_environment()
    if found is not None and nodes is not None:
        raise UsageError(
            "torchrun or srun has started this process as a rank, and --nnodes, --rdzv and --max-restarts are for a "
            "launcher: give them to torchrun, or have srun start one task on each machine, with --nnodes."
        )
    return found


def as_given_rank(recipe: TrainRecipe, main: Main, ranks: Ranks, *, resume: bool) -> Result:
    """Be one of the ranks that torchrun or srun started; rank 0 locks and prepares the folder, others return {}.

    A restart of torchrun goes on from the last checkpoint by itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    check_share(recipe, ranks.world_size)
    if ranks.rank != 0:
        try:
            _run_rank(recipe, main)
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # rank 0 tells it
        return {}
    recipe.run.mkdir(parents=True, exist_ok=True)
    with folder_lock(recipe.run):
        _prepare(recipe, resume=resume)
        return _run_rank(recipe, main)


def launch(recipe: TrainRecipe, main: Main, nodes: Nodes, *, processes: int, resume: bool) -> Result:
    """Run `main` in `processes` ranks of this machine, and of the others of `nodes`; rank 0's result, {} elsewhere.

    `main` is run in this process where that is all there is. Raises UsageError, LockedError or RuntimeError with the
    sentence of the rank that failed first, and KeyboardInterrupt where the ranks were stopped.
    """
    worlds = [processes * count for count in range(nodes.least, nodes.most + 1)]
    if all(recipe.batch_size % world for world in worlds):
        check_share(recipe, worlds[0])
    job = nodes.job or recipe.run.name
    recipe.run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        host = False
        if nodes.meeting is None:
            stack.enter_context(folder_lock(recipe.run))
        elif _is_here(nodes.meeting[0]):
            host = stack.enter_context(folder_lock(recipe.run, job=f"{nodes.meeting[0]}:{nodes.meeting[1]}/{job}"))
        if nodes.meeting is None or host:
            _prepare(recipe, resume=resume)
        if worlds == [1] and not nodes.max_restarts:
            return main(recipe)
        return _launch(recipe, main, nodes, processes, job, host=host)


def check_share(recipe: TrainRecipe, world_size: int) -> None:
    """Raise UsageError where the batch does not divide evenly over the ranks."""
    if recipe.batch_size % world_size:
        raise UsageError(f"batch_size={recipe.batch_size} does not divide evenly over {world_size} processes.")


def _is_here(host: str) -> bool:
    """Whether `host` is this machine: only then can an address of it be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UsageError(f"--rdzv {host}: {error.strerror}; name a machine that all can reach.") from None
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _launch(recipe: TrainRecipe, main: Main, nodes: Nodes, processes: int, job: str, *, host: bool) -> Result:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent logs a child's whole traceback; the child's error itself is told below. So do torch's threads in C++.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    meeting = nodes.meeting
    if meeting:
        # Else ranks of later rounds look for the store of the first one, whose machine may be gone.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config = LaunchConfig(
        min_nodes=nodes.least,
        max_nodes=nodes.most,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{meeting[0]}:{meeting[1]}" if meeting else "localhost:0",
        rdzv_configs={"is_host": host} if meeting else {},
        run_id=job,
        max_restarts=nodes.max_restarts,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle="SIGHUP,SIGQUIT",  # SIGINT raises KeyboardInterrupt here, which ends the ranks too
        shutdown_timeout=1,
    )
    try:
        results: dict[int, Result] = elastic_launch(config, _launched_rank)(recipe, main, os.getpid(), nodes.most > 1)
    except ChildFailedError as error:
        _raise_first(recipe, *error.get_first_failure(), restarts=nodes.max_restarts)
    except RendezvousError as error:
        raise RuntimeError(f"the machines did not come together at {config.rdzv_endpoint} ({error})") from None
    result = results[min(results)]
    if "stopped" in result:
        raise Stopped(result["stopped"]) if result["stopped"] else KeyboardInterrupt
    if "refused" in result:
        raise UsageError(result["refused"])
    return results.get(0, {})


def _raise_first(recipe: TrainRecipe, rank: int, failure: Any, *, restarts: int) -> NoReturn:
    """Raise what the failed rank has written of its error, or what its end and its last heartbeat tell."""
    message = failure.message
    text = message.get("message", "") if isinstance(message, dict) else ""
    if text.startswith(_USAGE):
        raise UsageError(text.removeprefix(_USAGE))
    if text:
        _, _, told = text.partition(": ")  # the type of the error, which is RuntimeError or StallError
        raise RuntimeError(told)
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with code {failure.exitcode}"
    last = read_heartbeats(recipe.run).get(rank)
    name = last.name if last else f"rank {rank} on {socket.gethostname()}"
    heard = f"; it was last heard of{last.after}" if last and last.after else ""
    limit = f", after {restarts} restarts" if restarts else ""
    raise RuntimeError(f"{name} {how}{limit}{heard}; with --max-restarts N a run goes on by itself that often")


def _launched_rank(recipe: TrainRecipe, main: Main, launcher_pid: int, elsewhere: bool) -> Result:
    die_with_parent(launcher_pid)
    # A terminal sends Ctrl-C to every process; the launcher alone answers it and ends its ranks.
    # So it does a scheduler's signals, by way of a StopRequest.
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    ranks = ranks_from_environment() or Ranks()
    try:
        check_share(recipe, ranks.world_size)
    except UsageError as error:
        # Every rank finds this, and none has to be restarted for it.
        return {"refused": f"{error} That many came together; give a batch_size that all numbers of machines divide."}
    try:
        if ranks.rank == 0 and (_restarts() or elsewhere):
            _prepare(recipe, resume=True)
        return _run_rank(recipe, main)
    except KeyboardInterrupt as stop:
        return {"stopped": str(stop)}


def _prepare(recipe: TrainRecipe, *, resume: bool) -> None:
    """Make the run folder ready for a start, or for a restart, which goes on by itself. The caller holds its lock."""
    if _restarts():
        errors = [each.error for each in read_heartbeats(recipe.run).values() if each.error]
        why = f" ({errors[0]})" if errors else ""
        limit = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
        say(f"train: a rank ended{why}; restart {_restarts()} of {limit} goes on from the last checkpoint")
    prepare_run(recipe, resume=resume or _restarts() > 0)
    forget_heartbeats(recipe.run)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _run_rank(recipe: TrainRecipe, main: Main) -> Result:
    """`main`, with an error that names the rank; where another rank's end caused it, that one's error is told."""
    ranks = ranks_from_environment() or Ranks()
    try:
        return main(recipe)
    except Exception as error:
        found = sentence(error)
        if found is None:
            traceback.print_exc()
        if not lost_connection(error):
            last = read_heartbeats(recipe.run).get(ranks.rank)
            text = (
                f"rank {ranks.rank} on {socket.gethostname()} failed{last.after if last else ''}: {error_text(error)}"
            )
            raise (UsageError if found and found[1] else RuntimeError)(text) from None
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE_S)
        others = [f"{each.name}: {each.error}" for each in read_heartbeats(recipe.run).values() if each.error]
        if not others:
            left = [each for each in read_heartbeats(recipe.run).values() if each.doing != ENDING]
            others = [
                f"{each.name} is gone without a word" + (each.after and f", last heard of{each.after}") for each in left
            ]
        first = others[0] if others else error_text(error)
        raise RuntimeError(f"rank {ranks.rank} on {socket.gethostname()} lost another rank: {first}") from None


@contextlib.contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Ranks other than 0 keep their warnings to themselves: rank 0 gives the same."""
    import warnings

    with warnings.catch_warnings():
        if (ranks_from_environment() or Ranks()).rank:
            warnings.simplefilter("ignore")
        yield
