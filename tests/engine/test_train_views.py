"""What `engine train` asks of the loader: views, weights, locality, and what becomes of bad samples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine import shard, synth
from engine.config import UsageError, apply_overrides, read_recipe
from engine.data import Augment, Blocks, Ect, SampleStream, dino_views
from engine.recipes import ShardRecipe, TrainRecipe
from engine.train_recipe import build_train_recipe
from engine.view_recipes import AugmentRecipe, EctRecipe, LocalityRecipe

ENGINE = str(Path(sys.executable).parent / "engine")


def _recipe(*settings: str) -> TrainRecipe:
    asked = ["dataset=d", "run=r", *settings]
    return build_train_recipe(apply_overrides(read_recipe("train", "train/vittm_hmr_tiny"), asked))


@pytest.mark.parametrize(("recipe", "made"), [(EctRecipe, Ect), (AugmentRecipe, Augment), (LocalityRecipe, Blocks)])
def test_a_section_has_the_fields_and_defaults_of_what_it_makes(recipe: Any, made: Any) -> None:
    assert recipe().made() == made()
    assert recipe.model_fields.keys() == made.__dataclass_fields__.keys()
    assert all(field.description for field in recipe.model_fields.values())


def test_settings_become_views() -> None:
    (plain,) = _recipe().crop_views()
    assert (plain.size_px, plain.flips, plain.ect, plain.augment) == (224, True, None, None)
    assert _recipe("ect=true").crop_views()[0].ect == Ect()
    assert _recipe("ect=false").crop_views() == [plain]
    (view,) = _recipe(
        "rotations=true",
        "flips=false",
        "ect.scale=[0.8, 1.0]",
        "ect.scale_is=side",
        "augment.jitter=0.8",
        "mean=[0.5, 0.5, 0.5]",
    ).crop_views()
    assert (view.rotations, view.flips, view.mean) == (True, False, (0.5, 0.5, 0.5))
    assert view.ect == Ect((0.8, 1.0), scale_is="side")
    assert view.augment == Augment(jitter=0.8)
    assert _recipe("locality.block_rows=8").locality == LocalityRecipe(block_rows=8)
    first, second = _recipe("views=twins", "rotations=true").crop_views()
    assert (first.draws_of, second.draws_of) == (None, 0)
    assert first.rotations == second.rotations


def test_dino_has_its_own_views_and_models_of_one_crop_refuse_them() -> None:
    asked = {"dataset": "d", "run": "r", "model": {}, "steps": 1, "views": "dino"}
    assert TrainRecipe(**asked).crop_views() == dino_views()
    virchow = TrainRecipe(**asked, ect=True, dino={"small_px": 98, "solarise": 0})
    assert virchow.crop_views() == dino_views(224, 98, ect=Ect(), solarise=0.0)
    with pytest.raises(UsageError, match="views=dino with objective=masked"):
        _recipe("views=dino")


@pytest.mark.parametrize("name", ["hipt_patch_dino", "hipt_patch_dino_lymphoma"])
def test_recipes_of_hipt_crop_as_it_was_published(name: str) -> None:
    values = apply_overrides(read_recipe("train", f"train/{name}"), ["dataset=d", "run=r"])
    windows = [view.ect for view in build_train_recipe(values).crop_views()]
    large, small = (Ect(scale, (3 / 4, 4 / 3), "patch_area") for scale in ((0.4, 1.0), (0.05, 0.4)))
    assert windows == [large] * 2 + [small] * 8


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["ect.scal=[0.9, 1.1]"], r"unknown key 'ect\.scal'; did you mean 'scale'"),
        (["augment.jiter=0.8"], r"unknown key 'augment\.jiter'; did you mean 'jitter'"),
        (["rotation=true"], "unknown key 'rotation'; did you mean 'rotations'"),
        (["view=crop"], "unknown key 'view'; did you mean 'views'"),
        (["locality.blocks=3"], r"unknown key 'locality\.blocks'"),
        (["bad_sample=replace"], "did you mean 'bad_samples'"),
        (["views=dinosaur"], "views=dinosaur: Input should be 'crop', 'twins' or 'dino'"),
        (["ect.scale=[1.1, 0.9]"], r"ect scale is \(1\.1, 0\.9\)"),
        (["ect.scale=3"], r"ect\.scale=3"),
        (["augment.grey=2"], "augment grey is 2.0; it has to be between 0 and 1"),
        (["augment.blur=0.5", "augment.blur_sigma_px=[1, 200]"], "a blur reaches 400 px"),
        (["locality.block_rows=0"], "block_rows"),
        (["crop_px=true"], "expected a number"),
        (["std=[0, 1, 1]"], "std above 0"),
        (["views=dino", "augment.jitter=1"], "views=dino brings its own"),
        (["dino.small_px=98"], r"dino\.\* with views=crop"),
        (["balance_weights={a: 1}"], "balance_weights without balance"),
        (["balance=label", "locality=true"], "exclude each other"),
    ],
)
def test_what_cannot_be_is_named(settings: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        _recipe(*settings)


def test_labels_of_weights_may_be_numbers() -> None:
    assert _recipe("balance=label", "balance_weights={1: 3, 0: 1}").balance_weights == {"1": 3, "0": 1}
    assert _recipe("balance=label", "balance_weights.a=2").balance_weights == {"a": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    synth.run(folder / "slides", slides=2, size=1536, workers=1)
    shard.run(ShardRecipe(slides=str(folder / "slides"), out=folder / "dataset", workers=1), local=True)
    return folder / "dataset"


def _train(dataset: Path, run: Path, *settings: str, code: int = 0, **environment: str) -> Any:
    command = [ENGINE, "train", "train/vittm_hmr_tiny", f"dataset={dataset}", f"run={run}", "--json"]
    command += ["batch_size=4", "model.dim=32", "model.depth=2", "log_every=2", *settings]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code in (1, 2) else (json.loads(done.stdout), done.stderr)


def test_a_view_that_does_not_fit_is_refused_with_the_numbers_before_the_run_starts(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    errors = _train(dataset, run, "crop_px=256", "ect=true", code=2)
    assert "windows of up to 275 x 275 px (ECT of 256 px with scale (0.9, 1.1)" in errors
    assert "patches of 256 x 256 px" in errors
    errors = _train(dataset, run, "balance=slide_id", "balance_weights.nobody=1", code=2)
    assert "'nobody', which no selected row has" in errors
    assert not run.exists()


def test_a_run_with_all_of_it_resumes_from_its_own_recipe(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ["crop_px=192", "ect=true", "rotations=true", "augment.jitter=0.5", "augment.blur=0.5", "views=twins"]
    asked += ["locality.block_rows=4", "locality.window_blocks=2", "model.process_patch=32"]
    assert _train(dataset, run, *asked, "steps=2")[0]["replaced"] == 0
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert saved["ect"]["scale"] == [0.9, 1.1]
    assert saved["augment"]["jitter"] == 0.5
    command = [ENGINE, "train", str(run / "recipe.yaml"), "--resume", "--json", "steps=3", "bad_samples=replace"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["start_step"] == 2
    assert "ect" in _train(dataset, run, *asked, "ect.scale=[0.9, 1.0]", "steps=4", "--resume", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_replaced_samples_are_counted_over_all_ranks_and_restarts(
    dataset: Path, tmp_path: Path, processes: int
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    (tar,) = (copy / "shards").glob("*.tar")
    rows = np.fromfile(copy / "rows.bin", "<u4, <u8, <u4, <u4")
    bad = {1, 2, len(rows) // 2}
    data = bytearray(tar.read_bytes())
    for row in bad:
        data[int(rows[row]["f1"]) + 300] ^= 4
    tar.write_bytes(data)
    order = SampleStream(len(rows), seed=0).rows(0, 12 * 4)
    met = [sum(int(row) in bad for row in order[: 4 * steps]) for steps in (2, 4, 6, 8, 10, 12)]
    assert len(set(met)) > 2, "the bad samples have to come at different times"
    run = tmp_path / "run"
    asked = ["bad_samples=replace", f"processes={processes}"]
    first, errors = _train(copy, run, *asked, "steps=6", code=3 if met[2] else 0)
    assert first["replaced"] == met[2]
    assert errors.count("is delivered instead: bad sample") == met[2]
    whole, errors = _train(copy, run, *asked, "steps=12", "--resume", code=3)
    assert whole["replaced"] == met[-1]
    assert errors.count("is delivered instead: bad sample") == met[-1] - met[2]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["replaced"] for line in lines] == met


def test_under_torchrun_a_rank_that_replaced_samples_has_not_failed(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    (tar,) = (copy / "shards").glob("*.tar")
    rows = np.fromfile(copy / "rows.bin", "<u4, <u8, <u4, <u4")
    first = int(SampleStream(len(rows), seed=0).rows(0, 1)[0])
    data = bytearray(tar.read_bytes())
    data[int(rows[first]["f1"]) + 300] ^= 4
    tar.write_bytes(data)
    ranks: dict[str, Any] = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert _train(copy, tmp_path / "run", "bad_samples=replace", "steps=1", **ranks)[0]["replaced"] == 1
