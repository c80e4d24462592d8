"""Memory and descriptors stay flat over many small slides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import synth

# One worker, ten slides a job, as the driver would hand them out.
WORK = """
import json, os, sys
from pathlib import Path
from engine.config import apply_overrides, read_recipe
from engine.extract_recipe import build_extract_recipe
from engine.extraction.agreement import agree
from engine.extraction.planning import open_source, slide_tasks
from engine.extraction.worker import ExtractJob, Extractor, WorkerSpec
from engine.stores import begin_store

slides, out = sys.argv[1:]
settings = [f"slides={slides}", f"out={out}", "patches.context_px=128", "batch_size=32", "patches.min_tissue=0.1"]
recipe = build_extract_recipe(apply_overrides(read_recipe("extract", "extract/tiny"), settings))
source = open_source(recipe)
spec = agree(recipe, patch_px=128, mpp=0.5, stride_px=128, region_patches=None, precision="float32")
tasks, _ = slide_tasks(recipe, source, None)
begin_store(Path(out), {"dtype": "float16"})
worker = Extractor(WorkerSpec(Path(out), spec, None, Path(out), 1, False))
told = {"done": 0, "resident_mib": [], "descriptors": []}
for first in range(0, len(tasks), 10):
    results = worker(ExtractJob(tuple(tasks[first : first + 10])))
    told["done"] += sum(result.status == "done" for result in results)
    told["resident_mib"].append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20)
    told["descriptors"].append(len(list(Path("/proc/self/fd").iterdir())))
print(json.dumps(told))
"""


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("count", "most_mib"),
    [pytest.param(80, 25, marks=pytest.mark.slow), pytest.param(1000, 40, marks=pytest.mark.soak)],
)
def test_memory_stays_flat_over_many_small_slides(count: int, most_mib: int, tmp_path: Path) -> None:
    """Of the second half against the second quarter; 1 MiB a slide would be 30, and 375."""
    synth.run(tmp_path / "painted", slides=1, size=512, seed=1, workers=1)
    data = next((tmp_path / "painted").glob("*.svs")).read_bytes()
    (tmp_path / "slides").mkdir()
    for number in range(count):
        (tmp_path / "slides" / f"copy-{number:04d}.svs").write_bytes(data + number.to_bytes(16, "little"))
    command = [sys.executable, "-P", "-c", WORK, str(tmp_path / "slides"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["done"] == count
    parts = len(told["resident_mib"])
    before, after = told["resident_mib"][parts // 4 : parts // 2], told["resident_mib"][parts // 2 :]
    assert sum(after) / len(after) - sum(before) / len(before) < most_mib
    assert max(told["descriptors"][parts // 2 :]) <= max(told["descriptors"][: parts // 2])
