"""`engine shard`: slides to a dataset, on Ray or in local processes; the same bytes either way.

Three kinds of jobs: each slide is staged, the rows of a group of slides are permuted once all of them are staged, and
each of the group's shards is gathered. A group whose slides are all staged goes before slides of other groups.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.cluster import Crash, fan_out
from engine.config import UsageError, dump
from engine.console import progress, say
from engine.figures import as_count, as_duration, as_size
from engine.manifest import digests_of, read_manifest
from engine.pipeline import Pipeline, run_job
from engine.recipes import ShardRecipe
from engine.slide_list import ListedSlide, absolute, list_slides, subset
from engine.tcga import barcode_columns
from sharding.atomic import atomic_path, sweep_temporary, write_json
from sharding.dataset import RESERVED_COLUMNS, finish_dataset, options_digest
from sharding.estimate import Estimate, EstimateJob, expected_shards, not_planned
from sharding.groups import make_groups
from sharding.index import read_meta
from sharding.lock import LOCK_NAME, LockedError, folder_lock
from sharding.qc import qc_name
from sharding.slide import dicom_series, environment_versions, fingerprint
from sharding.stage import SlideJob, SlideRecord, missing_paths, quarantined
from sharding.work import WORK, WorkFolder
from sharding.writer import ShardRecord

_FINGERPRINT_THREADS = 8
_STALE_S = 3600.0  # a plan is written in much less
_UNREADABLE = "unreadable: "  # in the place of a fingerprint


def run(recipe: ShardRecipe, *, local: bool = False, address: str | None = None) -> dict[str, Any]:
    """Make the dataset, finish an interrupted one, or find it finished and write nothing.

    Returns the shape of DESIGN section 9: {dataset, digest, slides: {done, quarantined}, patches: {copy, decode,
    quarantined}, shards, bytes, seconds}, and `failures`: [{slide_id, reason}].

    Raises UsageError for a recipe that cannot be met, LockedError where another process writes there.
    """
    started = time.monotonic()
    out = recipe.out.expanduser().resolve()
    slides = wanted_slides(recipe)
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
    if recipe.md5_manifest is not None:
        say("note: no MD5 was compared now; slides are checked by md5_manifest when a dataset is made.")
    return _summary(out, meta, _failures(out), time.monotonic() - started)


def wanted_slides(recipe: ShardRecipe) -> list[ListedSlide]:
    """The slides that the recipe asks for, with the columns that their names give."""
    slides = list_slides(recipe.slides)
    if recipe.subset is not None:
        slides = subset(slides, recipe.subset, recipe.seed)
    if recipe.barcodes == "tcga":
        slides, unnamed = barcode_columns(slides)
        if len(unnamed) == len(slides):
            raise UsageError(f"barcodes=tcga: no slide has a TCGA barcode (the first is {unnamed[0]}).")
        if unnamed:
            say(f"note: {len(unnamed)} of {len(slides)} slides have no TCGA barcode (the first is {unnamed[0]}).")
    return slides


def _md5(recipe: ShardRecipe, slides: Sequence[ListedSlide]) -> dict[str, str | None]:
    if recipe.md5_manifest is None:
        return {}
    found = digests_of(slides, read_manifest(recipe.md5_manifest.expanduser()))
    missing = [slide_id for slide_id, digest in found.items() if digest is None]
    if missing:
        say(f"note: {len(missing)} of {len(found)} slides are not in the manifest: not checked (first: {missing[0]}).")
    return found


def _make(
    out: Path, recipe: ShardRecipe, slides: Sequence[ListedSlide], *, local: bool, address: str | None
) -> dict[str, Any]:
    """Do what is left to do; the caller holds the lock. Returns dataset.json's content."""
    # The folder for work comes first: it is what a rerun knows an unfinished dataset by.
    work = WorkFolder(out)
    for folder in work.folders:
        folder.mkdir(exist_ok=True)
        sweep_temporary(folder)
    _claim(out, recipe)
    if address is not None:
        _check_visible(out, slides, address)
    jobs, twins = slide_jobs(slides, out, recipe)
    records, shards = _run_jobs(jobs, work, recipe, local=local, address=address)
    records += twins
    _drop_unlisted(out, records, shards)
    with atomic_path(out / "recipe.yaml") as temporary:
        temporary.write_text(dump(recipe), encoding="utf-8")
    _log(out, records)
    columns = {slide.slide_id: slide.columns for slide in slides}
    meta = finish_dataset(out, recipe.options(), records, shards, columns)
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
    slides = wanted_slides(recipe)
    out = recipe.out.expanduser().resolve()
    _check_place(out)
    if (out / "dataset.json").is_file():
        _finished(out, recipe, slides)
    jobs, twins = slide_jobs(slides, out, recipe)
    if recipe.md5_manifest is not None:
        say("note: a dry run reads no whole slide and compares no MD5.")
    workers = _workers(recipe)
    options = recipe.options()
    estimates = [not_planned(twin.slide_id, twin.reason) for twin in twins]
    by_name: dict[str, Estimate] = {}
    with progress("plan", len(jobs), "slides") as advance:
        estimate_jobs = [EstimateJob(job) for job in jobs]
        for done in fan_out(run_job, estimate_jobs, workers=workers, local=address is None, address=address):
            slide, result = done.job.slide, done.result
            by_name[slide.name] = not_planned(slide.slide_id, result.reason) if isinstance(result, Crash) else result
            advance(1, "")
    estimates += by_name.values()
    estimates.sort(key=lambda estimate: estimate.slide_id)
    shards = 0
    for group in make_groups(jobs, options):
        shards += expected_shards(sum(by_name[job.name].patches for job in group.jobs), options.patches_per_shard)
    bad = [e for e in estimates if e.reason]
    copied = sum(e.patches_copied for e in estimates)
    from engine.runtime import usable_cores

    return {
        "dry_run": True,
        "dataset": str(out),
        "slides": {"done": len(estimates) - len(bad), "quarantined": len(bad)},
        "patches": {"copy": copied, "decode": sum(e.patches for e in estimates) - copied, "quarantined": 0},
        "shards": shards,
        "bytes": sum(e.bytes for e in estimates),
        "seconds": round(sum(e.seconds for e in estimates) / (workers or usable_cores()), 1),
        "plan_seconds": round(time.monotonic() - started, 3),
        "spacing": [{"slide_id": e.slide_id, "mpp": e.mpp, "source": e.mpp_source} for e in estimates if not e.reason],
        "failures": [{"slide_id": e.slide_id, "reason": e.reason} for e in bad],
    }


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


