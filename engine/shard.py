"""`engine shard`: slides to a dataset. One job per slide, on Ray or in local processes; the same bytes either way."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.cluster import Crash, fan_out
from engine.config import UsageError, dump
from engine.console import progress, say
from engine.recipes import ShardRecipe
from engine.slide_list import ListedSlide, absolute, list_slides
from sharding.atomic import atomic_path, sweep_temporary, write_json
from sharding.dataset import RESERVED_COLUMNS, finish_dataset, options_digest
from sharding.index import read_meta
from sharding.lock import LOCK_NAME, LockedError, folder_lock
from sharding.slide import dicom_series, environment_versions, fingerprint
from sharding.slide_job import (
    WORK,
    Estimate,
    SlideJob,
    SlideRecord,
    estimate_slide,
    missing_paths,
    quarantined,
    run_slide,
)

_FINGERPRINT_THREADS = 8
_UNREADABLE = "unreadable: "  # in the place of a fingerprint


def run(recipe: ShardRecipe, *, local: bool = False, address: str | None = None) -> dict[str, Any]:
    """Make the dataset, finish an interrupted one, or find it finished and write nothing.

    Returns the shape of DESIGN section 9: {dataset, digest, slides: {done, quarantined}, patches: {copy, decode,
    quarantined}, shards, bytes, seconds}, and `failures`: [{slide_id, reason}].

    Raises UsageError for a recipe that cannot be met, LockedError where another process writes there.
    """
    started = time.monotonic()
    out = recipe.out.expanduser().resolve()
    slides = list_slides(recipe.slides)
    _check_place(out)
    recipe = recipe.model_copy(update={"out": out, "slides": absolute(recipe.slides)})
    if not (out / "dataset.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out):
            if not (out / "dataset.json").is_file():  # else another process finished it meanwhile
                meta = _make(out, recipe, slides, local=local, address=address)
                return _summary(out, meta, _failures(out), time.monotonic() - started)
    meta = _finished(out, recipe, slides)
    _clean_up(out)
    say(f"{out} is finished already; nothing was written.")
    _note_changed_columns(out, slides)
    return _summary(out, meta, _failures(out), time.monotonic() - started)


def _make(
    out: Path, recipe: ShardRecipe, slides: Sequence[ListedSlide], *, local: bool, address: str | None
) -> dict[str, Any]:
    """Do what is left to do; the caller holds the lock. Returns dataset.json's content."""
    # The folder for work comes first: it is what a rerun knows an unfinished dataset by.
    for folder in (out, out / WORK, out / "shards"):
        folder.mkdir(exist_ok=True)
        sweep_temporary(folder)
    _claim(out, recipe)
    if address is not None:
        _check_visible(out, slides, address)
    jobs, twins = _jobs(slides, out, recipe)
    records = twins + _run_jobs(jobs, recipe, local=local, address=address)
    _drop_unlisted(out, records)
    with atomic_path(out / "recipe.yaml") as temporary:
        temporary.write_text(dump(recipe), encoding="utf-8")
    _log(out, records)
    meta = finish_dataset(out, recipe.options(), records, {slide.slide_id: slide.columns for slide in slides})
    shutil.rmtree(out / WORK)
    return meta


def _check_visible(out: Path, slides: Sequence[ListedSlide], address: str) -> None:
    """Have the cluster's first task look for the output and a slide: a node without the file system sees neither."""
    wanted = [str(out / WORK / "recipe.json"), *(str(s.path) for s in slides[:1] if s.path.exists())]
    for done in fan_out(missing_paths, [wanted], workers=1, address=address):
        if not isinstance(done.result, Crash) and done.result:
            raise UsageError(
                f"{done.result[0]} is not visible on the cluster at {address}: slides and out have to lie on a file "
                "system that every node sees under the same path."
            )


def _clean_up(out: Path) -> None:
    """Remove what a run that was killed after its last write left in a finished dataset."""
    if (out / WORK).exists() or (out / LOCK_NAME).exists():
        with contextlib.suppress(LockedError), folder_lock(out):
            shutil.rmtree(out / WORK, ignore_errors=True)
            sweep_temporary(out)


