"""One slide, from file to rows: planned, its pixels proven, and every patch that is no copy encoded.

The unit of work that a Ray task or a local process runs on a slide. A job is idempotent: its record is renamed into
place after all else, and a rerun finds it and does nothing. A slide that fails becomes a record with a reason, not an
exception.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from imagecodecs import deflate_crc32

from sharding.atomic import atomic_path, write_json
from sharding.encode import encode_patch, read_patch
from sharding.faults import fault_point
from sharding.filters import patch_flags
from sharding.index import FLAG_PARTIAL_REGION
from sharding.md5 import md5_of
from sharding.plan import ShardOptions, SlidePlan, load_plan, plan_digest, plan_slide, save_plan
from sharding.qc import qc_picture
from sharding.rows import NO_REGION, RAW, Rows
from sharding.slide import DamagedTileError, Pixels, RawTiles, Slide, SlideError, fingerprint, open_slide
from sharding.work import WorkFolder

_MIN_TILE_BYTES = 4
# Tiles with Huffman tables of their own have a head each: those beyond are made again when the tile is copied.
_MOST_HEADS = 64


@dataclass(frozen=True, slots=True)
class SlideJob:
    """One slide of a run. `fingerprint` was taken when the run began; a slide that changed since is refused.

    `md5` is what a manifest says of the file; `plans` is a folder in which plans are kept beyond the run.
    """

    slide_id: str
    path: str
    fingerprint: str
    mpp_override: float | None
    dataset: str
    options: ShardOptions
    md5: str | None = None
    plans: str | None = None

    @property
    def name(self) -> str:
        """Of its files: says nothing of the slide's name, so nothing of the patient."""
        identity = f"{self.slide_id}\0{self.fingerprint}"
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def size_bytes(self) -> int:
        size = self.fingerprint.partition("-")[0]
        return int(size) if size.isdigit() else 0  # the fingerprint of a file that cannot be read is another text

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(Path(self.dataset))

    def run(self) -> SlideRecord:
        return stage_slide(self)


@dataclass(frozen=True, slots=True)
class SlideRecord:
    """What became of a slide. Its id, fingerprint, status, override and counts enter the dataset's digest."""

    slide_id: str
    path: str
    fingerprint: str
    status: Literal["done", "quarantined"]
    mpp_override: float | None = None
    md5: str | None = None
    reason: str = ""
    reader: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    width_px0: int = 0
    height_px0: int = 0
    levels: int = 0
    tissue_fraction: float | None = None
    planned: int = 0
    patches: int = 0
    patches_copied: int = 0
    patches_quarantined: int = 0
    seconds: float = 0.0
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that payloads come from, and what its patches have in common.

    `path` is absolute; "" stands for the slide's own payloads in the work folder. `heads` are what precedes the bytes
    of the file in a payload, in hexadecimal. `raw` describes whole TIFF tiles: [prefix in hexadecimal, whether they are
    RGB, their side in pixels].
    """

    slide_id: str
    name: str
    path: str
    fingerprint: str
    size_bytes: int
    mtime_ns: int
    route: Literal["copy", "decode"]
    level: int
    read_px: int
    mpp: float | None
    heads: list[str] = field(default_factory=lambda: [""])
    raw: tuple[str, bool, int] | None = None


def missing_paths(paths: list[str]) -> list[str]:
    """Those of `paths` that are not there, as seen from the process that runs this."""
    return [path for path in paths if not Path(path).exists()]


def read_record(job: SlideJob) -> SlideRecord | None:
    """The record of a finished job; None where there is none, or its spacing or digest was another."""
    try:
        value = json.loads(job.work.record(job.name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if value["mpp_override"] != job.mpp_override or value["md5"] != job.md5:
        return None
    record = SlideRecord(**value)
    if record.status == "done" and not job.work.rows(job.name).is_file():
        return None
    return record


def stage_slide(job: SlideJob) -> SlideRecord:
    """Do one job, or return its record where it is already done."""
    record = read_record(job)
    if record is None:
        started = time.monotonic()
        # An outdated record goes before its rows are written over: after a death it would stand for the new ones.
        job.work.record(job.name).unlink(missing_ok=True)
        try:
            record = _stage(job, started)
        except (SlideError, OSError) as error:
            if isinstance(error, OSError) and not _concerns_slide(error, job):
                raise
            record = quarantined(job, " ".join(str(error).split()), seconds=time.monotonic() - started)
        except Exception as error:
            # A hostile file finds ways that no reader's author thought of. It is this slide's failure, and is reported.
            trace = traceback.extract_tb(error.__traceback__)
            places = "".join(traceback.format_list(trace))
            record = quarantined(job, unexpected(error), seconds=time.monotonic() - started, trace=places)
        write_record(job, record)
    return record


def unexpected(error: Exception) -> str:
    """What is said of an error that nobody foresaw. Its message may quote the slide's metadata, so it is left out."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


