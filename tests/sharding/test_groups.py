"""Which slides are shuffled together, and what that does to their patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sharding import gather
from sharding.gather import GatherResult
from sharding.groups import Group, GroupRecord, after_gathering, finish_group, make_groups, read_group
from sharding.hashing import order_keys
from sharding.index import read_meta
from sharding.plan import ShardOptions
from sharding.stage import SlideJob, SlideRecord
from sharding.verify import verify_dataset

FIVE = ("plain", "rgb", "fine", "odd", "single")
MODES: dict[str, dict[str, Any]] = {
    "group": {"permute": "group", "group_slides": 2},
    "global": {"permute": "global"},
    "slide": {"permute": "slide"},
}


@pytest.fixture(scope="module")
def datasets(slides: Any, make_dataset: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same five slides, permuted in every way."""
    found = {}
    for mode, options in MODES.items():
        found[mode] = tmp_path_factory.mktemp(mode) / "dataset"
        make_dataset(found[mode], {name: slides[name] for name in FIVE}, **options)
    return found


def test_every_way_stores_the_same_patches_once(datasets: dict[str, Path]) -> None:
    tables = {mode: pq.read_table(path / "index.parquet") for mode, path in datasets.items()}
    ids = {mode: table["sample_id"].to_pylist() for mode, table in tables.items()}
    assert len(ids["slide"]) == len(set(ids["slide"])) > 50
    assert sorted(ids["group"]) == sorted(ids["global"]) == sorted(ids["slide"])
    assert ids["group"] != ids["global"] != ids["slide"] != ids["group"]
    columns = ["sample_id", "slide_id", "x0", "y0", "tissue_fraction", "flags", "route", "length", "crc32"]
    rows = [table.select(columns).sort_by("sample_id") for table in tables.values()]
    assert rows[0].equals(rows[1])
    assert rows[0].equals(rows[2])


@pytest.mark.parametrize(("mode", "groups"), [("group", 3), ("global", 1), ("slide", 5)])
def test_slides_share_shards_with_their_group_alone(mode: str, groups: int, datasets: dict[str, Path]) -> None:
    assert verify_dataset(datasets[mode])["ok"]
    table = pq.read_table(datasets[mode] / "index.parquet", columns=["shard", "slide_id", "sample_id"])
    together: dict[str, set[str]] = {}
    for row in table.to_pylist():
        together.setdefault(row["shard"].rpartition("-")[0], set()).add(row["slide_id"])
    assert len(together) == groups
    assert sorted(slide for members in together.values() for slide in members) == sorted(FIVE)
    assert max(len(members) for members in together.values()) <= {"group": 2, "global": 5, "slide": 1}[mode]
    # Within a group patches stand in the order of their keys, through all of its shards.
    for name in together:
        of_group = [row["sample_id"] for row in table.to_pylist() if row["shard"].startswith(name)]
        keys = order_keys(np.array(of_group, np.uint64), 0)
        assert (keys[1:] > keys[:-1]).all()


def test_patches_of_a_group_are_mixed(datasets: dict[str, Path]) -> None:
    table = pq.read_table(datasets["global"] / "index.parquet")
    shards = {shard["name"] for shard in read_meta(datasets["global"])["shards"]}
    for shard in shards:
        of_shard = [row["slide_id"] for row in table.to_pylist() if row["shard"] == shard]
        assert len(set(of_shard)) >= 3, shard


def jobs_named(names: str, make_options: Callable[..., ShardOptions], **options: Any) -> list[SlideJob]:
    return [SlideJob(name, f"/{name}", f"1-{name}", None, "/d", make_options(**options)) for name in names]


def test_groups_are_of_about_equal_size_and_hold_each_slide_once(make_options: Callable[..., ShardOptions]) -> None:
    jobs = jobs_named("abcdefghijk", make_options, permute="group", group_slides=4)
    groups = make_groups(jobs, jobs[0].options)
    assert sorted(len(group.jobs) for group in groups) == [3, 4, 4]
    assert sorted(job.slide_id for group in groups for job in group.jobs) == list("abcdefghijk")
    assert make_groups([], jobs[0].options) == []
    assert len(make_groups(jobs[:4], jobs[0].options)) == 1


def test_groups_do_not_depend_on_the_order_of_the_list_and_change_with_the_seed(
    make_options: Callable[..., ShardOptions],
) -> None:
    jobs = jobs_named("abcdefgh", make_options, permute="group", group_slides=2)
    groups = make_groups(jobs, jobs[0].options)
    assert make_groups(jobs[::-1], jobs[0].options) == groups
    other = make_groups(jobs, replace(jobs[0].options, seed=1))
    assert {group.name for group in other} != {group.name for group in groups}


