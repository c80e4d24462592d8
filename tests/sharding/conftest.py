"""Painted slides, ways to damage them, and finished datasets, shared by the tests of `sharding`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from sharding.dataset import finish_dataset
from sharding.gather import GatherJob, GatherResult
from sharding.groups import Group, after_gathering, flag_broken_regions, make_groups
from sharding.permute import Member, PermuteJob
from sharding.plan import ShardOptions
from sharding.slide import fingerprint
from sharding.stage import SlideJob, SlideRecord
from sharding.synth import SlideSpec, paint_slide
from sharding.work import WorkFolder
from sharding.writer import ShardRecord

REPOSITORY = Path(__file__).resolve().parents[2]

# Name -> what is painted. "odd" has no whole downsample and other ones in x than in y; "single" has one level.
SPECS = {
    "plain": SlideSpec(seed=3, width_px=1024, height_px=1024),
    "rgb": SlideSpec(seed=4, width_px=1024, height_px=1024, tile_px=240, subsampling="4:4:4", photometric="rgb"),
    "fine": SlideSpec(seed=5, width_px=1024, height_px=1024, mpp=0.25, quality=90),
    "odd": SlideSpec(seed=6, width_px=4099, height_px=515, mpp=0.2527),
    "single": SlideSpec(seed=7, width_px=1000, height_px=900),
    "unspaced": SlideSpec(seed=8, width_px=512, height_px=512, mpp=None),
}


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Path of each slide of SPECS; its truth lies in `truth/` beside it."""
    root = tmp_path_factory.mktemp("slides")
    paths = {}
    for name, spec in SPECS.items():
        paint_slide(spec, root / name)
        paths[name] = root / name / f"{spec.slide_id}.svs"
    return paths


@pytest.fixture(scope="session")
def truth_of() -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    """slide -> (tissue bool, class uint8), both at 1/16 of level 0."""

    def read(slide: Path) -> tuple[np.ndarray, np.ndarray]:
        tissue, classes = (
            np.asarray(Image.open(slide.parent / "truth" / f"{slide.stem}_{kind}.png")) for kind in ("tissue", "class")
        )
        return tissue == 255, classes

    return read


@pytest.fixture(scope="session")
def decoded() -> Callable[[Path], list[np.ndarray]]:
    """slide -> the pixels of every level by a decoder that is neither reader (tifffile with imagecodecs)."""

    def read(slide: Path) -> list[np.ndarray]:
        with tifffile.TiffFile(slide) as tiff:
            return [page.asarray() for page in tiff.pages]

    return read


def _zero(stream: bytes) -> bytes:
    return bytes(len(stream))


def _random(stream: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(stream))


def _scrambled_scan(stream: bytes) -> bytes:
    half = len(stream) // 2
    return stream[:half] + np.random.default_rng(1).bytes(len(stream) - half)


def _no_soi(stream: bytes) -> bytes:
    return b"\0\0" + stream[2:]


def _half(stream: bytes) -> bytes:
    half = len(stream) // 2
    return stream[:half] + bytes(len(stream) - half)


def _giant(stream: bytes) -> bytes:
    return stream[:7] + b"\xff\x00\xff\x00" + stream[11:]


def _halved_size(stream: bytes) -> bytes:
    return stream[:7] + b"\x00\x80\x00\x80" + stream[11:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeroed": _zero,
    "random": _random,
    "scrambled scan": _scrambled_scan,
    "no SOI": _no_soi,
    "second half zeroed": _half,
    "claims 65280 px": _giant,
    "claims 128 px": _halved_size,
}