def slide_jobs(
    slides: Sequence[ListedSlide], out: Path, recipe: ShardRecipe
) -> tuple[list[SlideJob], list[SlideRecord]]:
    """One job per slide, and records of unreadable and repeated files."""
    options = recipe.options()
    md5 = _md5(recipe, slides)
    plans = None if recipe.plans is None else recipe.plans.expanduser().resolve()
    if plans is not None:
        plans.mkdir(parents=True, exist_ok=True)
        sweep_temporary(plans, older_than_s=_STALE_S)  # other runs may write there
    jobs, twins = [], []
    seen: dict[str, str] = {}
    listed = [
        SlideJob(
            slide.slide_id,
            str(slide.path),
            mark,
            slide.mpp,
            str(out),
            options,
            md5.get(slide.slide_id),
            None if plans is None else str(plans),
        )
        for slide, mark in zip(slides, _fingerprints(slides), strict=True)
    ]
    # Of the files of a DICOM slide the largest holds level 0; annotations and labels are small.
    for job in sorted(listed, key=lambda job: -job.size_bytes if job.path.lower().endswith(".dcm") else 0):
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
    return jobs, twins


def _run_jobs(
    jobs: Sequence[SlideJob], work: WorkFolder, recipe: ShardRecipe, *, local: bool, address: str | None
) -> tuple[list[SlideRecord], list[ShardRecord]]:
    patches = failed = shards = 0
    with progress("shard", len(jobs), "slides") as advance:

        def note() -> str:
            made = f"{as_count(patches, 'patch')}, {as_count(shards, 'shard')}"
            return f"{made}, {as_count(failed, 'slide')} quarantined" if failed else made

        def on_slide(record: SlideRecord) -> None:
            nonlocal patches, failed
            patches += record.patches
            failed += record.status == "quarantined"
            if record.status == "quarantined":
                say(f"quarantined: {record.slide_id}: {record.reason}")
            elif record.patches == 0:
                say(f"no patch: {record.slide_id}: {record.reason}")
            elif record.patches_quarantined:
                say(f"damaged: {record.slide_id}: {record.reason}")
            advance(1, note())

        def on_shard(_shard: ShardRecord) -> None:
            nonlocal shards
            shards += 1
            advance(0, note())

        options = recipe.options()
        pipeline = Pipeline(make_groups(jobs, options), work, options, on_slide=on_slide, on_shard=on_shard)
        for done in fan_out(run_job, pipeline.queue, workers=_workers(recipe), local=local, address=address):
            pipeline.take(done)
    paths = {job.slide_id: job.path for job in jobs}
    return [replace(record, path=paths[record.slide_id]) for record in pipeline.slides], pipeline.shards