def test_a_groups_name_says_nothing_of_its_slides(make_options: Callable[..., ShardOptions]) -> None:
    jobs = jobs_named("ab", make_options, permute="global")
    (group,) = make_groups(jobs, jobs[0].options)
    assert len(group.name) == 16
    assert int(group.name, 16) >= 0
    (one,) = make_groups(jobs[:1], jobs[0].options)
    assert one.name == jobs[0].name != group.name
    moved = [replace(job, path="/elsewhere", dataset="/other") for job in jobs]
    assert make_groups(moved, jobs[0].options)[0].name == group.name


def done(job: SlideJob, patches: int, damaged: int = 0, reason: str = "") -> SlideRecord:
    return SlideRecord(
        job.slide_id,
        job.path,
        job.fingerprint,
        "done",
        reason=reason,
        planned=patches + damaged,
        patches=patches,
        patches_copied=patches,
        patches_quarantined=damaged,
    )


def test_rejected_patches_are_taken_from_their_slides_record(make_options: Callable[..., ShardOptions]) -> None:
    one, two, three = jobs_named("abc", make_options, max_bad_fraction=0.2)
    records = {
        one.name: done(one, 10),
        two.name: done(two, 8, 1, "1 of 9 patches are damaged (first: tile (3, 4) is empty (0 bytes))"),
        three.name: done(three, 9),
    }
    results = [
        GatherResult("p", None, {one.name: [1, "tile (1, 2) is rotten (crc32)", []], two.name: [1, "later", []]}),
        GatherResult("p", None, {one.name: [1, "tile (7, 7) is rotten", []]}),
    ]
    found = after_gathering([one, two, three], records, results)
    assert found[three.name] is records[three.name]
    assert (found[one.name].patches, found[one.name].patches_copied, found[one.name].patches_quarantined) == (8, 8, 2)
    assert found[one.name].reason == "2 of 10 patches are damaged (first: tile (1, 2) is rotten (crc32))"
    assert (found[two.name].status, found[two.name].patches) == ("quarantined", 0)
    assert found[two.name].reason == (
        "2 of 9 patches are damaged (first: tile (3, 4) is empty (0 bytes)): "
        "more than max_bad_fraction=0.2 of the slide"
    )


def test_a_finished_group_is_read_back_and_what_only_its_making_needed_is_gone(
    slides: Any, make_job: Any, shard_slides: Any, tmp_path: Path
) -> None:
    jobs = [make_job(slides[name], tmp_path, slide_id=name, permute="global") for name in ("plain", "unspaced")]
    (group,) = make_groups(jobs, jobs[0].options)
    work = jobs[0].work
    assert read_group(group, work) is None
    records, shards, _ = shard_slides(jobs)
    record = GroupRecord(
        [{job.name: r for job, r in zip(jobs, records, strict=True)}[j.name] for j in group.jobs], shards
    )
    finish_group(group, work, record)
    assert read_group(group, work) == record
    left = {path.name for folder in ("plans", "slides", "groups") for path in (work.path / folder).iterdir()}
    assert left == {f"{group.name}.json", *(f"{job.name}.json" for job in jobs)}
    # Another spacing or digest, or a shard that is not whole: it is done again.
    for change in ({"mpp_override": 0.3}, {"md5": "0" * 32}):
        assert read_group(Group(group.name, tuple(replace(job, **change) for job in group.jobs)), work) is None
    work.shard(shards[0].name, "idx").unlink()
    assert read_group(group, work) is None


def test_a_groups_record_is_plain_json(slides: Any, make_job: Any, shard_slides: Any, tmp_path: Path) -> None:
    job = make_job(slides["single"], tmp_path)
    (group,) = make_groups([job], job.options)
    records, shards, _ = shard_slides([job])
    finish_group(group, job.work, GroupRecord(records, shards))
    value = json.loads(job.work.group(group.name).read_text())
    assert value["shards"] == [asdict(shard) for shard in shards]
    assert value["slides"] == [asdict(record) for record in records]


def test_windows_and_open_files_change_no_byte(
    slides: Any, make_dataset: Any, shard_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {name: slides[name] for name in ("plain", "single", "fine")}
    make_dataset(tmp_path / "a", listed, permute="global", patches_per_shard=1000)
    monkeypatch.setattr(gather, "_WINDOW_PATCHES", 5)
    monkeypatch.setattr(gather, "_OPEN_FILES", 1)
    make_dataset(tmp_path / "b", listed, permute="global", patches_per_shard=1000)
    assert shard_files(tmp_path / "a") == shard_files(tmp_path / "b")
    assert len(json.loads((tmp_path / "b" / "dataset.json").read_text())["shards"]) == 1
