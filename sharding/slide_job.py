"""One slide, from file to committed shards: the unit of work that a Ray task or a local process runs.

A job is idempotent. Its record, `.work/SLIDE.json`, is renamed into place after its last shard; a rerun reads the
record and does nothing. A slide that fails becomes a record with a reason, not an exception.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sharding.atomic import write_json
from sharding.encode import encode_patch, read_patch
from sharding.index import INDEX_SCHEMA
from sharding.permute import U64Array, order_keys, shard_numbers
from sharding.plan import ShardOptions, SlidePlan, plan_slide
from sharding.slide import DamagedTileError, Slide, SlideError, fingerprint, open_slide
from sharding.writer import ShardRecord, write_shard

WORK = ".work"
_NOT_STORED = {"shard", "key", "offset", "length", "crc32"}


@dataclass(frozen=True, slots=True)
class SlideJob:
    """One slide of a run. `fingerprint` was taken when the run began; a slide that changed since is refused."""

    slide_id: str
    path: str
    fingerprint: str
    mpp_override: float | None
    dataset: str
    options: ShardOptions

    @property
    def name(self) -> str:
        """Prefix of its shards and of its record: says nothing of the slide's name, so nothing of the patient."""
        identity = f"{self.slide_id}\0{self.fingerprint}"
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def record_path(self) -> Path:
        return Path(self.dataset) / WORK / f"{self.name}.json"


@dataclass(frozen=True, slots=True)
class SlideRecord:
    """What became of a slide. Its id, fingerprint, status, override, counts and shards enter the dataset's digest."""

    slide_id: str
    path: str
    fingerprint: str
    status: Literal["done", "quarantined"]
    mpp_override: float | None = None
    reason: str = ""
    reader: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    width_px0: int = 0
    height_px0: int = 0
    levels: int = 0
    patches: int = 0
    patches_copied: int = 0
    patches_quarantined: int = 0
    seconds: float = 0.0
    shards: list[ShardRecord] = field(default_factory=list)