def dry_run(recipe: ShardRecipe, *, address: str | None = None) -> dict[str, Any]:
    """Say what `run` would make, and write nothing: slides, patches per route, shards, bytes, seconds.

    It plans in processes of this machine; a Ray cluster is used only where one is named.
    """
    started = time.monotonic()
    slides = list_slides(recipe.slides)
    out = recipe.out.expanduser().resolve()
    _check_place(out)
    if (out / "dataset.json").is_file():
        _finished(out, recipe, slides)
    jobs, twins = _jobs(slides, out, recipe)
    workers = _workers(recipe)
    estimates = [_as_estimate(twin) for twin in twins]
    with progress("plan", len(jobs), "slides") as advance:
        for done in fan_out(estimate_slide, jobs, workers=workers, local=address is None, address=address):
            if isinstance(done.result, Crash):
                estimates.append(_as_estimate(quarantined(done.job, done.result.reason)))
            else:
                estimates.append(done.result)
            advance(1, "")
    estimates.sort(key=lambda estimate: estimate.slide_id)
    bad = [e for e in estimates if e.reason]
    copied = sum(e.patches_copied for e in estimates)
    from engine.runtime import usable_cores

    return {
        "dry_run": True,
        "dataset": str(out),
        "slides": {"done": len(estimates) - len(bad), "quarantined": len(bad)},
        "patches": {"copy": copied, "decode": sum(e.patches for e in estimates) - copied, "quarantined": 0},
        "shards": sum(e.shards for e in estimates),
        "bytes": sum(e.bytes for e in estimates),
        "seconds": round(sum(e.seconds for e in estimates) / (workers or usable_cores()), 1),
        "plan_seconds": round(time.monotonic() - started, 3),
        "spacing": [{"slide_id": e.slide_id, "mpp": e.mpp, "source": e.mpp_source} for e in estimates if not e.reason],
        "failures": [{"slide_id": e.slide_id, "reason": e.reason} for e in bad],
    }


def _as_estimate(record: SlideRecord) -> Estimate:
    return Estimate(record.slide_id, record.reason, None, "", "", 0, 0, 0, 0, 0.0)


def _workers(recipe: ShardRecipe) -> int | None:
    return None if recipe.workers == "auto" else recipe.workers


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={out} is a file; expected a folder.")
    if out.is_dir() and not (out / WORK).is_dir() and not (out / "dataset.json").is_file():
        strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise UsageError(
                f"out={out} is not empty ({strangers[0]}) and holds no dataset; give a new or empty folder."
            )


def _finished(out: Path, recipe: ShardRecipe, slides: Sequence[ListedSlide]) -> dict[str, Any]:
    meta = read_meta(out)
    if meta["recipe_digest"] != options_digest(recipe.options()):
        changed = _changed(meta["recipe"], recipe.options().as_dict())
        raise UsageError(f"{out} was made with another recipe ({changed}); datasets are never mixed: give another out.")
    known = {slide["slide_id"]: (slide["fingerprint"], slide["mpp_override"]) for slide in meta["slides"]}
    now = {slide.slide_id: (mark, slide.mpp) for slide, mark in zip(slides, _fingerprints(slides), strict=True)}
    if known != now:
        different = sorted(key for key in known.keys() | now.keys() if known.get(key) != now.get(key))
        raise UsageError(
            f"{out} was made from other slides or spacings ({len(different)} differ, the first is {different[0]}); "
            "new slides make a new dataset: give another out."
        )
    return meta


def _note_changed_columns(out: Path, slides: Sequence[ListedSlide]) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(out / "slides.parquet")
    names = [name for name in table.column_names if name not in RESERVED_COLUMNS]
    stored = {row["slide_id"]: {name: row[name] for name in names} for row in table.to_pylist()}
    if stored != {slide.slide_id: slide.columns for slide in slides}:
        say(
            "note: the further columns of the slide list are others now; slides.parquet keeps those of the first run. "
            "Join yours by slide_id, or shard into another folder."
        )


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={old.get(key)} there, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )


def _claim(out: Path, recipe: ShardRecipe) -> None:
    """Note whose work is under way, or refuse to continue another recipe's."""
    path = out / WORK / "recipe.json"
    content = {"recipe": recipe.options().as_dict(), "versions": environment_versions()}
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if begun != content:
            raise UsageError(
                f"{out} holds the unfinished work of {_another(begun, content)}: "
                "finish that one, remove the folder, or give another out."
            )
    else:
        write_json(path, content)


def _another(begun: dict[str, Any], now: dict[str, Any]) -> str:
    if begun.get("recipe") != now["recipe"]:
        return f"another recipe ({_changed(begun.get('recipe', {}), now['recipe'])})"
    return f"other library versions ({_changed(begun.get('versions', {}), now['versions'])})"


def _fingerprints(slides: Sequence[ListedSlide]) -> list[str]:
    def one(slide: ListedSlide) -> str:
        try:
            return fingerprint(slide.path)
        except OSError as error:
            return f"{_UNREADABLE}{error.strerror}"

    with ThreadPoolExecutor(_FINGERPRINT_THREADS) as pool:
        return list(pool.map(one, slides))


