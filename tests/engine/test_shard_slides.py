"""Slides of every kind in one run: listed, missing, broken, coarse."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tifffile

from engine import shard
from engine.cluster import Finished
from engine.recipes import ShardRecipe
from sharding.gather import GatherJob, SlideChangedError
from sharding.index import FLAG_PARTIAL_REGION
from sharding.verify import verify_dataset

Made = tuple[Path, dict[str, Any]]
MakeRecipe = Callable[..., ShardRecipe]


def test_a_csv_gives_ids_spacings_and_columns_to_the_dataset(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    source = tmp_path / "list.csv"
    names = [slides / f"synth-000{i}.svs" for i in range(3)]
    source.write_text(
        "slide_id,path,mpp,label,age\n"
        f"as it says,{names[0]},,tumour,61\n"
        f"finer,{names[1]},0.25,normal,\n"
        f"twice,{names[0]},,tumour,7\n"
        f"TCGA-A1.B2.C3,{names[2]},,normal,9\n"
    )
    result = shard.run(make_recipe(source, tmp_path / "out"), local=True)
    table = pl.read_parquet(tmp_path / "out" / "slides.parquet")
    rows = {row["slide_id"]: row for row in table.iter_rows(named=True)}
    assert list(rows) == sorted(rows)
    assert {key: (row["label"], row["age"]) for key, row in rows.items()} == {
        "as it says": ("tumour", 61),
        "finer": ("normal", None),
        "twice": ("tumour", 7),
        "TCGA-A1.B2.C3": ("normal", 9),
    }
    assert (rows["finer"]["mpp"], rows["finer"]["mpp_source"]) == (0.25, "override")
    assert (rows["as it says"]["mpp"], rows["as it says"]["mpp_source"]) == (0.5, "aperio")
    assert rows["twice"]["status"] == "quarantined"
    assert "the same file as slide as it says" in rows["twice"]["reason"]
    assert result["slides"] == {"done": 3, "quarantined": 1}
    assert [failure["slide_id"] for failure in result["failures"]] == ["twice"]
    index = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert set(index["slide_id"]) == {"as it says", "finer", "TCGA-A1.B2.C3"}
    assert index["sample_id"].n_unique() == len(index)
    # At half the spacing a window of 256 px takes 512 px of the slide.
    assert set(index.filter(pl.col("slide_id") == "finer")["read_px"]) == {512}
    names_on_disk = [path.name for path in (tmp_path / "out" / "shards").iterdir()]
    assert not any("TCGA" in name for name in names_on_disk)
    assert b"TCGA" not in b"".join(path.read_bytes() for path in (tmp_path / "out" / "shards").glob("*.tar"))


def test_a_slide_listed_but_missing_is_quarantined_and_the_others_are_done(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    source = tmp_path / "list.csv"
    source.write_text(f"path\n{slides / 'synth-0000.svs'}\n{tmp_path / 'gone.svs'}\n")
    result = shard.run(make_recipe(source, tmp_path / "out"), local=True)
    assert result["slides"] == {"done": 1, "quarantined": 1}
    assert "No such file" in result["failures"][0]["reason"]
    assert shard.run(make_recipe(source, tmp_path / "out"), local=True)["digest"] == result["digest"]


def test_broken_slides_are_quarantined_with_a_reason_each_and_the_others_are_as_without_them(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe, content: Callable[[Path], dict[str, bytes]]
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    whole = (slides / "synth-0000.svs").read_bytes()
    (folder / "text.svs").write_text("this is no slide\n" * 1000)
    (folder / "empty.svs").write_bytes(b"")
    (folder / "short.svs").write_bytes(whole[: len(whole) // 2])
    (folder / "tiny.svs").write_bytes(whole[:9])
    result = shard.run(make_recipe(folder, tmp_path / "out"), local=True)
    assert result["slides"] == {"done": 3, "quarantined": 4}
    reasons = {failure["slide_id"]: failure["reason"] for failure in result["failures"]}
    assert set(reasons) == {"text", "empty", "short", "tiny"}
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert "empty" in reasons["empty"]
    # A group's name, and so that of its shards, is made of all its slides.
    tars = [
        [data for name, data in content(d).items() if name.endswith(".tar")] for d in (tmp_path / "out", sharded[0])
    ]
    assert tars[0] == tars[1]
    assert (tmp_path / "out" / "log.jsonl").read_text().count("quarantined") == 4


def test_a_slide_of_a_coarse_spacing_is_done_or_quarantined_and_ends_no_run(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    source = tmp_path / "list.csv"
    source.write_text(f"path,mpp\n{slides / 'synth-0000.svs'},12\n{slides / 'synth-0001.svs'},0.5\n")
    result = shard.run(make_recipe(source, tmp_path / "out", mpp="native"), local=True)
    assert result["slides"]["done"] + result["slides"]["quarantined"] == 2
    assert "synth-0001" in set(pl.read_parquet(tmp_path / "out" / "index.parquet")["slide_id"])


def test_a_set_of_nothing_but_broken_slides_is_an_empty_dataset_that_verifies(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "text.svs").write_text("no slide")
    result = shard.run(make_recipe(tmp_path / "slides", tmp_path / "out"), local=True)
    assert (result["shards"], result["slides"]) == (0, {"done": 0, "quarantined": 1})
    assert verify_dataset(tmp_path / "out")["ok"]


def _spoil_tile(path: Path, number: int) -> None:
    """Take a tile's SOI: it can be neither decoded nor copied."""
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[number]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\0\0")


