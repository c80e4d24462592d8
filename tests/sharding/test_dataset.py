"""The last step that makes a dataset: its records, its digest, and what may not change it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sharding import dataset as dataset_module
from sharding.dataset import file_sha256, finish_dataset, options_digest
from sharding.index import content_digest, read_meta

MakeDataset = Callable[..., Any]


def test_counts_and_hashes_are_those_of_the_files(finished: Path) -> None:
    meta = read_meta(finished)
    assert meta["format_version"] == 2
    tars = sorted((finished / "shards").glob("*.tar"))
    assert [shard["name"] for shard in meta["shards"]] == [tar.stem for tar in tars]
    assert [shard["bytes"] for shard in meta["shards"]] == [tar.stat().st_size for tar in tars]
    parquets = [tar.with_suffix(".parquet") for tar in tars]
    assert [shard["index_sha256"] for shard in meta["shards"]] == [file_sha256(path) for path in parquets]
    counts = meta["counts"]
    assert counts["bytes"] == sum(tar.stat().st_size for tar in tars)
    assert counts["patches"] == sum(shard["samples"] for shard in meta["shards"])
    assert (counts["slides"], counts["slides_done"], counts["slides_quarantined"]) == (2, 2, 0)
    assert meta["digest"] == content_digest(meta)
    for name, digest in meta["files"].items():
        assert file_sha256(finished / name) == digest
    assert sorted(path.name for path in finished.iterdir()) == sorted([*meta["files"], "dataset.json", "qc", "shards"])


def test_the_digest_and_the_bytes_do_not_depend_on_place_order_or_retries(
    finished: Path, slides: Any, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    moved = tmp_path / "moved" / "other name.svs"
    moved.parent.mkdir()
    shutil.copyfile(slides["plain"], moved)
    again = tmp_path / "elsewhere"
    make_dataset(again, {"second": slides["single"], "first": moved})
    one, other = read_meta(finished), read_meta(again)
    assert one["digest"] == other["digest"]
    for path in finished.rglob("*"):
        # These two hold the slides' paths.
        if path.is_file() and path.name not in ("slides.parquet", "dataset.json"):
            assert path.read_bytes() == (again / path.relative_to(finished)).read_bytes(), path.name
    assert str(moved.parent) not in (again / "dataset.json").read_text()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"quality": 86}, {"min_tissue": 0.4}, {"patches_per_shard": 17}, {"max_bad_fraction": 0.9}]
)
def test_another_recipe_has_another_digest(
    change: dict[str, Any], finished: Path, slides: Any, make_dataset: MakeDataset, make_options: Any, tmp_path: Path
) -> None:
    make_dataset(tmp_path / "d", {"first": slides["plain"], "second": slides["single"]}, **change)
    one, other = read_meta(finished), read_meta(tmp_path / "d")
    assert one["digest"] != other["digest"]
    assert one["recipe_digest"] == options_digest(make_options())
    assert other["recipe_digest"] == options_digest(make_options(**change))


def test_slides_parquet_tells_of_every_slide_with_the_users_columns(
    slides: Any, make_job: Any, shard_slides: Any, damage_tile: Callable[..., Path], tmp_path: Path
) -> None:
    bad = damage_tile(slides["plain"], tmp_path / "bad.svs", 0, 1, 2, "zeroed")
    out = tmp_path / "d"
    jobs = [
        make_job(slides["single"], out, slide_id="c"),
        make_job(slides["unspaced"], out, slide_id="b"),
        make_job(bad, out, slide_id="a"),
    ]
    records, shards, _ = shard_slides(jobs)
    user: dict[str, dict[str, Any]] = {"a": {"organ": "lung", "age": 61}, "c": {"organ": "kidney"}}
    meta = finish_dataset(out, jobs[0].options, records, shards, user)
    rows = pq.read_table(out / "slides.parquet").to_pylist()
    assert [row["slide_id"] for row in rows] == ["a", "b", "c"]
    assert [row["status"] for row in rows] == ["done", "quarantined", "done"]
    assert [(row["organ"], row["age"]) for row in rows] == [("lung", 61), (None, None), ("kidney", None)]
    assert rows[0]["patches_quarantined"] == 4
    assert "damaged" in rows[0]["reason"]
    assert "states no spacing" in rows[1]["reason"]
    assert (rows[2]["width_px0"], rows[2]["height_px0"], rows[2]["mpp"]) == (1000, 900, 0.5)
    assert rows[0]["path"] == str(bad)
    counts = meta["counts"]
    assert (counts["slides_done"], counts["slides_quarantined"], counts["patches_quarantined"]) == (2, 1, 4)
    # Neither the reason nor the path enters the digest, the status does.
    moved = [replace(record, path="/elsewhere", reason="other words", seconds=1.0) for record in records]
    assert finish_dataset(out, jobs[0].options, moved, shards, user)["digest"] == meta["digest"]


def test_dataset_json_appears_last(
    slides: Any, make_job: Any, shard_slides: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(slides["single"], tmp_path)
    records, shards, _ = shard_slides([job])

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("write_index", "write_table", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(dataset_module, step, fail)
            with pytest.raises(OSError, match="No space"):
                finish_dataset(tmp_path, job.options, records, shards, {})
        assert not (tmp_path / "dataset.json").exists()
    finish_dataset(tmp_path, job.options, records, shards, {})
    assert json.loads((tmp_path / "dataset.json").read_text())["counts"]["slides"] == 1