def write_record(job: SlideJob, record: SlideRecord) -> None:
    """Note what became of a slide."""
    write_json(job.work.record(job.name), asdict(record))


def quarantined(job: SlideJob, reason: str, *, seconds: float = 0.0, trace: str = "") -> SlideRecord:
    """The record of a slide that gives nothing, and why."""
    return SlideRecord(
        job.slide_id,
        job.path,
        job.fingerprint,
        "quarantined",
        job.mpp_override,
        job.md5,
        reason,
        seconds=seconds,
        traceback=trace,
    )


def _concerns_slide(error: OSError, job: SlideJob) -> bool:
    # A full disk or a lost output folder is the run's failure; only errors about the slide's own file are the slide's.
    return error.filename is not None and Path(str(error.filename)) == Path(job.path)


def plan_of(job: SlideJob, slide: Slide, *, keep: bool = True) -> SlidePlan:
    """The slide's plan: the kept one where its digest is right, else a new one, which is kept (with `keep`)."""
    digest = plan_digest(job.fingerprint, job.mpp_override, job.options)
    path = Path(job.plans) / f"{job.name}-{digest[:16]}.npz" if job.plans else job.work.plan(job.name)
    plan = load_plan(path, digest)
    if plan is None:
        plan = plan_slide(slide, job.fingerprint, job.options, mpp_override=job.mpp_override)
        if keep or job.plans:
            save_plan(path, plan, digest)
            plan = load_plan(path, digest) or plan
    return plan


def _stage(job: SlideJob, started: float) -> SlideRecord:
    path = Path(job.path)
    status = path.stat()
    _check_fingerprint(job)
    _check_md5(job)
    with open_slide(path, job.options.reader) as slide:
        plan = plan_of(job, slide)
        staged = stage_rows(job, slide, plan, (status.st_size, status.st_mtime_ns))
        if path.stat().st_mtime_ns != status.st_mtime_ns:
            _check_fingerprint(job)
        reason = bad_reason(staged.damaged, plan.num_patches)
        check_bad_fraction(reason, len(staged.damaged), plan.num_patches, job.options)
        _write_qc(job, slide, plan, staged.damaged)
        work = job.work
        write_json(work.sources(job.name), [asdict(source) for source in staged.sources])
        with atomic_path(work.rows(job.name)) as temporary, open(temporary, "wb") as file:
            np.save(file, staged.rows)
        size = slide.levels[0]
        return SlideRecord(
            slide_id=job.slide_id,
            path=job.path,
            fingerprint=job.fingerprint,
            status="done",
            mpp_override=job.mpp_override,
            md5=job.md5,
            reason=reason if staged.damaged or plan.num_patches else "no patch holds enough tissue",
            reader=slide.reader_name,
            mpp=None if plan.spacing is None else (plan.spacing.x_um + plan.spacing.y_um) / 2,
            mpp_source="unknown" if plan.spacing is None else plan.spacing.source,
            width_px0=size.width_px,
            height_px0=size.height_px,
            levels=len(slide.levels),
            tissue_fraction=round(float(plan.mask.mask.mean()), 6),
            planned=plan.num_patches,
            patches=len(staged.rows),
            patches_copied=staged.num_copied,
            patches_quarantined=len(staged.damaged),
            seconds=time.monotonic() - started,
        )


def _check_fingerprint(job: SlideJob) -> None:
    if fingerprint(Path(job.path)) != job.fingerprint:
        raise SlideError("the file changed while the run was under way; run again")


def _check_md5(job: SlideJob) -> None:
    if job.md5 is None:
        return
    found = md5_of(job.path)
    if found != job.md5:
        raise SlideError(f"its MD5 is {found}, the manifest says {job.md5}: the file is damaged or another one")


