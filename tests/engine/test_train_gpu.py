"""Training on a GPU: the same command, bf16 by default."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import shard, synth
from engine.recipes import ShardRecipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch finds none on this machine"),
]


def test_the_tiny_recipe_trains_on_the_gpu(tmp_path: Path) -> None:
    synth.run(tmp_path / "slides", slides=2, size=1536, workers=1)
    shard.run(ShardRecipe(slides=str(tmp_path / "slides"), out=tmp_path / "dataset", workers=1), local=True)
    # -P: the current folder stays off the path, as under the `engine` command, which a bare install may lack.
    command = [sys.executable, "-P", "-m", "engine.cli", "train", "train/vittm_hmr_tiny", "--json"]
    command += [f"dataset={tmp_path / 'dataset'}", f"run={tmp_path / 'run'}", "steps=40", "processes=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"].startswith("cuda")
    assert result["loss_last"] < result["loss_first"]