@pytest.fixture(scope="session")
def damage_tile() -> Callable[..., Path]:
    """Copy `slide` to `out` with TIFF tile (column, row) of `level` damaged; `how` is in DAMAGES or "no bytes"."""

    def damage(slide: Path, out: Path, level: int, column: int, row: int, how: str) -> Path:
        shutil.copyfile(slide, out)
        with tifffile.TiffFile(slide) as tiff:
            page: Any = tiff.pages[level]
            index = row * -(-page.imagewidth // page.tilewidth) + column
            offset, length = page.dataoffsets[index], page.databytecounts[index]
            counts = page.tags["TileByteCounts"]
            width = {3: 2, 4: 4, 16: 8}[int(counts.dtype)]
            count_at = counts.valueoffset + index * width
        with open(out, "r+b") as file:
            if how == "no bytes":
                file.seek(count_at)
                file.write(bytes(width))
            else:
                file.seek(offset)
                stream = DAMAGES[how](file.read(length))
                file.seek(offset)
                file.write(stream)
        return out

    return damage


@pytest.fixture(scope="session")
def make_options() -> Callable[..., ShardOptions]:
    """ShardOptions for small slides; every field can be given."""

    def make(**changes: Any) -> ShardOptions:
        content: dict[str, Any] = {
            "mpp": 0.5,
            "context_px": 128,
            "stride_px": 128,
            "min_tissue": 0.5,
            "tissue": "otsu",
            "min_object_um2": 1000.0,
            "max_hole_um2": 4000.0,
            "region_patches": None,
            "quality": 85,
            "optimize_huffman": False,
            "reader": "auto",
            "routes": "auto",
            "check_tiles": True,
            "patch_flags": True,
            "max_bad_fraction": 1.0,
            "permute": "slide",
            "group_slides": 256,
            "patches_per_shard": 16,
            "seed": 0,
        }
        return ShardOptions(**{**content, **changes})

    return make


@pytest.fixture(scope="session")
def make_job(make_options: Callable[..., ShardOptions]) -> Callable[..., SlideJob]:
    """A job for `slide` into `dataset`, whose folders are made."""

    def make(
        slide: Path, dataset: Path, *, slide_id: str = "slide", mpp_override: float | None = None, **options: Any
    ) -> SlideJob:
        for folder in WorkFolder(dataset).folders:
            folder.mkdir(parents=True, exist_ok=True)
        return SlideJob(slide_id, str(slide), fingerprint(slide), mpp_override, str(dataset), make_options(**options))

    return make


def gather_group(group: Group, records: dict[str, SlideRecord]) -> list[GatherResult]:
    """Permute and gather a staged group in this process."""
    job = group.jobs[0]
    members = tuple(Member(j.name, j.path, records[j.name].patches) for j in group.jobs if records[j.name].patches)
    options = job.options
    permutation = PermuteJob(job.dataset, group.name, members, options.seed, options.patches_per_shard).run()
    firsts = np.cumsum([0, *permutation.counts])
    return [
        GatherJob(job.dataset, group.name, permutation.digest, number, int(firsts[number]), count).run()
        for number, count in enumerate(permutation.counts)
        if count
    ]


Sharded = tuple[list[SlideRecord], list[ShardRecord], dict[str, list[Any]]]


def _shard_slides(jobs: Sequence[SlideJob]) -> Sharded:
    """Stage, permute and gather slides: (a record per job, shards, name of a job -> [rejected, first reason])."""
    records = {job.name: job.run() for job in jobs}
    shards: list[ShardRecord] = []
    damaged: dict[str, list[Any]] = {}
    for group in make_groups(jobs, jobs[0].options):
        results = gather_group(group, records)
        if flag_broken_regions(group.jobs[0].work, results):
            results = gather_group(group, records)
        records |= after_gathering(group.jobs, {job.name: records[job.name] for job in group.jobs}, results)
        shards += [result.shard for result in results if result.shard is not None]
        for result in results:
            for name, (count, reason, _) in result.damaged.items():
                damaged.setdefault(name, [0, reason])[0] += count
    return [records[job.name] for job in jobs], shards, damaged


@pytest.fixture(scope="session")
def shard_slides() -> Callable[[Sequence[SlideJob]], Sharded]:
    """All the work on some slides, in this process and without an end: the work folder stays as it is."""
    return _shard_slides


@dataclass(frozen=True)
class SlideRun(SlideRecord):
    """What became of one slide that was sharded by itself. `damaged` are the patches that gathering rejected."""

    shards: list[ShardRecord] = field(default_factory=list)
    damaged: dict[str, list[Any]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def run_slide() -> Callable[[SlideJob], SlideRun]:
    """The same for one slide by itself."""

    def run(job: SlideJob) -> SlideRun:
        (record,), shards, damaged = _shard_slides([job])
        return SlideRun(**asdict(record), shards=shards, damaged=damaged)

    return run


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path, SlideRun], pa.Table]:
    """(dataset, record) -> the index rows of the record's shards."""

    def read(dataset: Path, record: SlideRun) -> pa.Table:
        return pa.concat_tables([pq.read_table(dataset / "shards" / f"{s.name}.parquet") for s in record.shards])

    return read


