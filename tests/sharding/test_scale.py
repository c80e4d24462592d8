"""Memory: what does not grow with the number of patches, and how much a worker needs on a very large slide."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tifffile

from sharding import permute
from sharding.synth import SlideSpec, paint_slide
from sharding.synth.aperio import Level, write_pyramid

# The peaks are VmHWM, not ru_maxrss, which starts from the size of the process that started this one.
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc: the peak of one process alone cannot be read"
)

# Slides of 50,000 patches whose rows are made up as they are asked for: permuted, and their index merged.
_SIMULATED = """
import re, sys
from pathlib import Path
import numpy as np
from sharding import index, permute
from sharding.hashing import splitmix64
from sharding.rows import ROW
from sharding.work import WorkFolder

folder, total, permute._BUCKET_ROWS = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SLIDE = 50_000
work = WorkFolder(folder)
for place in work.folders:
    place.mkdir(parents=True, exist_ok=True)

def member_rows(job, work):
    for first in range(0, total, SLIDE):
        rows = np.zeros(SLIDE, ROW)
        rows["sample_id"] = splitmix64(np.arange(first, first + SLIDE, dtype=np.uint64))
        yield rows

def shard_tables(dataset, names):
    for number in range(total // 4096):
        ids = splitmix64(np.arange(number * 4096, (number + 1) * 4096, dtype=np.uint64))
        columns = {"sample_id": ids, "key": [f"{i:016x}" for i in ids.tolist()], "slide_id": ["slide"] * 4096,
                   "route": ["copy"] * 4096, "shard": [f"{number:05d}"] * 4096}
        zeros = np.zeros(4096)
        yield index.pa.table([index.pa.array(columns.get(f.name, zeros), f.type) for f in index.INDEX_SCHEMA],
                             schema=index.INDEX_SCHEMA)

permute._member_rows = member_rows
permute._write_sources = lambda *_: None
index._shard_tables = shard_tables
members = tuple(permute.Member(str(i), "", SLIDE) for i in range(total // SLIDE))
counts = permute.PermuteJob(str(folder), "group", members, 0, 4096).run().counts
assert sum(counts) == total, sum(counts)
work.permutation("group").unlink()
written = index.write_index(folder, [])
assert written == total // 4096 * 4096, written
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def peak_mib(folder: Path, rows: int, bucket_rows: int = permute._BUCKET_ROWS) -> int:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SIMULATED, str(folder), str(rows), str(bucket_rows)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_the_memory_of_planning_a_group_does_not_grow_with_its_patches(tmp_path: Path) -> None:
    """Three buckets of rows need as much as six; 3 M rows are 192 MB."""
    large, small = (peak_mib(tmp_path / str(rows), rows, 1_000_000) for rows in (6_000_000, 3_000_000))
    assert large - small < 75


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_million_patches_stream_through_flat_memory(tmp_path: Path) -> None:
    """Needs about 15 GB of disk."""
    small, large = peak_mib(tmp_path / "small", 6_000_000), peak_mib(tmp_path / "large", 100_000_000)
    print(f"peak memory: {small} MiB at 6 M rows, {large} MiB at 100 M")
    assert large < 1.5 * small


_WORKER = """
import re, sys
from pathlib import Path
from engine.recipes import ShardRecipe
from sharding.slide import fingerprint
from sharding.stage import SlideJob

slide, out = Path(sys.argv[1]), Path(sys.argv[2])
options = ShardRecipe(slides=str(slide), out=out, **eval(sys.argv[3])).options()
job = SlideJob("slide", str(slide), fingerprint(slide), None, str(out), options)
for place in job.work.folders:
    place.mkdir(parents=True, exist_ok=True)
record = job.run()
assert record.status == "done", record.reason
print(record.patches, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{"mpp": 0.5}, {"mpp": 0.5, "context_px": 320, "stride_px": 224}])
def test_a_worker_stays_below_one_and_a_half_gigabytes_on_a_slide_of_50000_px(
    recipe: dict[str, object], huge_slide: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _WORKER, str(huge_slide), str(tmp_path), repr(recipe)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    patches, mib = map(int, done.stdout.splitlines()[-1].split())
    assert patches > 5000
    assert mib < 1500


@pytest.fixture(scope="module")
def huge_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 50,000 x 50,000 px: the tiles of a painted one of 4096 px again and again."""
    folder = tmp_path_factory.mktemp("huge")
    spec = SlideSpec(seed=3, width_px=4096, height_px=4096)
    paint_slide(spec, folder)
    levels = []
    with tifffile.TiffFile(folder / f"{spec.slide_id}.svs") as tiff:
        for page, size in zip(tiff.pages, (50_000, 12_500, 3125), strict=True):
            assert isinstance(page, tifffile.TiffPage)
            side, across = page.imagewidth // 256, -(-size // 256)
            handle = tiff.filehandle
            streams = [stream for stream, _ in handle.read_segments(page.dataoffsets, page.databytecounts)]
            tiles = [streams[row % side * side + column % side] for row in range(across) for column in range(across)]
            levels.append(Level(size, size, [bytes(tile or b"") for tile in tiles]))
        tables = page.jpegtables
    huge = replace(spec, width_px=50_000, height_px=50_000)
    write_pyramid(folder / "huge.svs", huge, levels, tables=tables, bigtiff=False)
    return folder / "huge.svs"
