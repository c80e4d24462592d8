"""Long campaigns: `make soak`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import synth

ENGINE = str(Path(sys.executable).parent / "engine")
KILLS = 40


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_shard_killed_at_random_moments_ends_with_the_same_dataset(tmp_path: Path) -> None:
    """kill -9 of the driver, over and over, at moments from before the first read to after the last write."""
    synth.run(tmp_path / "slides", slides=4, size=4096)
    settings = [ENGINE, "shard", "shard/tiny", f"slides={tmp_path / 'slides'}", "patches_per_shard=32", "--json"]
    undisturbed = json.loads(_finish([*settings, "--local", f"out={tmp_path / 'undisturbed'}"]))
    moments = random.Random(0)
    for backend in ([], ["--local"]):
        killed = 0
        while killed < KILLS // 2:
            out = tmp_path / f"out{len(backend)}-{killed}"
            command = [*settings, *backend, f"out={out}"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.uniform(0.5, 8.0))
            process.kill()
            process.wait()
            killed += 1
            assert json.loads(_finish(command))["digest"] == undisturbed["digest"]
            assert not [p for p in out.rglob("*") if p.name.startswith(".")], "something was left behind"
            for name in ("index.parquet", "rows.bin"):
                assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def _finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
