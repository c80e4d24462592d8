"""What is to be embedded: the source as a whole, its slides, and those that the store has already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import UsageError
from engine.console import say
from engine.data.selection import open_datasets
from engine.extract_recipe import ExtractRecipe
from engine.extraction.sources import SlideTask, sort_rows
from engine.figures import as_count
from engine.shard import slide_jobs, wanted_slides
from engine.stores import finished_slides
from engine.stores.layout import GROUP_FILE, SLIDES, folder_name
from sharding.index import Dataset
from sharding.slide import environment_versions

# Of a slide that is not planned yet, a patch is taken for so many bytes of its file.
_BYTES_PER_PATCH = 16384
# Keys of a dataset's recipe that say nothing of which patches there are.
_ORDER_KEYS = ("permute", "group_slides", "patches_per_shard", "seed")


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be embedded, before anything of it is read. `mpp` None: it differs by slide."""

    dataset: Dataset | None
    patch_px: int
    stride_px: int
    region_patches: int | None
    mpp: float | None
    identity: dict[str, Any]


def open_source(recipe: ExtractRecipe) -> Source:
    """Open the dataset, or take the slides' keys. Raises UsageError where there is no dataset."""
    if recipe.slides is not None:
        options = recipe.shard_recipe().options()
        content = {key: value for key, value in options.as_dict().items() if key in type(recipe.patches).model_fields}
        identity = {"recipe": content, "pixels": "read", "versions": environment_versions()}
        return Source(None, options.context_px, options.stride_px, options.region_patches, options.mpp, identity)
    try:
        (dataset,) = open_datasets([recipe.dataset])
    except ValueError as error:
        raise UsageError(str(error)) from None
    made_by = dataset.meta["recipe"]
    content = {key: value for key, value in made_by.items() if key not in _ORDER_KEYS}
    mpp = made_by["mpp"]
    return Source(
        dataset,
        made_by["context_px"],
        made_by["stride_px"],
        made_by.get("region_patches"),
        None if mpp == "native" else float(mpp),
        {"recipe": content, "pixels": "stored", "versions": dataset.meta["versions"]},
    )


def slide_tasks(
    recipe: ExtractRecipe, source: Source, sorted_rows: Path | None
) -> tuple[list[SlideTask], dict[str, str]]:
    """The slides to be embedded, and why others cannot be: slide_id -> reason. None: the rows are not sorted."""
    if source.dataset is not None:
        return _tasks_of_dataset(source.dataset, sorted_rows), {}
    jobs, unusable = slide_jobs(wanted_slides(recipe.shard_recipe()), recipe.out, recipe.shard_recipe())
    tasks = [
        SlideTask(
            job.slide_id,
            max(1, job.size_bytes // _BYTES_PER_PATCH),
            {"fingerprint": job.fingerprint, "mpp_override": job.mpp_override},
            job=job,
        )
        for job in jobs
    ]
    return tasks, {record.slide_id: record.reason for record in unusable}


def _tasks_of_dataset(dataset: Dataset, sorted_rows: Path | None) -> list[SlideTask]:
    slides = dataset.meta["slides"]
    if bad := sum(slide["status"] == "quarantined" for slide in slides):
        say(f"note: {as_count(bad, 'slide')} of the dataset were quarantined when it was made, and have no patches.")
    places = sort_rows(dataset, sorted_rows) if sorted_rows else {s["slide_id"]: (0, s["patches"]) for s in slides}
    return [
        SlideTask(
            slide["slide_id"],
            slide["patches"],
            {
                "fingerprint": slide["fingerprint"],
                "mpp_override": slide["mpp_override"],
                "dataset_digest": dataset.meta["digest"],
            },
            first=places[slide["slide_id"]][0],
        )
        for slide in slides
        if slide["patches"]
    ]


def divide(out: Path, tasks: Sequence[SlideTask]) -> tuple[set[str], list[SlideTask]]:
    """Return (slides that the store has, tasks that are left). Raises UsageError where it has one of another file."""
    if not (out / SLIDES).is_dir():
        return set(), list(tasks)
    whole = finished_slides(out)
    known = set()
    for task in tasks:
        if task.slide_id not in whole:
            continue
        text = (out / SLIDES / folder_name(task.slide_id) / GROUP_FILE).read_text(encoding="utf-8")
        stored = json.loads(text)["attributes"]
        for key in ("fingerprint", "mpp_override"):
            if stored[key] != task.identity[key]:
                raise UsageError(
                    f"{out} has slide {task.slide_id} with {key}={stored[key]}, and now it is {task.identity[key]}: "
                    "give another out, or remove that slide's folder from the store."
                )
        known.add(task.slide_id)
    return known, [task for task in tasks if task.slide_id not in known]