def read_record(job: SlideJob) -> SlideRecord | None:
    """The record of a finished job; None where there is none, the spacing was another, or a shard is not whole."""
    try:
        value = json.loads(job.record_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if value["mpp_override"] != job.mpp_override:
        return None
    value["shards"] = [ShardRecord(**shard) for shard in value["shards"]]
    folder = Path(job.dataset) / "shards"
    for shard in value["shards"]:
        tar = folder / f"{shard.name}.tar"
        committed = all((folder / f"{shard.name}.{suffix}").is_file() for suffix in ("tar", "idx", "parquet"))
        if not committed or tar.stat().st_size != shard.bytes:
            return None
    return SlideRecord(**value)


def missing_paths(paths: list[str]) -> list[str]:
    """Those of `paths` that are not there, as seen from the process that runs this."""
    return [path for path in paths if not Path(path).exists()]


def run_slide(job: SlideJob) -> SlideRecord:
    """Do one job, or return its record where it is already done."""
    record = read_record(job)
    if record is None:
        started = time.monotonic()
        try:
            record = _shard(job, started)
        except (SlideError, OSError) as error:
            if isinstance(error, OSError) and not _concerns_slide(error, job):
                raise
            record = quarantined(job, " ".join(str(error).split()), seconds=time.monotonic() - started)
        except Exception as error:
            # A hostile file finds ways that no reader's author thought of. It is this slide's failure, and is reported.
            reason = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            record = quarantined(job, reason, seconds=time.monotonic() - started)
        write_json(job.record_path, asdict(record))
    return record


def quarantined(job: SlideJob, reason: str, *, seconds: float = 0.0) -> SlideRecord:
    """The record of a slide that gives nothing, and why."""
    return SlideRecord(
        job.slide_id, job.path, job.fingerprint, "quarantined", job.mpp_override, reason, seconds=seconds
    )


def _concerns_slide(error: OSError, job: SlideJob) -> bool:
    # A full disk or a lost output folder is the run's failure; only errors about the slide's own file are the slide's.
    return error.filename is not None and Path(str(error.filename)) == Path(job.path)


def _shard(job: SlideJob, started: float) -> SlideRecord:
    path = Path(job.path)
    if fingerprint(path) != job.fingerprint:
        raise SlideError("the file changed while the run was under way; shard it again, into another folder")
    options = job.options
    with open_slide(path, options.reader) as slide:
        plan = plan_slide(slide, job.fingerprint, options, mpp_override=job.mpp_override)
        damaged: dict[int, str] = {}
        copied = 0
        shards = []
        folder = Path(job.dataset) / "shards"
        keys = order_keys(plan.sample_id, options.seed)
        num_shards = shards_needed(plan, options)
        shard_of = shard_numbers(keys, num_shards)
        for number in range(num_shards):
            samples = _Samples(slide, plan, np.flatnonzero(shard_of == number), keys, options.quality)
            damaged.update(samples.damaged)
            copied += len(samples.copied)
            if len(samples.order):
                columns = _columns(job, plan, samples.order, samples.copied)
                shards.append(write_shard(folder, f"{job.name}-{number:05d}", samples, columns))
        reason = _reason(damaged, plan)
        if plan.num_patches and len(damaged) / plan.num_patches > options.max_bad_fraction:
            _remove(folder, shards)
            raise SlideError(f"{reason}: more than max_bad_fraction={options.max_bad_fraction:g} of the slide")
        size = slide.levels[0]
        return SlideRecord(
            slide_id=job.slide_id,
            path=job.path,
            fingerprint=job.fingerprint,
            status="done",
            mpp_override=job.mpp_override,
            reason=reason,
            reader=slide.reader_name,
            mpp=None if plan.spacing is None else (plan.spacing.x_um + plan.spacing.y_um) / 2,
            mpp_source="unknown" if plan.spacing is None else plan.spacing.source,
            width_px0=size.width_px,
            height_px0=size.height_px,
            levels=len(slide.levels),
            patches=plan.num_patches - len(damaged),
            patches_copied=copied,
            patches_quarantined=len(damaged),
            seconds=time.monotonic() - started,
            shards=shards,
        )


def shards_needed(plan: SlidePlan, options: ShardOptions) -> int:
    """How many shards a slide's patches are spread over."""
    return -(-plan.num_patches // options.patches_per_shard)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would write, from its plan and a few encoded patches. `seconds` is one process's time."""

    slide_id: str
    reason: str
    mpp: float | None
    mpp_source: str
    reader: str
    patches: int
    patches_copied: int
    shards: int
    bytes: int
    seconds: float


_ESTIMATE_PATCHES = 16


def estimate_slide(job: SlideJob) -> Estimate:
    """Plan one slide and write nothing. A slide that would be quarantined has a `reason` and no patches."""
    started = time.monotonic()
    try:
        with open_slide(Path(job.path), job.options.reader) as slide:
            plan = plan_slide(slide, job.fingerprint, job.options, mpp_override=job.mpp_override)
            planned = time.monotonic()
            keys = order_keys(plan.sample_id, job.options.seed)
            sizes = []
            for i in np.unique(np.linspace(0, plan.num_patches - 1, _ESTIMATE_PATCHES).astype(int)):
                if plan.num_patches == 0:
                    break
                with contextlib.suppress(DamagedTileError):
                    # Header and padding of a tar member are 768 bytes on average.
                    sizes.append(768 + len(_payload(slide, plan, int(i), job.options.quality)[0]))
            per_patch = (time.monotonic() - planned) / max(1, len(sizes))
            return Estimate(
                slide_id=job.slide_id,
                reason="",
                mpp=None if plan.spacing is None else (plan.spacing.x_um + plan.spacing.y_um) / 2,
                mpp_source="unknown" if plan.spacing is None else plan.spacing.source,
                reader=slide.reader_name,
                patches=plan.num_patches,
                patches_copied=plan.num_patches if plan.copies else 0,
                shards=len(np.unique(shard_numbers(keys, shards_needed(plan, job.options)))),
                bytes=round(plan.num_patches * float(np.mean(sizes))) if sizes else 0,
                seconds=planned - started + per_patch * plan.num_patches,
            )
    except Exception as error:  # as in run_slide
        kind = "" if isinstance(error, SlideError | OSError) else f"unexpected {type(error).__name__}: "
        return Estimate(
            job.slide_id, kind + " ".join(str(error).split()), None, "", "", 0, 0, 0, 0, time.monotonic() - started
        )


class _Samples:
    """The samples of one shard: read in raster order (a slide's tiles once), stored in the order of their keys.

    The encoded shard is held in memory: about 30 KB a patch times patches_per_shard.
    """

    def __init__(
        self, slide: Slide, plan: SlidePlan, members: npt.NDArray[np.intp], keys: U64Array, quality: int
    ) -> None:
        self.damaged: dict[int, str] = {}
        self.copied: set[int] = set()
        payloads: dict[int, bytes] = {}
        for i in members.tolist():
            try:
                payloads[i], copied = _payload(slide, plan, i, quality)
            except DamagedTileError as error:
                self.damaged[i] = str(error)
                continue
            if copied:
                self.copied.add(i)
        self.order = np.array(sorted(payloads, key=lambda i: int(keys[i])), np.intp)
        self._payloads = payloads
        self._sample_id = plan.sample_id

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for i in self.order.tolist():
            yield f"{int(self._sample_id[i]):016x}", self._payloads[i]


def _payload(slide: Slide, plan: SlidePlan, i: int, quality: int) -> tuple[bytes, bool]:
    """The JPEG of patch i of the plan, and whether it is its TIFF tile, copied. Raises DamagedTileError."""
    cells = plan.cells
    if plan.copies:
        tile = slide.copy_tile(plan.geometry.level, int(cells.col[i]), int(cells.row[i]))
        if tile is not None:
            return tile, True
    pixels = read_patch(slide, plan.geometry, float(cells.window_x[i]), float(cells.window_y[i]))
    return encode_patch(pixels, quality), False


def _columns(job: SlideJob, plan: SlidePlan, order: npt.NDArray[np.intp], copied: set[int]) -> pa.Table:
    count = len(order)
    cells = plan.cells
    columns: dict[str, Any] = {
        "sample_id": plan.sample_id[order],
        "slide_id": [job.slide_id] * count,
        "x0": cells.x0[order],
        "y0": cells.y0[order],
        "row": cells.row[order],
        "col": cells.col[order],
        "level": np.full(count, plan.geometry.level),
        "read_px": np.full(count, plan.geometry.read_px),
        "mpp": [plan.geometry.mpp] * count,
        "tissue_fraction": plan.tissue_fraction[order],
        "flags": plan.flags[order],
        "route": ["copy" if i in copied else "decode" for i in order.tolist()],
        "region": [None] * count,
    }
    fields = [INDEX_SCHEMA.field(name) for name in INDEX_SCHEMA.names if name not in _NOT_STORED]
    return pa.table([pa.array(columns[f.name], f.type) for f in fields], schema=pa.schema(fields))


def _reason(damaged: dict[int, str], plan: SlidePlan) -> str:
    if not damaged:
        return "" if plan.num_patches else "no patch holds enough tissue"
    return f"{len(damaged)} of {plan.num_patches} patches are damaged (first: {damaged[min(damaged)]})"


def _remove(folder: Path, shards: list[ShardRecord]) -> None:
    for shard in shards:
        for suffix in ("parquet", "idx", "tar"):  # the commit goes first
            (folder / f"{shard.name}.{suffix}").unlink(missing_ok=True)
