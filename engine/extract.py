"""`engine extract`: a dataset or slides to a store of embeddings, on Ray or in local processes.

Slides are the unit: each is written whole, and a rerun does those that are missing. All batches have one shape. With
one core a worker, on the CPU, what is stored is the same to the bit whatever the workers, the jobs, the order of the
dataset and the interruptions; with several cores, or on a GPU, a patch's place in its batch decides the order of some
sums, and it is the same to the rounding of float16.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.cluster import Crash, Finished, cluster_gpus, fan_out, fan_out_to_workers
from engine.config import UsageError, dump
from engine.console import progress, say
from engine.extract_recipe import ExtractRecipe
from engine.extraction.agreement import EncoderSpec, agree
from engine.extraction.encoders import Encoder, batch_size
from engine.extraction.jobs import divided, make_jobs
from engine.extraction.planning import Source, divide, open_source, slide_tasks
from engine.extraction.sources import SlideTask
from engine.extraction.worker import ExtractJob, Extractor, SlideResult, WorkerSpec
from engine.figures import as_count, as_duration, as_size
from engine.runtime import usable_cores
from engine.slide_list import absolute
from engine.stores import StoreDamagedError, begin_store, finish_store, open_store
from engine.stores.layout import sweep_slides
from sharding.atomic import atomic_path, sweep_temporary
from sharding.lock import folder_lock
from sharding.stage import missing_paths
from sharding.work import WORK

_LIBRARIES = ("torch", "timm")
ROWS = "rows.parquet"
_LOG = "log.jsonl"
_BATCHES_PER_JOB = 8
_MOST_CORES = 4
_SHOWN = 20


def run(recipe: ExtractRecipe, *, local: bool = False, address: str | None = None) -> dict[str, Any]:
    """Embed what the store lacks.

    Returns {store, digest, slides: {done, quarantined, skipped}, patches, patches_quarantined, seconds, rows,
    failures: [{slide_id, reason}]}. `patches` were embedded in this run, `rows` are all that the store has; failures
    name quarantined slides, and with `patches_quarantined` the done ones that lack some.

    Raises UsageError where recipe, weights and source do not agree, ValueError where the store was begun otherwise,
    LockedError where another process writes there.
    """
    started = time.monotonic()
    recipe = _with_absolute_places(recipe)
    out = recipe.out
    source = open_source(recipe)
    gpus = _gpus(address)
    spec = _agreed(recipe, source, gpus)
    encoder = Encoder(spec, "cpu")
    identity = _identity(recipe, source, spec, encoder.digests)
    del encoder
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        begin_store(out, identity)
        work = out / WORK
        work.mkdir(exist_ok=True)
        sweep_temporary(work)
        if address is not None:
            _check_visible(out, recipe, address)
        tasks, unusable = slide_tasks(recipe, source, work / ROWS)
        known, todo = divide(out, tasks)
        found = _run_jobs(recipe, spec, todo, gpus=gpus, local=local, address=address)
        failures = {**unusable, **found.failures}
        with atomic_path(out / "recipe.yaml") as temporary:
            temporary.write_text(dump(recipe), encoding="utf-8")
        shutil.rmtree(work)
        sweep_slides(out)
        kept = _other_failures(out, {task.slide_id for task in tasks})
        stored = [*kept, *({"slide_id": key, "reason": reason} for key, reason in failures.items())]
        meta = finish_store(out, failures=stored)
    return {
        "store": str(out),
        "digest": meta["digest"],
        "slides": {"done": found.done, "quarantined": len(failures), "skipped": len(known)},
        "patches": found.patches,
        "patches_quarantined": found.patches_quarantined,
        "rows": meta["counts"]["rows"],
        "seconds": round(time.monotonic() - started, 3),
        "failures": [
            *({"slide_id": key, "reason": reason} for key, reason in sorted({**failures, **found.damaged}.items())),
        ],
    }


def dry_run(recipe: ExtractRecipe, *, address: str | None = None) -> dict[str, Any]:
    """Say what `run` would do, and write nothing. Weights are loaded and compared with the recipe all the same.

    Returns {dry_run, store, slides: {todo, skipped}, patches, estimated, embedding: [shape of one row],
    bytes, failures}. `patches` of slides are a guess by their size (`estimated`).
    """
    recipe = _with_absolute_places(recipe)
    source = open_source(recipe)
    spec = _agreed(recipe, source, _gpus(address))
    shapes = Encoder(spec, "cpu").shapes()
    tasks, unusable = slide_tasks(recipe, source, None)
    known, todo = divide(recipe.out, tasks) if recipe.out.is_dir() else (set(), tasks)
    patches = sum(task.patches for task in todo)
    # A region has patches of one slide alone.
    rows = patches if spec.side is None else sum(-(-task.patches // spec.side**2) for task in todo)
    values = sum(functools.reduce(int.__mul__, shape, 1) for shape in shapes.values())
    return {
        "dry_run": True,
        "store": str(recipe.out),
        "slides": {"todo": len(todo), "skipped": len(known)},
        "patches": patches,
        "estimated": source.dataset is None,
        "embedding": list(shapes["embedding"]),
        "bytes": rows * values * (2 if recipe.dtype == "float16" else 4),
        "failures": [{"slide_id": key, "reason": reason} for key, reason in sorted(unusable.items())],
    }


def _with_absolute_places(recipe: ExtractRecipe) -> ExtractRecipe:
    out = recipe.out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={out} is a file; expected a folder.")
    places: dict[str, Any] = {"out": out}
    if isinstance(recipe.dataset, Path):
        places["dataset"] = recipe.dataset.expanduser().resolve()
    if recipe.slides is not None:
        places["slides"] = absolute(recipe.slides)
    return recipe.model_copy(update=places)


def _gpus(address: str | None) -> int:
    """GPUs to be had: 1 is as good as any number."""
    import torch

    return torch.cuda.device_count() if address is None else cluster_gpus(address)


def _agreed(recipe: ExtractRecipe, source: Source, gpus: int) -> EncoderSpec:
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and gpus > 0)
    return agree(
        recipe,
        patch_px=source.patch_px,
        mpp=source.mpp,
        stride_px=source.stride_px,
        region_patches=source.region_patches,
        precision="bfloat16" if bf16 else "float32",
    )


def _identity(recipe: ExtractRecipe, source: Source, spec: EncoderSpec, digests: dict[str, str]) -> dict[str, Any]:
    """What all slides of a store have in common; a slide's own attributes name its dataset and its file."""
    from importlib.metadata import version

    return {
        "encoder": spec.identity(),
        "weights": digests,
        "patches": source.identity,
        "dtype": recipe.dtype,
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _check_visible(out: Path, recipe: ExtractRecipe, address: str) -> None:
    """Have the cluster's first task look for the output, the source and the weights."""
    places = (recipe.dataset if isinstance(recipe.dataset, Path) else None, recipe.weights, recipe.region_weights)
    wanted = [str(out / WORK), *(str(Path(place).absolute()) for place in places if place and Path(place).exists())]
    for done in fan_out(missing_paths, [wanted], workers=1, address=address):
        if not isinstance(done.result, Crash) and done.result:
            raise UsageError(
                f"{done.result[0]} is not visible on the cluster at {address}: source, weights and out have to lie on "
                "a file system that every node sees under the same path."
            )


@dataclass(slots=True)
class _Found:
    """What came of a run's slides; `failures` and `damaged` (done, but for some patches) are slide_id -> reason."""

    done: int = 0
    patches: int = 0
    patches_quarantined: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    def take(self, result: SlideResult) -> None:
        if result.status == "quarantined":
            self.failures[result.slide_id] = result.reason
            say(f"quarantined: {result.slide_id}: {result.reason}")
            return
        self.done += 1
        self.patches += result.patches
        self.patches_quarantined += result.patches_quarantined
        if result.patches_quarantined:
            self.damaged[result.slide_id] = result.reason
            say(
                f"damaged: {result.slide_id}: {as_count(result.patches_quarantined, 'patch')} left out: {result.reason}"
            )


def _run_jobs(
    recipe: ExtractRecipe,
    spec: EncoderSpec,
    tasks: Sequence[SlideTask],
    *,
    gpus: int,
    local: bool,
    address: str | None,
) -> _Found:
    cores = _cores_per_worker(recipe, gpus)
    worker = WorkerSpec(recipe.out, spec, recipe.dataset, recipe.out / WORK / ROWS, cores, gpus > 0)
    found = _Found()
    started = time.monotonic()
    jobs = deque(make_jobs(tasks, _BATCHES_PER_JOB * batch_size(spec, gpu=gpus > 0)))
    workers = recipe.workers if recipe.workers != "auto" else (gpus if local and gpus else None)
    with progress("extract", len(tasks), "slides") as advance, open(recipe.out / _LOG, "a", encoding="utf-8") as log:
        for done in fan_out_to_workers(
            functools.partial(Extractor, worker),
            jobs,
            workers=workers,
            cores=cores,
            gpus=min(gpus, 1),
            local=local,
            address=address,
        ):
            for result in _results(done, jobs):
                found.take(result)
                _log_line(log, result)
                rate = found.patches / (time.monotonic() - started)
                note = f"{as_count(found.patches, 'patch')}, {rate:.0f} patches/s"
                advance(1, f"{note}, {as_count(len(found.failures), 'slide')} quarantined" if found.failures else note)
    return found


def _results(done: Finished[ExtractJob, list[SlideResult]], jobs: deque[ExtractJob]) -> list[SlideResult]:
    """What came of a job. One of several slides whose workers died is done again, slide by slide."""
    if not isinstance(done.result, Crash):
        return done.result
    if len(done.job.slides) > 1:
        jobs.extendleft(divided(done.job))
        return []
    return [SlideResult(done.job.slides[0].slide_id, "quarantined", done.result.reason)]


def _cores_per_worker(recipe: ExtractRecipe, gpus: int) -> int:
    if recipe.cores_per_worker != "auto":
        return recipe.cores_per_worker
    return max(1, usable_cores() // gpus) if gpus else min(_MOST_CORES, usable_cores())


def _log_line(log: IO[str], result: SlideResult) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(result)}
    log.write(json.dumps(line, ensure_ascii=False) + "\n")
    log.flush()


def _other_failures(out: Path, here: set[str]) -> list[dict[str, str]]:
    """Failures that the store knows of slides which are not in this run's source."""
    try:
        return [failure for failure in open_store(out).failures if failure["slide_id"] not in here]
    except (ValueError, StoreDamagedError):
        return []


def describe(result: dict[str, Any]) -> str:
    """The result for a person."""
    slides = result["slides"]
    if "dry_run" in result:
        about = "about " if result["estimated"] else ""
        lines = [
            f"would add to {result['store']}: {as_count(slides['todo'], 'slide')}, {about}"
            f"{as_count(result['patches'], 'patch')}, {about}{as_size(result['bytes'])} before compression"
        ]
        lines += [f"  {as_count(slides['skipped'], 'slide')} are there already"] if slides["skipped"] else []
    else:
        lines = [
            f"{result['store']}: {as_count(slides['done'], 'slide')} embedded, {slides['skipped']} were there already; "
            f"{as_count(result['patches'], 'patch')} in {as_duration(result['seconds'])}",
            f"  digest {result['digest']}",
        ]
    if result["failures"]:
        lines.append(f"  {as_count(len(result['failures']), 'slide')} quarantined, or lacking damaged patches:")
        lines += [f"    {failure['slide_id']}: {failure['reason']}" for failure in result["failures"][:_SHOWN]]
        if len(result["failures"]) > _SHOWN:
            lines.append(f"    ... and {len(result['failures']) - _SHOWN} more (--json lists all)")
    return "\n".join(lines)
