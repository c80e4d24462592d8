"""What `engine train` trains on: several datasets as one, a filter, balance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine import shard, synth
from engine.config import dump
from engine.recipes import ShardRecipe, TrainRecipe

ENGINE = str(Path(sys.executable).parent / "engine")


def _recipe(dataset: Any) -> TrainRecipe:
    return TrainRecipe(dataset=dataset, run=Path("r"), model={"name": "vittm_hmr"}, steps=1)


def test_a_comma_divides_datasets_unless_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _recipe("a").datasets == (Path("a"),)
    assert _recipe("a,b, c").datasets == _recipe(["a", "b", "c"]).datasets == (Path("a"), Path("b"), Path("c"))
    assert _recipe("a").model_dump(mode="json")["dataset"] == "a"  # as recipes of earlier runs have it
    (tmp_path / "a,b").mkdir()
    assert _recipe("a,b").datasets == (Path("a,b"),)
    with pytest.raises(ValueError, match="empty"):
        _recipe("a,")


def test_a_url_stays_what_it_is(tmp_path: Path) -> None:
    assert _recipe("s3://b/p/d").datasets == ("s3://b/p/d",)
    mixed = _recipe("s3://b/p/d, a,gs://c//d")
    assert mixed.datasets == ("s3://b/p/d", Path("a"), "gs://c//d")
    (tmp_path / "recipe.yaml").write_text(dump(mixed))
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert saved["dataset"] == ["s3://b/p/d", "a", "gs://c//d"]
    assert TrainRecipe.model_validate(saved) == mixed


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rows")
    for name, seed in (("a", 1), ("b", 2)):
        synth.run(folder / name, slides=1, size=1024, workers=1, seed=seed)
        recipe = ShardRecipe(slides=str(folder / name), out=folder / f"set-{name}", workers=1)
        shard.run(recipe, local=True)
    return [folder / "set-a", folder / "set-b"]


def _train(datasets: list[Path], run: Path, *settings: str, code: int = 0) -> Any:
    joined = ",".join(map(str, datasets))
    command = [ENGINE, "train", "train/vittm_hmr_tiny", f"dataset={joined}", f"run={run}", "--json", *settings]
    command += ["batch_size=4", "model.dim=32", "model.depth=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr if code else json.loads(done.stdout)


def test_a_run_on_two_datasets_with_filter_and_balance_resumes_as_it_was(datasets: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ("where=tissue_fraction >= 0.1 AND status = 'done'", "balance=slide_id")
    assert _train(datasets, run, *asked, "steps=1")["samples_seen"] == 4
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert saved["dataset"] == [str(path) for path in datasets]
    assert _train(datasets, run, *asked, "steps=2", "--resume")["start_step"] == 1
    assert "where" in _train(datasets, run, "where=TRUE", asked[1], "steps=2", "--resume", code=2)
    assert "dataset" in _train(datasets[::-1], run, *asked, "steps=2", "--resume", code=2)


def test_rows_that_cannot_be_are_refused_before_the_run_starts(datasets: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "did you mean 'tissue_fraction'" in _train(datasets, run, "where=tissue_fracton > 0", code=2)
    assert "selects none" in _train(datasets, run, "where=FALSE", code=2)
    assert "no column 'klass'" in _train(datasets, run, "balance=klass", code=2)
    assert "same samples" in _train([datasets[0]] * 2, run, code=2)
    assert not run.exists()
