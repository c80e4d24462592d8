"""SLURM: its variables as torch.distributed's, and sbatch scripts whose every line means something."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from engine.cli import app
from engine.config import apply_overrides, read_recipe, shipped_recipes
from engine.launch import Nodes
from engine.recipes import TrainRecipe
from engine.slurm import first_node, read_template, rendezvous, task_variables, templates

TASK = {"SLURM_NTASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40007"}
# Options of sbatch that the scripts may use, with what their values look like.
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks": "1",
    "ntasks-per-node": "1",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"B:USR1@\d+",
    "requeue": "",
    "open-mode": "append",
    "output": r"\S+",
}
VARIABLES = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "40007", "first": "node01", "port": "12007"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node01", "node01"),
        ("b,a", "b"),
        ("node[03-07,12],login", "node03"),
        ("node[3,5]", "node3"),
        ("rack[1-2]n[07-09,12],x", "rack1n07"),
        ("gpu-[a-b]-[1]x.site", "gpu-a-1x.site"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_list_without_a_node_is_refused() -> None:
    with pytest.raises(ValueError, match="SLURM_JOB_NODELIST"):
        first_node(",a")


def test_a_task_of_several_is_a_rank() -> None:
    asked = {**TASK, "SLURM_JOB_NODELIST": "node[2-4]", "SLURM_TASKS_PER_NODE": "2(x3)", "SLURM_NODEID": "2"}
    assert task_variables(asked) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node2",
        "MASTER_PORT": "12007",
    }
    uneven = {**asked, "SLURM_TASKS_PER_NODE": "3,2,1"}
    assert (task_variables(uneven) or {})["LOCAL_WORLD_SIZE"] == "1"
    given = task_variables({**asked, "MASTER_ADDR": "other", "MASTER_PORT": "1234"})
    assert given is not None
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("other", "1234")


def test_a_step_says_more_of_its_tasks_than_its_job() -> None:
    asked = {**TASK, "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_STEP_NUM_TASKS": "2"}
    found = task_variables({**asked, "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"})
    assert found is not None
    assert (found["MASTER_ADDR"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("n3", "2", "1")


@pytest.mark.parametrize("environ", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "4"}])
def test_one_task_is_a_plain_machine(environ: dict[str, str]) -> None:
    assert task_variables(environ) is None


def test_all_tasks_of_a_job_find_the_same_port_below_the_ports_of_connections() -> None:
    assert rendezvous({}) is None
    ports = {(rendezvous({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": str(job)}) or ("", 0))[1] for job in range(99)}
    assert len(ports) == 99
    assert all(1024 < port < 32_768 for port in ports)


def test_there_are_the_three_scripts() -> None:
    assert templates() == ["slurm_multinode", "slurm_requeue", "slurm_single"]
    with pytest.raises(ValueError, match="slurm_requeue"):
        read_template("slurm")


@pytest.mark.parametrize("name", templates())
def test_a_script_is_one_that_bash_and_sbatch_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(read_template(name))
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    asked = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[0] == "#!/bin/bash"
    assert len(asked) > 5
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    for line in asked:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line)
        assert found, line
        assert re.fullmatch(SBATCH[found[1]], found[2] or ""), line


@pytest.mark.parametrize("name", templates())
def test_the_engine_line_of_a_script_is_one_the_command_line_takes(name: str) -> None:
    command, values = _engine_line(read_template(name))
    assert command["resume"], "a job that is queued again has to go on"
    assert command["max_restarts"] > 0
    nodes = Nodes.parse(command["nnodes"], command["rdzv"], command["rdzv_id"], command["max_restarts"])
    assert nodes is not None
    assert (nodes.most, nodes.meeting) == ((2, ("node01", 12007)) if "multi" in name else (1, None))
    assert command["recipe"].removesuffix("_tiny") in {each.removesuffix("_tiny") for each in shipped_recipes("train")}
    assert {"dataset", "run"} <= values.keys() <= TrainRecipe.model_fields.keys()


def _engine_line(script: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What our own parser makes of the script's `engine train` line: its options, and the recipe's keys."""
    (line,) = re.findall(r"^[^#\n]*\b(engine train .*)$", script.replace("\\\n", " "), re.MULTILINE)
    words = [word for word in shlex.split(line) if word != "&"]
    words = [re.sub(r"\$(\w+)", lambda found: VARIABLES[found[1]], word) for word in words]
    group = typer.main.get_command(app)
    train = group.commands["train"]  # type: ignore[attr-defined]
    context = train.make_context("train", words[2:])
    values = apply_overrides(read_recipe("train", "train/vittm_hmr_tiny"), context.params["settings"])
    return context.params, values


def test_the_requeue_script_saves_stops_and_queues_again(tmp_path: Path) -> None:
    """Run with an `engine` that stops with 130 at USR1, and a `scontrol` that notes what it is asked."""
    _command(tmp_path / "engine", 'trap "exit 130" USR1; touch "$HERE/ready"; while true; do sleep 0.1; done')
    _command(tmp_path / "scontrol", 'echo "$@" > "$HERE/asked"')
    script = read_template("slurm_requeue").replace("source .venv/bin/activate\n", "")
    waiter = f'(while [ ! -e "$HERE/ready" ]; do sleep 0.05; done; kill -USR1 $$) &\n{script}'
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path), "SLURM_JOB_ID": "40007"}
    done = subprocess.run(["bash", "-c", waiter], env=environment, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "asked").read_text() == "requeue 40007\n"


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_requeue_script_ends_as_the_run_does_where_nobody_asked_to_stop(code: int, tmp_path: Path) -> None:
    _command(tmp_path / "engine", f"exit {code}")
    _command(tmp_path / "scontrol", 'echo "$@" > "$HERE/asked"')
    script = read_template("slurm_requeue").replace("source .venv/bin/activate\n", "")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path), "SLURM_JOB_ID": "40007"}
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=60, check=False)
    assert done.returncode == code
    assert not (tmp_path / "asked").exists()


def _command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
