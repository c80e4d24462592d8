"""`engine shard`: the same bytes whoever works, the dry run, and the saved recipe."""

from __future__ import annotations

import json
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from engine import shard
from engine.cluster import Finished
from engine.config import build, read_recipe
from engine.recipes import ShardRecipe
from sharding.verify import verify_dataset

Made = tuple[Path, dict[str, Any]]
MakeRecipe = Callable[..., ShardRecipe]
KEYS = ("context_px=256", "patches_per_shard=16")
LEFT_OVER = (".tmp-", ".work", ".lock")


def _left_over(dataset: Path) -> list[str]:
    return [str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.name.startswith(LEFT_OVER)]


def _digest(dataset: Path) -> str:
    return str(json.loads((dataset / "dataset.json").read_text())["digest"])


@pytest.mark.parametrize("workers", [2, 4])
def test_more_local_workers_give_the_same_bytes_as_one(
    sharded: Made,
    slides: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    content: Callable[[Path], dict[str, bytes]],
    workers: int,
) -> None:
    result = shard.run(make_recipe(slides, tmp_path / "more", workers=workers), local=True)
    assert result["digest"] == sharded[1]["digest"]
    assert content(tmp_path / "more") == content(sharded[0])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ray_gives_the_same_bytes_as_local_processes(
    sharded: Made, slides: Path, command: Any, content: Callable[[Path], dict[str, bytes]], workers: int
) -> None:
    done = command.run("shard", "shard/tiny", f"slides={slides}", "out=ray", *KEYS, f"workers={workers}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == sharded[1]["digest"]
    assert content(command.folder / "ray") == content(sharded[0])
    assert command.survivors(20) == []


def _in_disorder(seed: int) -> Callable[..., Iterator[Finished[Any, Any]]]:
    """A `fan_out` of one process that takes its jobs at random."""
    rng = random.Random(seed)

    def fan_out(function: Callable[[Any], Any], jobs: deque[Any], **_: Any) -> Iterator[Finished[Any, Any]]:
        while jobs:
            jobs.rotate(rng.randrange(len(jobs)))
            job = jobs.popleft()
            yield Finished(job, function(job))

    return fan_out


@pytest.mark.parametrize("mode", [{"permute": "group", "group_slides": 5}, {"permute": "global"}, {"permute": "slide"}])
def test_the_order_of_jobs_is_in_no_byte_however_patches_are_permuted(
    mode: dict[str, Any],
    many_slides: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    content: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = shard.run(make_recipe(many_slides, tmp_path / "first", workers=2, **mode), local=True)
    groups = {path.name.rpartition("-")[0] for path in (tmp_path / "first" / "shards").iterdir()}
    assert len(groups) == {"group": 3, "global": 1, "slide": 12}[mode["permute"]]
    index = pl.read_parquet(tmp_path / "first" / "index.parquet")
    assert index["sample_id"].n_unique() == len(index) == first["patches"]["copy"] > 200
    for seed in range(2):
        monkeypatch.setattr(shard, "fan_out", _in_disorder(seed))
        result = shard.run(make_recipe(many_slides, tmp_path / str(seed), **mode), local=True)
        assert result["digest"] == first["digest"]
        assert content(tmp_path / str(seed)) == content(tmp_path / "first")


def test_unchecked_tiles_give_the_same_bytes_and_rows_but_for_flags(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, content: Callable[[Path], dict[str, bytes]]
) -> None:
    result = shard.run(make_recipe(slides, tmp_path / "out", check_tiles=False), local=True)
    assert result["patches"] == sharded[1]["patches"]
    one, other = content(sharded[0]), content(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if not name.endswith(".parquet"))
    rows, unchecked = (pl.read_parquet(dataset / "index.parquet") for dataset in (sharded[0], tmp_path / "out"))
    assert rows.drop("flags").equals(unchecked.drop("flags"))
    metas = [json.loads((dataset / "dataset.json").read_text()) for dataset in (sharded[0], tmp_path / "out")]
    assert {key for key in metas[0]["recipe"] if metas[0]["recipe"][key] != metas[1]["recipe"][key]} == {"check_tiles"}
    assert metas[0]["slides"] == metas[1]["slides"]
    assert metas[0]["counts"] == metas[1]["counts"]


def test_the_place_of_slides_and_dataset_is_in_no_byte(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, content: Callable[[Path], dict[str, bytes]]
) -> None:
    moved = shutil.copytree(slides, tmp_path / "elsewhere")
    result = shard.run(make_recipe(moved, tmp_path / "out"), local=True)
    assert result["digest"] == sharded[1]["digest"]
    assert content(tmp_path / "out") == content(sharded[0])
    assert all(str(slides).encode() not in data for data in content(sharded[0]).values())


def test_another_seed_is_another_order_of_the_same_patches(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    shard.run(make_recipe(slides, tmp_path / "out", seed=1), local=True)
    one, other = (pl.read_parquet(d / "index.parquet") for d in (sharded[0], tmp_path / "out"))
    assert one["sample_id"].to_list() != other["sample_id"].to_list()
    assert set(one["sample_id"]) == set(other["sample_id"])


def test_a_fresh_dataset_verifies_and_its_counts_agree(sharded: Made) -> None:
    dataset, result = sharded
    index = pl.read_parquet(dataset / "index.parquet")
    assert verify_dataset(dataset) == {"ok": True, "samples": len(index), "bad": []}
    assert result["patches"] == {"copy": len(index), "decode": 0, "quarantined": 0}
    assert result["slides"] == {"done": 3, "quarantined": 0}
    tars = list((dataset / "shards").glob("*.tar"))
    assert result["shards"] == len(tars) >= 4
    assert result["bytes"] == sum(tar.stat().st_size for tar in tars)
    assert _left_over(dataset) == []


@pytest.mark.parametrize("patches_per_shard", [16, 2])
def test_a_dry_run_writes_nothing_and_counts_what_the_run_makes(
    slides: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    listing: Callable[[Path], dict[str, tuple[int, int]]],
    patches_per_shard: int,
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    (folder / "text.svs").write_text("no slide")
    recipe = make_recipe(folder, tmp_path / "out", patches_per_shard=patches_per_shard)
    before = listing(tmp_path)
    planned = shard.dry_run(recipe)
    assert listing(tmp_path) == before
    made = shard.run(recipe, local=True)
    for key in ("slides", "patches"):
        assert planned[key] == made[key], key
    # Of two patches a shard on average, some have none.
    assert abs(planned["shards"] - made["shards"]) <= (0 if patches_per_shard == 16 else 3)
    assert planned["bytes"] == pytest.approx(made["bytes"], rel=0.15)
    assert [f["slide_id"] for f in planned["failures"]] == [f["slide_id"] for f in made["failures"]] == ["text"]
    assert planned["dry_run"] is True
    assert "dry_run" not in made


def test_the_saved_recipe_given_back_makes_the_same_dataset(dataset: Path, tmp_path: Path) -> None:
    values = read_recipe("shard", str(dataset / "recipe.yaml"))
    values["out"] = str(tmp_path / "again")
    result = shard.run(build(ShardRecipe, values), local=True)
    assert result["digest"] == _digest(dataset)


def test_the_saved_recipe_means_the_same_from_another_folder(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(slides.parent)
    out = tmp_path / "out"
    first = shard.run(make_recipe(Path("slides"), out), local=True)
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((out / "recipe.yaml").read_text())
    values["out"] = str(tmp_path / "again")
    assert shard.run(build(ShardRecipe, values), local=True)["digest"] == first["digest"]