def _drop_unlisted(out: Path, records: Sequence[SlideRecord], shards: Sequence[ShardRecord]) -> None:
    """Remove shards that no group lists, and pictures: those of slides that left the list since an interrupted run."""
    listed = {shard.name for shard in shards}
    for path in (out / "shards").iterdir():
        if path.name.split(".")[0] not in listed:
            path.unlink()
    pictures = {qc_name(record.slide_id) for record in records if record.status == "done"}
    for path in (out / "qc").iterdir():
        if path.name not in pictures:
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
            if record.traceback:
                line["traceback"] = record.traceback
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
    about = "about " if planned else ""
    lines = [
        f"{'would make ' if planned else ''}{result['dataset']}: "
        f"{as_count(patches['copy'] + patches['decode'], 'patch')} of {as_count(slides['done'], 'slide')} "
        f"in {about}{as_count(result['shards'], 'shard')}, {about}{as_size(result['bytes'])}, "
        f"{about}{as_duration(result['seconds'])}"
    ]
    if planned:
        lines.append(f"  routes: copy {patches['copy']}, decode {patches['decode']}")
        lines.append(f"  spacing of level 0: {_spacings(result['spacing'])}")
    else:
        lines.append(f"  digest {result['digest']}")
    if result["failures"]:
        what = f"{as_count(slides['quarantined'], 'slide')} and {as_count(patches['quarantined'], 'patch')}"
        lines.append(f"  {what} {'would be' if planned else 'are'} quarantined:")
        lines += [f"    {failure['slide_id']}: {failure['reason']}" for failure in result["failures"][:20]]
        if len(result["failures"]) > 20:
            where = "--json" if planned else "slides.parquet"
            lines.append(f"    ... and {len(result['failures']) - 20} more ({where} lists all)")
    return "\n".join(lines)


def _spacings(slides: Sequence[dict[str, Any]]) -> str:
    """How many slides have which spacing, by hundredths (scanners say 0.2522, 0.2527 ...), and where it came from."""
    counts = Counter((s["source"], None if s["mpp"] is None else round(s["mpp"], 2)) for s in slides)
    return (
        ", ".join(
            f"{source if mpp is None else f'{mpp:g} um/px ({source})'}: {as_count(count, 'slide')}"
            for (source, mpp), count in counts.most_common()
        )
        or "none"
    )