def _some_tile(dataset: Path, slide_id: str) -> int:
    """The number of a tile of 2048 px / 256 px in a row that is stored of a slide."""
    row = pl.read_parquet(dataset / "index.parquet").filter(pl.col("slide_id") == slide_id).row(0, named=True)
    return int(row["row"] * 8 + row["col"])


def test_a_slide_of_which_too_much_cannot_be_copied_leaves_its_group(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """Unchecked tiles are found out when they are copied: after the group was permuted, and shards were committed."""
    folder = shutil.copytree(slides, tmp_path / "slides")
    _spoil_tile(folder / "synth-0001.svs", _some_tile(sharded[0], "synth-0001"))
    tolerant = shard.run(make_recipe(folder, tmp_path / "tolerant", check_tiles=False), local=True)
    whole = sharded[1]["patches"]["copy"]
    assert tolerant["patches"] == {"copy": whole - 1, "decode": 0, "quarantined": 1}
    assert [failure["slide_id"] for failure in tolerant["failures"]] == ["synth-0001"]
    assert "cannot be copied: it starts with 0000" in tolerant["failures"][0]["reason"]
    strict = shard.run(make_recipe(folder, tmp_path / "strict", check_tiles=False, max_bad_fraction=0.0), local=True)
    assert strict["slides"] == {"done": 2, "quarantined": 1}
    assert "more than max_bad_fraction=0" in strict["failures"][0]["reason"]
    for name, result in (("tolerant", tolerant), ("strict", strict)):
        assert verify_dataset(tmp_path / name)["ok"]
        index = pl.read_parquet(tmp_path / name / "index.parquet")
        assert len(index) == result["patches"]["copy"]
        assert ("synth-0001" in set(index["slide_id"])) == (name == "tolerant")
        assert (tmp_path / name / "qc" / "synth-0001.jpg").exists() == (name == "tolerant")
        again = make_recipe(
            folder, tmp_path / f"{name}-2", check_tiles=False, workers=2, max_bad_fraction=0.5 * (name == "tolerant")
        )
        assert shard.run(again, local=True)["digest"] == result["digest"]


def test_a_region_that_loses_a_patch_when_it_is_copied_is_flagged_like_any_other(
    sharded: Made, slides: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    _spoil_tile(folder / "synth-0001.svs", _some_tile(sharded[0], "synth-0001"))
    tables = []
    for checked in (True, False):
        out = tmp_path / str(checked)
        keys = {"region_patches": 2, "min_tissue": 0.2, "patch_flags": False, "check_tiles": checked}
        assert shard.run(make_recipe(folder, out, **keys), local=True)["patches"]["quarantined"] == 1
        assert verify_dataset(out)["ok"]
        tables.append(pl.read_parquet(out / "index.parquet"))
    assert tables[0].equals(tables[1])
    assert set(tables[0].filter(pl.col("flags") == FLAG_PARTIAL_REGION)["slide_id"]) == {"synth-0001"}


def test_a_slide_that_is_replaced_under_way_ends_the_run_and_the_next_one_takes_it_as_it_is(
    slides: Path, tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(slides, tmp_path / "slides")
    slide = folder / "synth-0001.svs"

    def fan_out(function: Callable[[Any], Any], jobs: deque[Any], **_: Any) -> Iterator[Finished[Any, Any]]:
        while jobs:
            job = jobs.popleft()
            if isinstance(job, GatherJob):
                slide.write_bytes(slide.read_bytes() + b"x")
            yield Finished(job, function(job))

    recipe = make_recipe(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shard, "fan_out", fan_out)
        with pytest.raises(SlideChangedError, match=r"synth-0001\.svs changed while the run was under way; run again"):
            shard.run(recipe, local=True)
    assert not (tmp_path / "out" / "dataset.json").exists()
    result = shard.run(recipe, local=True)
    assert result["slides"] == {"done": 3, "quarantined": 0}
    assert result["digest"] == shard.run(make_recipe(folder, tmp_path / "fresh"), local=True)["digest"]
    assert verify_dataset(tmp_path / "out")["ok"]