def _write_qc(job: SlideJob, slide: Slide, plan: SlidePlan, damaged: dict[int, str]) -> None:
    geometry, level = plan.geometry, slide.levels[plan.geometry.level]
    stride = geometry.stride_px * geometry.scale
    width, height = stride * level.downsample_x, stride * level.downsample_y
    bad = np.zeros(plan.num_patches, bool)
    bad[list(damaged)] = True
    drawn = qc_picture(
        plan.mask.picture,
        plan.mask.mask,
        plan.rows["col"] * width,
        plan.rows["row"] * height,
        cell_x_px0=plan.mask.cell_x_px0,
        cell_y_px0=plan.mask.cell_y_px0,
        width_px0=width,
        height_px0=height,
        damaged=bad,
    )
    with atomic_path(job.work.qc(job.slide_id)) as temporary:
        temporary.write_bytes(drawn)


def bad_reason(damaged: dict[int, str], planned: int) -> str:
    """What slides.parquet says of a slide's damaged patches (place in the plan -> reason); empty without any."""
    if not damaged:
        return ""
    return f"{len(damaged)} of {planned} patches are damaged (first: {damaged[min(damaged)]})"


def check_bad_fraction(reason: str, damaged: int, planned: int, options: ShardOptions) -> None:
    """Raise SlideError where more of a slide is damaged than the recipe allows."""
    if planned and damaged / planned > options.max_bad_fraction:
        raise SlideError(f"{reason}: more than max_bad_fraction={options.max_bad_fraction:g} of the slide")


@dataclass(frozen=True, slots=True)
class Staged:
    """A slide's rows, less the damaged ones: `rows` ROW [patches] in raster order, `source` numbering `sources`."""

    rows: Rows
    sources: list[Source]
    damaged: dict[int, str]

    @property
    def num_copied(self) -> int:
        numbers = [i for i, source in enumerate(self.sources) if source.route == "copy"]
        return int(np.isin(self.rows["source"], numbers).sum())


def stage_rows(job: SlideJob, slide: Slide, plan: SlidePlan, identity: tuple[int, int]) -> Staged:
    """Find where the bytes of each planned patch are, and encode those that are nowhere yet.

    A TIFF tile that is a patch is proven (`check_tiles`): decoded strictly, and its place and crc32 noted, so that the
    copy can tell whether the file changed since. Without `check_tiles` only its place is noted. Every other patch is
    read, resampled, encoded and appended to the slide's payloads in the work folder, in raster order: TIFF tiles are
    decoded once.

    `identity` is (size in bytes, mtime in ns) of the slide's file.
    """
    stager = _Stager(job, slide, plan, identity)
    remaining = np.arange(plan.num_patches)
    if plan.copies:
        remaining = stager.prove() if job.options.check_tiles else stager.locate()
    if len(remaining):
        stager.encode(remaining)
    return stager.finish()


