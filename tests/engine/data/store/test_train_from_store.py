"""`engine train` on a dataset in an object store: the run on disk, to the bit, and one sentence where it cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

ENGINE = str(Path(sys.executable).parent / "engine")


def train(dataset: Path | str, run: Path, *settings: str, code: int = 0) -> Any:
    """Run the command; the JSON object of stdout, or stderr where an error is expected."""
    command = [ENGINE, "train", "train/vittm_hmr_tiny", f"dataset={dataset}", f"run={run}", "--json", *settings]
    command += ["batch_size=8", "model.dim=32", "model.depth=2", f"cache={run.parent / 'cache'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else json.loads(done.stdout)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_begun_on_disk_goes_on_from_a_store_to_the_bit(sharded: Any, store: Any, tmp_path: Path) -> None:
    local, url = sharded[0], store.put(sharded[0], "set")
    run = tmp_path / "run"
    train(local, run, "steps=4", "checkpoint_every=2")
    straight, weights = losses(run), load_file(run / "last" / "model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-00000004")  # as if it had been killed before
    assert train(url, run, "steps=4", "checkpoint_every=2", "--resume")["start_step"] == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["dataset"] == url
    assert losses(run) == straight
    resumed = load_file(run / "last" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.slow
def test_two_ranks_share_what_they_read(sharded: Any, store: Any, tmp_path: Path) -> None:
    url = store.put(sharded[0], "set")
    assert train(url, tmp_path / "run", "steps=2", "processes=2")["samples_seen"] == 16
    assert len(store.asked("rows.bin")) == 2  # its size, and itself: once for launcher and ranks
    assert list((tmp_path / "cache" / "shards").glob("*/*.tar"))


def test_a_run_from_a_store_that_breaks_down_goes_on_later(sharded: Any, store: Any, tmp_path: Path) -> None:
    url = store.put(sharded[0], "set")
    assert "no such bucket" in train("s3://no-such-bucket/set", tmp_path / "run", "steps=2", code=1)
    assert f"{url}x holds no dataset.json" in train(url + "x", tmp_path / "run", "steps=2", code=2)
    store.fault = lambda key, number: 403 if key.endswith(".tar") else None
    said = train(url, tmp_path / "run", "steps=2", code=1)
    assert f"{url}/shards/" in said
    assert "refuses the credentials" in said
    assert len(said.strip().splitlines()) == 1, said
    store.fault = lambda key, number: None
    assert train(url, tmp_path / "run", "steps=2", "--resume")["samples_seen"] == 16
