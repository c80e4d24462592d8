"""The order of patches on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharding import permute
from sharding.hashing import order_keys, shard_numbers, splitmix64
from sharding.index import DatasetDamagedError
from sharding.permute import Member, PermuteJob
from sharding.rows import ROW
from sharding.stage import SlideJob
from sharding.work import WorkFolder

IDS = np.arange(1, 20_001, dtype=np.uint64) * np.uint64(0x1234567)


def test_splitmix64_is_the_published_function() -> None:
    # The first outputs of Vigna's splitmix64.c from state 0: the state grows by the constant that we add first.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], np.uint64)
    assert [int(v) for v in splitmix64(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_are_distinct_depend_on_each_id_alone_and_change_with_the_seed() -> None:
    keys = order_keys(IDS, 7)
    assert len(np.unique(keys)) == len(IDS)
    assert np.array_equal(order_keys(IDS[100:200], 7), keys[100:200])
    other = order_keys(IDS, 8)
    assert not (keys == other).any()
    moved = np.argsort(np.argsort(keys)), np.argsort(np.argsort(other))
    assert abs(np.corrcoef(*moved)[0, 1]) < 0.05


def test_the_order_is_unrelated_to_the_place_in_the_slide() -> None:
    ranks = np.argsort(np.argsort(order_keys(IDS, 0)))
    assert abs(np.corrcoef(ranks, np.arange(len(IDS)))[0, 1]) < 0.05


def test_shard_numbers_are_the_scaled_upper_half_of_the_key() -> None:
    keys = np.concatenate([order_keys(IDS, 3), np.array([0, 2**64 - 1, 2**63], np.uint64)])
    for num_shards in (1, 2, 3, 7, 1000, 2**31):
        expected = [(int(key) >> 32) * num_shards >> 32 for key in keys]
        numbers = shard_numbers(keys, num_shards)
        assert numbers.tolist() == expected
        assert numbers.max() < num_shards


def test_shards_fill_evenly_and_in_the_order_of_the_keys() -> None:
    keys = np.sort(order_keys(IDS, 0))
    numbers = shard_numbers(keys, 10)
    assert np.all(np.diff(numbers) >= 0)
    counts = np.bincount(numbers, minlength=10)
    # Binomial with mean 2000: 6 standard deviations are 255.
    assert np.abs(counts - 2000).max() < 255


@pytest.fixture
def staged(slides: Any, make_job: Callable[..., SlideJob], tmp_path: Path) -> PermuteJob:
    """A group of three staged slides: encoded patches, copies, and again encoded ones."""
    names = ["plain", "single", "fine"]
    jobs = [make_job(slides[name], tmp_path, slide_id=name, context_px=256, stride_px=256) for name in names]
    jobs[0] = make_job(slides["plain"], tmp_path, slide_id="plain", routes="decode")
    return _permute_job(tmp_path, jobs)


def _permute_job(dataset: Path, jobs: Sequence[SlideJob]) -> PermuteJob:
    members = tuple(Member(job.name, job.path, job.run().patches) for job in jobs)
    return PermuteJob(str(dataset), "group", members, seed=3, patches_per_shard=8)


def _sorted_rows(job: PermuteJob) -> np.ndarray:
    return np.fromfile(WorkFolder(Path(job.dataset)).permutation(job.group), ROW)


def test_a_groups_rows_are_those_of_its_slides_in_the_order_of_their_keys(staged: PermuteJob) -> None:
    work = WorkFolder(Path(staged.dataset))
    permutation = staged.run()
    rows = _sorted_rows(staged)
    own = np.concatenate([np.load(work.rows(member.name)) for member in staged.members])
    assert len(rows) == len(own) == sum(permutation.counts) > 20
    keys = order_keys(rows["sample_id"], 3)
    assert (keys[1:] > keys[:-1]).all()
    assert permutation.counts == np.bincount(shard_numbers(keys, -(-len(rows) // 8))).tolist()
    own = own[np.argsort(order_keys(own["sample_id"], 3))]
    for name in set(ROW.names or ()) - {"source"}:
        assert np.array_equal(rows[name], own[name]), name


def test_sources_count_through_the_group(staged: PermuteJob) -> None:
    staged.run()
    work = WorkFolder(Path(staged.dataset))
    sources = [json.loads(line) for line in work.group_sources("group").read_text().splitlines()]
    assert [(source["slide_id"], source["route"]) for source in sources] == [
        ("plain", "decode"),
        ("single", "copy"),
        ("fine", "decode"),
    ]
    one, two, three = staged.members
    assert [s["path"] for s in sources] == [str(work.payloads(one.name)), two.path, str(work.payloads(three.name))]
    counts = np.bincount(_sorted_rows(staged)["source"]).tolist()
    assert counts == [one.patches, two.patches, three.patches]


def test_the_size_of_the_buckets_changes_nothing(staged: PermuteJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows = staged.run(), _sorted_rows(staged).tobytes()
    for size in (1, 7, 40):
        monkeypatch.setattr(permute, "_BUCKET_ROWS", size)
        assert staged.run() == whole
        assert _sorted_rows(staged).tobytes() == rows
    assert sorted(path.suffix for path in (Path(staged.dataset) / ".work" / "groups").iterdir()) == [".jsonl", ".rows"]


def test_the_digest_is_of_rows_and_sources_and_of_no_path(staged: PermuteJob, tmp_path: Path) -> None:
    digest = staged.run().digest
    work = WorkFolder(Path(staged.dataset))
    one, *others = staged.members
    assert replace(staged, members=(replace(one, path="/elsewhere"), *others)).run().digest == digest
    assert replace(staged, seed=4).run().digest != digest
    rows = np.load(work.rows(one.name))
    rows["crc32"][0] ^= 1
    np.save(work.rows(one.name), rows)
    assert staged.run().digest != digest
    assert replace(staged, members=()).run().counts == []


def test_one_id_twice_is_refused(slides: Any, make_job: Callable[..., SlideJob], tmp_path: Path) -> None:
    job = _permute_job(tmp_path, [make_job(slides["plain"], tmp_path, slide_id=name) for name in ("a", "b")])
    with pytest.raises(DatasetDamagedError, match="two patches of group group have one id"):
        job.run()
    assert not WorkFolder(tmp_path).permutation("group").exists()


def test_rows_that_are_not_those_of_the_record_are_refused(staged: PermuteJob) -> None:
    one, *others = staged.members
    with pytest.raises(DatasetDamagedError, match=f"has {one.patches} rows, its record {one.patches + 1}"):
        replace(staged, members=(replace(one, patches=one.patches + 1), *others)).run()
