"""Things a stranger tried: each of these once ended a run, or went unsaid."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from torch import nn

from engine import shard
from engine.checkpoint import save_checkpoint
from engine.config import UsageError, apply_overrides, build
from engine.recipes import ShardRecipe
from engine.rundir import prepare_run
from engine.slide_list import list_slides
from engine.train_recipe import build_train_recipe
from sharding import stage
from sharding.slide import dicom_series


def test_an_error_that_no_reader_thought_of_is_that_slides_alone(
    slides: Path, tmp_path: Path, make_recipe: Callable[..., ShardRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.plan_slide

    def plan(slide: Any, *args: Any, **options: Any) -> Any:
        if slide.path.stem == "synth-0001":
            raise ZeroDivisionError("a surprise")
        return whole(slide, *args, **options)

    monkeypatch.setattr(stage, "plan_slide", plan)
    monkeypatch.setattr(shard, "fan_out", _in_process)
    result = shard.run(make_recipe(slides, tmp_path / "out"), local=True)
    assert result["slides"] == {"done": 2, "quarantined": 1}
    (failure,) = result["failures"]
    assert failure["slide_id"] == "synth-0001"
    # Its message may quote the slide's metadata.
    assert failure["reason"].startswith("unexpected ZeroDivisionError at test_review.py:")
    (line,) = [
        json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines() if "Error" in line
    ]
    assert "raise ZeroDivisionError" in line["traceback"]


def _in_process(function: Any, jobs: Any, **_: Any) -> Any:
    from engine.cluster import Finished

    while jobs:
        job = jobs.popleft()
        yield Finished(job, function(job))


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "deep"
    real.mkdir(parents=True)
    (real / "a.svs").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (real / "round").symlink_to(tmp_path / "elsewhere")  # a circle
    (folder / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    assert [slide.slide_id for slide in list_slides(str(folder))] == ["a", "gone"]


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-0.5"])
def test_a_spacing_that_is_none_is_refused_in_a_list(value: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,mpp\na.svs,{value}\n")
    with pytest.raises(UsageError, match="line 2: mpp="):
        list_slides(str(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [("quality=true", "quality=True"), ("slides=", "empty"), ("out=", "empty"), ("seed=on", "seed=True")],
)
def test_values_that_slip_through_pythons_types_are_refused(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(ShardRecipe, apply_overrides({}, ["slides=s", "out=o", setting]))


@pytest.mark.parametrize(("setting", "said"), [("optim.betas=[0.9, 1.5]", "betas"), ("mask_ratio=0.99", "none of 49")])
def test_what_training_would_refuse_late_is_refused_with_the_recipe(setting: str, said: str) -> None:
    values = {"model": {"name": "vittm_hmr", "process_patch": 32, "dim": 32, "heads": 2}, "crop_px": 224}
    with pytest.raises(UsageError, match=said):
        build_train_recipe(apply_overrides(values, ["dataset=d", "run=r", "steps=4", setting]))


def test_a_run_that_ended_before_its_first_step_can_begin_anew(tmp_path: Path) -> None:
    values = {"model": {"name": "vittm_hmr", "process_patch": 32, "dim": 32, "heads": 2}, "steps": 4}
    (tmp_path / "run").mkdir()
    for ratio in (0.5, 0.75):
        settings = ["dataset=d", f"run={tmp_path / 'run'}", f"mask_ratio={ratio}"]
        recipe = build_train_recipe(apply_overrides(values, settings))
        prepare_run(recipe, resume=False)
    (recipe.run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.0}) + "\n")
    with pytest.raises(UsageError, match="--resume"):
        prepare_run(recipe, resume=False)
    save_checkpoint(recipe.run, 20, nn.Linear(1, 1), {})
    with pytest.raises(UsageError, match="at step 20 already"):
        prepare_run(recipe, resume=True)


def test_a_dry_run_refuses_what_the_run_would_refuse(
    slides: Path, tmp_path: Path, dataset: Path, make_recipe: Callable[..., ShardRecipe]
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        shard.dry_run(make_recipe(slides, tmp_path / "file"))
    with pytest.raises(UsageError, match="another recipe"):
        shard.dry_run(make_recipe(slides, dataset, quality=17))


def test_work_begun_with_other_library_versions_is_not_continued(
    slides: Path, tmp_path: Path, make_recipe: Callable[..., ShardRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(shard, "finish_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.run(make_recipe(slides, tmp_path / "out"), local=True)
    monkeypatch.undo()
    monkeypatch.setattr(shard, "environment_versions", lambda: {"simplejpeg": "0.0"})
    with pytest.raises(UsageError, match=r"other library versions \(.*simplejpeg="):
        shard.run(make_recipe(slides, tmp_path / "out"), local=True)


def test_tiles_that_a_writer_left_out_are_background(tmp_path: Path, make_recipe: Callable[..., ShardRecipe]) -> None:
    """A sparse TIFF: the upper half of the tiles has neither place nor bytes."""
    pixels = np.full((1024, 1024, 3), 240, np.uint8)
    pixels[512:] = (200, 120, 170)
    path = tmp_path / "sparse.tif"
    options: dict[str, Any] = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb"}
    tifffile.imwrite(path, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
    with tifffile.TiffFile(path) as tiff:
        tags = [tiff.pages[0].tags[name] for name in ("TileOffsets", "TileByteCounts")]
        places = [(tag.valueoffset, {3: 2, 4: 4, 16: 8}[int(tag.dtype)]) for tag in tags]
    with open(path, "r+b") as file:
        for at, width in places:
            file.seek(at)
            file.write(bytes(width * 8))
    for reader in ("auto", "cucim", "openslide"):
        result = shard.run(make_recipe(path, tmp_path / reader, reader=reader), local=True)
        assert result["patches"]["copy"] + result["patches"]["decode"] == 8, reader
        assert result["failures"] == []


def test_the_files_of_a_dicom_slide_are_one_slide(tmp_path: Path, make_recipe: Callable[..., ShardRecipe]) -> None:
    def write(name: str, series: bytes, size: int) -> None:
        tag = b"\x20\x00\x0e\x00UI" + len(series).to_bytes(2, "little") + series
        (tmp_path / "slides" / name).write_bytes(bytes(128) + b"DICM" + tag + os.urandom(size))

    (tmp_path / "slides").mkdir()
    write("a.dcm", b"1.2.3\0", 100)
    write("b.dcm", b"1.2.3\0", 900)
    write("c.dcm", b"1.2.4\0", 100)
    assert dicom_series(tmp_path / "slides" / "a.dcm") == "1.2.3"
    failures = shard.run(make_recipe(tmp_path / "slides", tmp_path / "out"), local=True)["failures"]
    reasons = {failure["slide_id"]: failure["reason"] for failure in failures}
    assert "another file of the DICOM slide b" in reasons["a"]
    assert "no reader opens it" in reasons["b"]
    assert "no reader opens it" in reasons["c"]


def test_a_run_that_compares_no_md5_says_so(
    slides: Path, tmp_path: Path, make_recipe: Callable[..., ShardRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    first = min(slides.glob("*.svs"))
    recipe = make_recipe(first, tmp_path / "out")
    digest = shard.run(recipe, local=True)["digest"]
    (tmp_path / "md5").write_text(f"{'0' * 32}  {first.name}\n")
    later = recipe.model_copy(update={"md5_manifest": tmp_path / "md5"})
    capsys.readouterr()
    assert shard.run(later, local=True)["digest"] == digest
    assert "no MD5 was compared" in capsys.readouterr().err
    shard.dry_run(later.model_copy(update={"out": tmp_path / "other"}))
    assert "compares no MD5" in capsys.readouterr().err


def test_spacings_that_differ_by_a_hair_are_told_as_one() -> None:
    spacing = [{"slide_id": str(i), "mpp": 0.25 + i / 1000, "source": "aperio"} for i in range(-3, 4)]
    spacing += [{"slide_id": "x", "mpp": None, "source": "unknown"}]
    result = {
        "dry_run": True,
        "dataset": "out",
        "slides": {"done": 8, "quarantined": 0},
        "patches": {"copy": 1, "decode": 0, "quarantined": 0},
        "shards": 1,
        "bytes": 2_170_000,
        "seconds": 7300.0,
        "spacing": spacing,
        "failures": [],
    }
    assert shard.describe(result).splitlines() == [
        "would make out: 1 patch of 8 slides in about 1 shard, about 2.17 MB, about 2.03 h",
        "  routes: copy 1, decode 0",
        "  spacing of level 0: 0.25 um/px (aperio): 7 slides, unknown: 1 slide",
    ]
