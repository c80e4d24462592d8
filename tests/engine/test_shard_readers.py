"""What `engine shard` writes is what others read, and the pixels are those of the slide."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import polars as pl
import pytest
import simplejpeg
import torch
import wds2idx  # type: ignore[import-untyped]
import webdataset

from engine import extract, shard
from engine.config import apply_overrides, read_recipe
from engine.extract_recipe import build_extract_recipe
from engine.recipes import ShardRecipe
from models import build_model

Made = tuple[Path, dict[str, Any]]
MakeRecipe = Callable[..., ShardRecipe]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_webdataset_reads_every_sample(sharded: Made) -> None:
    dataset = sharded[0]
    index = pl.read_parquet(dataset / "index.parquet")
    urls = sorted(str(tar) for tar in (dataset / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == index["key"].to_list()
    assert not any("." in sample["__key__"] for sample in samples)
    assert [len(sample["jpg"]) for sample in samples] == index["length"].to_list()
    assert {tuple(simplejpeg.decode_jpeg(sample["jpg"], strict=True).shape) for sample in samples} == {(256, 256, 3)}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_readmes_list_and_examples_work(slides: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^    (path,slide_id,.*|.*,train|.*,test)$", text, re.MULTILINE)
    names = {"a/one.svs": slides / "synth-0000.svs", "b/two.svs": slides / "synth-0001.svs"}
    table = "\n".join(listed)
    for name, path in names.items():
        assert name in table
        table = table.replace(name, str(path))
    (tmp_path / "list.csv").write_text(table.replace("0.2527", "0.5"))
    shard.run(make_recipe(tmp_path / "list.csv", tmp_path / "set"), local=True)
    first, second, third, stored, models = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(first.replace("/data/set", str(tmp_path / "set")), found)
    index = pl.read_parquet(tmp_path / "set" / "index.parquet")
    assert found["key"] == index["key"][-1]
    assert found["image"].shape == (256, 256, 3)
    assert set(found["sharp"]["split"]) == {"train", "test"}
    exec(second.replace("/data/set", str(tmp_path / "set")).replace("64", "8"), found)
    assert found["batch"].images[0].shape == (8, 3, 224, 224)
    exec(third.replace("s3://bucket/sets/one", str(tmp_path / "set")).replace("=256", "=8"), found)
    with found["loader"] as loader:
        assert next(loader).images[0].shape == (8, 3, 224, 224)
    settings = [f"dataset={tmp_path / 'set'}", f"out={tmp_path / 'store'}"]
    extract.run(build_extract_recipe(apply_overrides(read_recipe("extract", "extract/tiny"), settings)), local=True)
    exec(stored.replace("/data/store", str(tmp_path / "store")), found)
    assert len(found["slide"].embedding) == index.filter(pl.col("slide_id") == "one").height
    weights = {"vit256_small_dino.pth": "hipt_patch", "vit4k_xs_dino.pth": "hipt_region"}
    for name, model in weights.items():
        torch.save(build_model(model).state_dict(), tmp_path / name)
        models = models.replace(name, str(tmp_path / name))
    exec(models, found | {"regions": torch.zeros(1, 3, 256, 512)})


def test_tar_and_index_agree_and_hold_no_owner_or_time(sharded: Made) -> None:
    dataset = sharded[0]
    index = pl.read_parquet(dataset / "index.parquet")
    for path in (dataset / "shards").glob("*.tar"):
        rows = index.filter(pl.col("shard") == path.stem)
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [member.name for member in members] == [f"{key}.jpg" for key in rows["key"]]
        assert [member.offset_data for member in members] == rows["offset"].to_list()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_idx_is_what_wds2idx_writes(sharded: Made, tmp_path: Path) -> None:
    for tar in sorted((sharded[0] / "shards").glob("*.tar")):
        theirs = tmp_path / f"{tar.stem}.idx"
        with contextlib.redirect_stdout(io.StringIO()), wds2idx.IndexCreator(str(tar), str(theirs)) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == theirs.read_bytes()


_DALI = """
import json, sys
import numpy as np
from nvidia.dali import fn, pipeline_def, types

paths, count = sys.argv[2:], int(sys.argv[1])

@pipeline_def(batch_size=count, num_threads=1, device_id=None)
def read():
    jpeg = fn.readers.webdataset(
        paths=paths, index_paths=[p[:-4] + ".idx" for p in paths], ext=["jpg"], missing_component_behavior="error"
    )
    return jpeg, fn.decoders.image(jpeg, device="cpu", output_type=types.RGB)

pipeline = read()
pipeline.build()
jpegs, images = pipeline.run()
np.savez(sys.stdout.buffer, images=images.as_array(), **{f"jpeg{i}": np.array(jpegs[i]) for i in range(count)})
"""


def test_dali_reads_every_sample_with_our_idx(sharded: Made, tmp_path: Path) -> None:
    dataset = sharded[0]
    index = pl.read_parquet(dataset / "index.parquet")
    tars = [str(tar) for tar in sorted((dataset / "shards").glob("*.tar"))]
    (tmp_path / "read.py").write_text(_DALI)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "read.py"), str(len(index)), *tars], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    arrays = np.load(io.BytesIO(done.stdout))
    for i, row in enumerate(index.iter_rows(named=True)):
        with open(dataset / "shards" / f"{row['shard']}.tar", "rb") as file:
            payload = os.pread(file.fileno(), row["length"], row["offset"])
        assert arrays[f"jpeg{i}"].tobytes() == payload
        assert np.array_equal(arrays["images"][i], simplejpeg.decode_jpeg(payload)), row


def test_patches_of_a_real_slide_are_openslides_pixels_at_the_indexed_place(
    real_slide: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    dataset = tmp_path / "real"
    result = shard.run(make_recipe(real_slide, dataset, mpp="native"), local=True)
    assert result["slides"] == {"done": 1, "quarantined": 0}
    index = pl.read_parquet(dataset / "index.parquet")
    assert len(index) >= 20
    errors, ratios = [], []
    with openslide.OpenSlide(str(real_slide)) as slide:
        for row in index.iter_rows(named=True):
            with open(dataset / "shards" / f"{row['shard']}.tar", "rb") as file:
                stored = simplejpeg.decode_jpeg(os.pread(file.fileno(), row["length"], row["offset"]))
            place, side = (row["x0"], row["y0"]), row["read_px"]
            truth = np.asarray(slide.read_region(place, 0, (side, side)))[:, :, :3]
            difference = stored.astype(np.float64) - truth
            errors.append(float(np.abs(difference).mean()))
            ratios.append(10 * np.log10(255**2 / float(np.square(difference).mean())))
    # JPEG of quality 85 without subsampling on top of the slide's own; a shift of one pixel gives 15 dB less.
    assert max(errors) < MAX_MEAN_ERROR
    assert min(ratios) > MIN_PSNR_DB
    assert index["mpp"].to_list() == pytest.approx([0.499] * len(index))
    print(f"largest mean difference {max(errors):.2f} grey levels, smallest PSNR {min(ratios):.1f} dB")


MAX_MEAN_ERROR = 4.0
MIN_PSNR_DB = 33.0