@pytest.fixture(scope="session")
def stored(rows_of: Callable[[Path, SlideRun], pa.Table]) -> Callable[[Path, SlideRun], dict[tuple[int, int], bytes]]:
    """(dataset, record) -> (row, col) -> payload."""

    def read(dataset: Path, record: SlideRun) -> dict[tuple[int, int], bytes]:
        found = {}
        for row in rows_of(dataset, record).to_pylist():
            with open(dataset / "shards" / f"{row['shard']}.tar", "rb") as file:
                file.seek(row["offset"])
                found[row["row"], row["col"]] = file.read(row["length"])
        return found

    return read


@pytest.fixture(scope="session")
def shard_files() -> Callable[[Path], dict[str, bytes]]:
    """dataset -> name -> bytes of the files of its shards."""

    def read(dataset: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((dataset / "shards").iterdir())}

    return read


@pytest.fixture(scope="session")
def make_dataset(make_job: Callable[..., SlideJob]) -> Callable[..., list[SlideRecord]]:
    """Shard slides (slide_id -> path) into a finished dataset, in this process; returns the slides' records."""

    def make(dataset: Path, listed: dict[str, Path], **options: Any) -> list[SlideRecord]:
        jobs = [make_job(path, dataset, slide_id=slide_id, **options) for slide_id, path in listed.items()]
        records, shards, _ = _shard_slides(jobs)
        finish_dataset(dataset, jobs[0].options, records, shards, {})
        shutil.rmtree(WorkFolder(dataset).path)
        return records

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, slides: dict[str, Path], make_dataset: Callable[..., list[SlideRecord]]
) -> Path:
    """A finished dataset of two slides in several shards. Read it, never write to it."""
    dataset = tmp_path_factory.mktemp("finished") / "dataset"
    make_dataset(dataset, {"first": slides["plain"], "second": slides["single"]})
    return dataset


@pytest.fixture
def dataset(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "dataset"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real slides here: {folder} is absent")
    return folder


_OPEN_AND_READ = """
import json, sys
from pathlib import Path
from sharding.slide import SlideError, open_slide
for text in sys.argv[2:]:
    print(json.dumps({"begin": text}), flush=True)
    try:
        with open_slide(Path(text), sys.argv[1]) as slide:
            for level, size in enumerate(slide.levels):
                slide.read(level, 0, 0, min(512, size.width_px), min(512, size.height_px))
        answer = {"opened": True, "error": "", "kind": ""}
    except SlideError as error:
        answer = {"opened": False, "error": str(error), "kind": type(error).__name__}
    print(json.dumps({"end": text, **answer}), flush=True)
"""


@pytest.fixture(scope="session")
def open_elsewhere() -> Callable[[Sequence[Path], str], dict[str, dict[str, Any]]]:
    """Open hostile files in another process, where a native reader may crash or hang; name -> what came of it."""

    def run(paths: Sequence[Path], reader: str = "auto") -> dict[str, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-c", _OPEN_AND_READ, reader, *map(str, paths)],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=REPOSITORY,
            check=False,
        )
        # The readers print on stdout by themselves.
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"begin"', '{"end"'))]
        begun = [line["begin"] for line in lines if "begin" in line]
        assert done.returncode == 0, f"exit {done.returncode} at {begun[-1:]}: {done.stderr[-2000:]}"
        return {Path(line["end"]).name: line for line in lines if "end" in line}

    return run