class _Stager:
    def __init__(self, job: SlideJob, slide: Slide, plan: SlidePlan, identity: tuple[int, int]) -> None:
        self.job, self.slide, self.plan = job, slide, plan
        self.rows = plan.rows.copy()
        self.damaged: dict[int, str] = {}
        self.sources: list[Source] = []
        self.identity = identity

    def prove(self) -> npt.NDArray[np.intp]:
        """Decode each tile strictly and note its place, crc32 and flags; returns the patches that are no copy."""
        rows, level = self.rows, self.plan.geometry.level
        heads: dict[bytes, int] = {}
        raw = self.slide.raw_tiles(level)
        places: list[tuple[int, int, int, int]] = []
        copied, left = [], []
        for i, (column, row) in enumerate(zip(rows["col"].tolist(), rows["row"].tolist(), strict=True)):
            fault_point("stage.patch")
            try:
                tile = self.slide.copy_tile(level, column, row, pixels=self.job.options.patch_flags)
            except DamagedTileError as error:
                self.damaged[i] = str(error)
                continue
            if tile is None:
                left.append(i)
                continue
            copied.append(i)
            checksum = deflate_crc32(tile.stream)
            if len(heads) < _MOST_HEADS or tile.head in heads:
                places.append((heads.setdefault(tile.head, len(heads)), tile.offset, tile.length, checksum))
            else:
                assert raw is not None
                at = row * raw.columns + column
                places.append((RAW, int(raw.offsets[at]), int(raw.lengths[at]), checksum))
            if tile.pixels is not None:
                self._flag(i, tile.pixels)
        self._place(copied, places)
        described = None if raw is None or len(heads) < _MOST_HEADS else self._described(raw)
        self._add("copy", self.job.path, self.identity, heads=[head.hex() for head in heads], raw=described)
        return np.array(left, np.intp)

    def locate(self) -> npt.NDArray[np.intp]:
        """Note each tile's place as the TIFF states it; returns the patches that are no copy."""
        rows, level = self.rows, self.plan.geometry.level
        raw = self.slide.raw_tiles(level)
        if raw is None:
            return np.arange(len(rows))
        tile = rows["row"].astype(np.int64) * raw.columns + rows["col"]
        known = tile < min(len(raw.offsets), len(raw.lengths))
        offset, length = np.zeros((2, len(rows)), np.uint64)
        offset[known], length[known] = raw.offsets[tile[known]], raw.lengths[tile[known]]
        absent = known & (offset == 0) & (length == 0)
        size = np.uint64(self.identity[0])
        rows["offset"], rows["length"] = offset, length
        for i in np.flatnonzero(~known).tolist():
            self.damaged[i] = self._tile(i, f"is missing from the file's tile table ({len(raw.offsets)} entries)")
        for i in np.flatnonzero(known & ~absent & (length < _MIN_TILE_BYTES)).tolist():
            self.damaged[i] = self._tile(i, f"is empty ({length[i]} bytes)")
        for i in np.flatnonzero(known & ~absent & (length > size - np.minimum(offset, size))).tolist():
            self.damaged[i] = self._tile(i, "reaches beyond the end of the file")
        self._add("copy", self.job.path, self.identity, heads=[], raw=self._described(raw))
        return np.flatnonzero(absent)

    def _described(self, raw: RawTiles) -> tuple[str, bool, int]:
        return raw.header.prefix.hex(), raw.header.rgb, self.plan.geometry.context_px

    def encode(self, patches: npt.NDArray[np.intp]) -> None:
        """Read, encode and append each patch to the slide's payloads."""
        rows, options = self.rows, self.job.options
        window_x, window_y = (axis.tolist() for axis in self.plan.windows())
        payloads = self.job.work.payloads(self.job.name)
        rows["source"][patches] = len(self.sources)
        places: list[tuple[int, int, int, int]] = []
        stored = []
        offset = 0
        with atomic_path(payloads) as temporary, open(temporary, "wb", buffering=1 << 20) as file:
            for i in patches.tolist():
                fault_point("stage.patch")
                try:
                    pixels = read_patch(self.slide, self.plan.geometry, window_x[i], window_y[i])
                except DamagedTileError as error:
                    self.damaged[i] = str(error)
                    continue
                payload = encode_patch(pixels, options.quality, optimize=options.optimize_huffman)
                file.write(payload)
                stored.append(i)
                places.append((0, offset, len(payload), deflate_crc32(payload)))
                offset += len(payload)
                self._flag(i, pixels)
        self._place(stored, places)
        self._add("decode", "", (offset, 0))

    def _place(self, patches: list[int], places: list[tuple[int, int, int, int]]) -> None:
        for name, values in zip(("head", "offset", "length", "crc32"), zip(*places, strict=True), strict=False):
            self.rows[name][patches] = values

    def finish(self) -> Staged:
        keep = np.ones(len(self.rows), bool)
        keep[list(self.damaged)] = False
        lost = self.rows["region"][~keep]
        rows = self.rows[keep]
        broken = np.isin(rows["region"], lost[lost != NO_REGION])
        rows["flags"] |= np.where(broken, FLAG_PARTIAL_REGION, 0).astype(np.uint32)
        return Staged(rows, self.sources, self.damaged)

    def _flag(self, i: int, pixels: Pixels) -> None:
        if self.job.options.patch_flags:
            self.rows["flags"][i] |= patch_flags(pixels)

    def _tile(self, i: int, what: str) -> str:
        row = self.rows[i]
        return f"TIFF tile ({row['col']}, {row['row']}) of level {self.plan.geometry.level} {what}"

    def _add(self, route: Literal["copy", "decode"], path: str, identity: tuple[int, int], **more: Any) -> None:
        geometry = self.plan.geometry
        self.sources.append(
            Source(
                self.job.slide_id,
                self.job.name,
                path,
                self.job.fingerprint,
                *identity,
                route,
                geometry.level,
                geometry.read_px,
                geometry.mpp,
                **more,
            )
        )


def read_sources(work: WorkFolder, name: str) -> list[Source]:
    """The sources of a staged slide."""
    return [Source(**value) for value in json.loads(work.sources(name).read_text(encoding="utf-8"))]
