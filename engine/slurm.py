"""SLURM: what it says about tasks that srun started, as the variables torch.distributed reads, and sbatch scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

# Below the range from which systems take ports for outgoing connections (32768 on Linux).
_FIRST_PORT, _PORTS = 12_000, 20_000


def task_variables(environ: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this task of several.

    None outside of SLURM and in a job or step of one task, which is a plain machine. An address or a port that is set
    already is kept.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if tasks < 2 or "SLURM_PROCID" not in environ:
        return None
    host, port = rendezvous(environ) or ("localhost", _FIRST_PORT)
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environ, tasks)),
        "MASTER_ADDR": environ.get("MASTER_ADDR", host),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """(first node, a port that is a function of the job's number), the same on every node; None outside of SLURM."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes:
        return None
    job = re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "")) or "0"
    return first_node(nodes), _FIRST_PORT + int(job) % _PORTS


def first_node(nodes: str) -> str:
    """The first of a list of nodes as SLURM writes it: `rack[1-2]n[07-09,12],login` is `rack1n07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} is no list of nodes; expected one as in SLURM_JOB_NODELIST, such as node[01-04].")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def templates() -> list[str]:
    """Names of the sbatch scripts that come with the engine."""
    found = (files("engine") / "templates").iterdir()
    return sorted(path.name.removesuffix(".sbatch") for path in found if path.name.endswith(".sbatch"))


def read_template(name: str) -> str:
    """The sbatch script `name`; ValueError where there is none."""
    if name not in templates():
        raise ValueError(f"--template {name}: there is no such script; expected one of {', '.join(templates())}.")
    return (files("engine") / "templates" / f"{name}.sbatch").read_text(encoding="utf-8")


def _tasks_here(environ: Mapping[str, str], tasks: int) -> int:
    """Tasks on this node, of counts such as `4(x2),3`; all of them where SLURM says nothing."""
    counts: list[int] = []
    written = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(tasks)
    for part in written.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is not None:
            counts += [int(found[1])] * int(found[2] or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else tasks
