"""The built wheel, installed apart from this checkout and started from a folder that holds packages of our names."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DECOYS = ("engine", "sharding", "models", "configs", "benchmarks")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment's bin folder: the wheel is installed there, its dependencies are lent to it.

    The dependencies come by one line of a .pth file from the environment that runs the tests. Its own .pth files are
    not read that way, so the editable install of this checkout is out of sight.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves traces in its tree
    source.mkdir()
    for name in ("engine", "sharding", "models", "configs", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source))
    (wheel,) = (folder / "dist").glob("*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder / "env"))
    python = folder / "env" / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python.parent


@pytest.fixture(scope="module")
def decoys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with packages named like ours; importing one of them is an error."""
    folder = tmp_path_factory.mktemp("user")
    for name in DECOYS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the decoy {name} was imported')\n")
    (folder / "configs" / "shard").mkdir()
    (folder / "configs" / "shard" / "tiny.yaml").write_text("decoy: true\n")
    return folder


def _run(*command: str, cwd: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _engine(installed: Path, cwd: Path, *arguments: str) -> Any:
    return json.loads(_run(str(installed / "engine"), *arguments, "--json", cwd=cwd))


def test_the_wheel_is_what_runs(installed: Path, decoys: Path) -> None:
    code = "import engine, sharding, models, configs; print(engine.__file__, sharding.__file__, models.__file__)"
    # -P as the console script has it: the current folder is not on the path.
    found = _run(str(installed / "python"), "-P", "-c", code, cwd=decoys).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in found)


@pytest.mark.slow
@pytest.mark.ray
def test_shard_on_ray_and_train_in_two_processes_ignore_the_users_packages(installed: Path, decoys: Path) -> None:
    _engine(installed, decoys, "synth", "slides", "--slides", "2", "--size", "1536")
    made = _engine(installed, decoys, "shard", "shard/tiny", "slides=slides", "out=dataset", "workers=2")
    assert made["slides"] == {"done": 2, "quarantined": 0}
    assert made["patches"]["copy"] > 0
    assert _engine(installed, decoys, "verify", "dataset")["ok"]
    arguments = ["dataset=dataset", "run=run", "steps=3", "batch_size=4", "processes=2", "model.dim=32"]
    trained = _engine(installed, decoys, "train", "train/vittm_hmr_tiny", *arguments)
    assert trained["samples_seen"] == 12
    assert (decoys / "run" / "last" / "model.safetensors").is_file()