def _jobs(slides: Sequence[ListedSlide], out: Path, recipe: ShardRecipe) -> tuple[list[SlideJob], list[SlideRecord]]:
    """One job per slide, largest file first so that none is left alone at the end; and records of repeated files."""
    options = recipe.options()
    jobs, twins = [], []
    seen: dict[str, str] = {}
    listed = [
        SlideJob(slide.slide_id, str(slide.path), mark, slide.mpp, str(out), options)
        for slide, mark in zip(slides, _fingerprints(slides), strict=True)
    ]
    # Of the files of a DICOM slide the largest holds level 0; annotations and labels are small.
    for job in sorted(listed, key=lambda job: -_size_bytes(job) if job.path.lower().endswith(".dcm") else 0):
        if job.fingerprint.startswith(_UNREADABLE):
            twins.append(quarantined(job, f"{job.path}: {job.fingerprint.removeprefix(_UNREADABLE)}"))
            continue
        series = dicom_series(Path(job.path)) if job.path.lower().endswith(".dcm") else None
        if job.fingerprint in seen:
            reason = f"the same file as slide {seen[job.fingerprint]}; its patches would be in twice"
            twins.append(quarantined(job, reason))
        elif series is not None and series in seen:
            reason = f"another file of the DICOM slide {seen[series]}; list one file of each DICOM slide in a CSV"
            twins.append(quarantined(job, reason))
        else:
            seen[job.fingerprint] = job.slide_id
            if series is not None:
                seen[series] = job.slide_id
            jobs.append(job)
    jobs.sort(key=lambda job: (-_size_bytes(job), job.slide_id))
    return jobs, twins


def _size_bytes(job: SlideJob) -> int:
    return 0 if job.fingerprint.startswith(_UNREADABLE) else int(job.fingerprint.partition("-")[0])


def _run_jobs(jobs: Sequence[SlideJob], recipe: ShardRecipe, *, local: bool, address: str | None) -> list[SlideRecord]:
    records = []
    patches = failed = 0
    with progress("shard", len(jobs), "slides") as advance:
        for done in fan_out(run_slide, jobs, workers=_workers(recipe), local=local, address=address):
            if isinstance(done.result, Crash):
                record = quarantined(done.job, done.result.reason)
                write_json(done.job.record_path, asdict(record))
            else:
                record = done.result
            records.append(replace(record, path=done.job.path))
            patches += record.patches
            if record.status == "quarantined":
                failed += 1
                say(f"quarantined: {record.slide_id}: {record.reason}")
            elif record.patches == 0:
                say(f"no patch: {record.slide_id}: {record.reason}")
            elif record.patches_quarantined:
                say(f"damaged: {record.slide_id}: {record.reason}")
            advance(1, f"{patches} patches, {failed} slides quarantined")
    return records


def _drop_unlisted(out: Path, records: Sequence[SlideRecord]) -> None:
    """Remove shards that no record lists: those of a slide that failed half-way, or that left the list since."""
    listed = {shard.name for record in records for shard in record.shards}
    for path in (out / "shards").iterdir():
        if path.name.split(".")[0] not in listed:
            path.unlink()


def _log(out: Path, records: Sequence[SlideRecord]) -> None:
    import socket

    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        for record in records:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": socket.gethostname(),
                "slide_id": record.slide_id,
                "status": record.status,
                "reason": record.reason,
                "patches": record.patches,
                "seconds": round(record.seconds, 3),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _failures(out: Path) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    rows = pq.read_table(out / "slides.parquet", columns=["slide_id", "status", "patches_quarantined", "reason"])
    return [
        {"slide_id": row["slide_id"], "reason": row["reason"]}
        for row in rows.to_pylist()
        if row["status"] == "quarantined" or row["patches_quarantined"]
    ]


def _summary(out: Path, meta: dict[str, Any], failures: list[dict[str, str]], seconds: float) -> dict[str, Any]:
    counts = meta["counts"]
    return {
        "dataset": str(out),
        "digest": meta["digest"],
        "slides": {"done": counts["slides_done"], "quarantined": counts["slides_quarantined"]},
        "patches": {
            "copy": counts["patches_copied"],
            "decode": counts["patches"] - counts["patches_copied"],
            "quarantined": counts["patches_quarantined"],
        },
        "shards": counts["shards"],
        "bytes": counts["bytes"],
        "seconds": round(seconds, 3),
        "failures": failures,
    }


def describe(result: dict[str, Any]) -> str:
    """The result for a person."""
    slides, patches = result["slides"], result["patches"]
    planned = "dry_run" in result
    count = patches["copy"] + patches["decode"]
    lines = [
        f"{'would make ' if planned else ''}{result['dataset']}: {count} patches of {slides['done']} slides "
        f"in {result['shards']} shards, {'about ' if planned else ''}{result['bytes'] / 1e6:.1f} MB"
        + (f", about {result['seconds']:.0f} s" if planned else f" ({result['seconds']:.1f} s)")
    ]
    if planned:
        share = f"copy {patches['copy']}, decode {patches['decode']}"
        lines.append(f"  routes: {share}")
        sources = sorted({f"{s['mpp']:g} um/px ({s['source']})" for s in result["spacing"] if s["mpp"]})
        lines.append(f"  spacing of level 0: {', '.join(sources) or 'unknown'}")
    else:
        lines.append(f"  digest {result['digest']}")
    if result["failures"]:
        lines.append(f"  {slides['quarantined']} slides and {patches['quarantined']} patches were quarantined:")
        lines += [f"    {failure['slide_id']}: {failure['reason']}" for failure in result["failures"][:20]]
        if len(result["failures"]) > 20:
            lines.append(f"    ... and {len(result['failures']) - 20} more (slides.parquet lists all)")
    return "\n".join(lines)
