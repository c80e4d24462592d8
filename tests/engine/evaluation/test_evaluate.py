"""`engine evaluate` from a store and a table to a result: what it says, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from engine.config import UsageError, dump, read_recipe, shipped_recipes
from engine.evaluate import describe, run
from engine.evaluate_recipe import EvaluateRecipe, build_evaluate_recipe
from engine.keys import describe_keys
from engine.stores import open_store

Writer = Callable[..., Path]
NEEDED = {"encoder": {"name": "hipt_patch"}, "weights": "w.pth"}


def _recipe(cohort: tuple[Path, Path], name: str = "tiny", **keys: Any) -> EvaluateRecipe:
    shipped = read_recipe("evaluate", f"evaluate/{name}")
    return build_evaluate_recipe({**shipped, "store": cohort[0], "labels": cohort[1], "resamples": 50, **keys})


@pytest.mark.parametrize("name", shipped_recipes("evaluate"))
def test_shipped_recipes_are_complete_and_come_back(name: str) -> None:
    values = read_recipe("evaluate", name)
    values |= {"pcam": "p", **NEEDED} if "pcam" in name else {"store": "s", "labels": "l.csv"}
    recipe = build_evaluate_recipe(values)
    assert recipe.protocol == {
        "linear": "linear",
        "slide_linear": "slide_linear",
        "tiny": "slide_linear",
        "knn": "knn",
        "slide_knn": "slide_knn",
        "pcam": "pcam_linear",
        "pcam_smoke": "pcam_linear",
    }.get(name.removeprefix("evaluate/"))
    import yaml

    assert build_evaluate_recipe(yaml.safe_load(dump(recipe))) == recipe


@pytest.mark.parametrize("name", ["tiny", "linear", "knn", "slide_linear"])
def test_well_parted_classes_are_found(cohort: tuple[Path, Path], name: str) -> None:
    result = run(_recipe(cohort, name))
    assert result["classes"] == ["a", "b", "c"]
    assert result["n"]["slides"] == 39
    assert result["n"]["groups"] == 20
    assert result["n"]["samples"] == (39 if result["recipe"]["pool"] == "mean" else 174)
    assert (result["n"]["without_label"], result["n"]["without_embedding"]) == (1, 1)
    assert result["missing"] == {"without_label": ["s.07"], "without_embedding": ["ghost"]}
    assert result["interval"]["resampled"] == "patient_id"
    assert result["metrics"]["accuracy"]["value"] > 0.8
    for fold in result["folds"]:
        assert fold["groups"]["train"] + fold["groups"]["val"] + fold["groups"]["test"] == 20
    json.dumps(result, allow_nan=False)
    assert "patient_id" in describe(result)


def test_result_and_predictions_are_written_and_say_the_same(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    out, csv, parquet = tmp_path / "new" / "r.json", tmp_path / "p.csv", tmp_path / "p.parquet"
    result = run(_recipe(cohort, "slide_linear", out=out, predictions=csv))
    assert json.loads(out.read_text()) == result
    table = pl.read_csv(csv)
    columns = ["fold", "slide_id", "patient_id", "group", "label", "predicted", "p_a", "p_b", "p_c"]
    assert table.columns == columns
    assert sorted(table["slide_id"]) == sorted(set(table["slide_id"]))
    assert len(table) == 39
    right = table.group_by("fold").agg((pl.col("label") == pl.col("predicted")).mean())
    assert right["label"].mean() == pytest.approx(result["metrics"]["accuracy"]["value"])
    assert table.select("p_a", "p_b", "p_c").sum_horizontal().to_list() == pytest.approx([1] * 39)
    run(_recipe(cohort, "linear", predictions=parquet))
    rows = pl.read_parquet(parquet)
    truth = dict(pl.read_csv(cohort[1]).select("slide_id", "label").iter_rows())
    assert [truth[slide_id] for slide_id in rows["slide_id"]] == rows["label"].to_list()
    assert "sample_id" in rows.columns
    with pytest.raises(UsageError, match=r"r\.json is there already"):
        run(_recipe(cohort, out=out))


def test_the_same_recipe_gives_the_same_result_and_another_seed_other_folds(cohort: tuple[Path, Path]) -> None:
    first, again, other = (run(_recipe(cohort, "slide_linear", seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert [fold["n"] for fold in first["folds"]] == [fold["n"] for fold in again["folds"]]
    assert first["metrics"]["log_loss"]["value"] != other["metrics"]["log_loss"]["value"]


def test_given_splits_are_hipt_s_slide_level(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    """Mean embeddings, scikit-learn's default neighbours, one AUC per fold: computed here from the store alone."""
    labels = {row[0]: row[2] for row in pl.read_csv(cohort[1]).iter_rows() if row[0] != "ghost"}
    store = open_store(cohort[0])
    patients = np.arange(20)
    expected = []
    for fold in range(3):
        drawn = np.random.default_rng(fold).permutation(patients)
        part_of = {slide_id: "test" if int(slide_id[2:]) // 2 in drawn[:8] else "train" for slide_id in store}
        parts = {part: [slide_id for slide_id in store if part_of[slide_id] == part] for part in ("train", "test")}
        rows = [f"{train},,{test}" for train, test in zip(parts["train"], parts["test"] + [""] * 99, strict=False)]
        (tmp_path / f"splits_{fold}.csv").write_text("\n".join(["train,val,test", *rows]) + "\n")
        x = {part: [store[i].embedding.mean(axis=0) for i in ids if i in labels] for part, ids in parts.items()}
        y = {part: [labels[i] for i in ids if i in labels] for part, ids in parts.items()}
        model = KNeighborsClassifier().fit(x["train"], y["train"])
        expected.append(roc_auc_score(y["test"], model.predict_proba(x["test"]), multi_class="ovr"))
    result = run(_recipe(cohort, "slide_knn", splits=tmp_path))
    assert [fold["metrics"]["auroc"]["value"] for fold in result["folds"]] == pytest.approx(expected)
    assert result["metrics"]["auroc"]["value"] == pytest.approx(np.mean(expected))
    assert result["metrics"]["auroc"]["std"] == pytest.approx(np.std(expected, ddof=1))
    assert result["missing"]["listed_without_sample"] == ["s.07"]
    assert result["missing"]["without_split"] == []


def test_a_patient_on_two_sides_is_refused_by_name_unless_allowed(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [f"s.{i:02d},,s.{i + 20:02d}" for i in range(18)]
    (tmp_path / "splits_0.csv").write_text("\n".join(["train,val,test", *rows, "s.38,,s.39"]) + "\n")
    with pytest.raises(ValueError, match=r"fold 0: p19: the same patient_id is in train and test \(1 in all\)"):
        run(_recipe(cohort, "slide_knn", splits=tmp_path))
    result = run(_recipe(cohort, "slide_knn", splits=tmp_path, allow_leak=True))
    assert result["folds"][0]["leak"] == {"train and test": ["p19"]}
    assert "1 folds leak" in describe(result)
    by_slide = run(_recipe(cohort, "slide_knn", splits=tmp_path, group="slide_id"))
    assert "leak" not in by_slide["folds"][0]


def test_a_patient_in_training_and_validation_is_a_leak_too(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    lines = cohort[1].read_text().splitlines()
    parts = ["train" if i % 4 < 2 else "test" for i in range(len(lines) - 1)]
    parts[1] = "val"
    file = tmp_path / "labels.csv"
    rows = zip(lines, ["split", *parts], strict=True)
    file.write_text("\n".join(f"{line},{part}" for line, part in rows))
    with pytest.raises(ValueError, match="p0: the same patient_id is in train and val"):
        run(_recipe((cohort[0], file), "linear", split="split"))


def test_several_k_are_all_told_and_one_is_chosen_without_the_test(cohort: tuple[Path, Path]) -> None:
    result = run(_recipe(cohort, "knn", k=[1, 5, 20]))
    assert list(result["by_k"]) == ["1", "5", "20"]
    (fold,) = result["folds"]
    assert fold["n"]["val"] > 0
    assert result["by_k"][f"{fold['chosen']:g}"]["auroc"] == result["metrics"]["auroc"]
    assert "k=20" in describe(result)


def test_the_scaling_that_was_chosen_is_told(cohort: tuple[Path, Path]) -> None:
    result = run(_recipe(cohort, "knn", scale="auto", k=[1, 5]))
    (fold,) = result["folds"]
    assert f"; chosen: {fold['scale']} {fold['chosen']:g}" in describe(result)


def test_missing_slides_can_be_made_a_failure(cohort: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"1 embeddings without a label: s\.07; 1 labels without an embedding: ghost"):
        run(_recipe(cohort, missing="fail"))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"store": None}, "give either store=STORE or pcam=FOLDER"),
        ({"pcam": "p"}, "give either store=STORE or pcam=FOLDER"),
        ({"weights": "w.pth"}, "weights is a key of pcam"),
        ({"split": "a", "splits": "b"}, "exclude each other"),
        ({"splits": "b"}, "folds=2 with given splits"),
        ({"split": "a", "labels": None, "folds": 1}, "split is a column of the labels"),
        ({"k": [5, 5]}, r"k=\[5, 5\]: expected one or several different numbers"),
        ({"c": []}, "expected one or several different numbers"),
        ({"c": -1}, "c=-1.*greater than 0"),
        ({"k": [0]}, "greater than or equal to 1"),
        ({"out": "x.txt"}, r"out=x\.txt: expected a name that ends in \.json"),
        ({"predictions": "x.json"}, r"ends in \.csv or \.parquet"),
        ({"probe": "svm"}, "probe=svm"),
        ({"foldz": 3}, "unknown key 'foldz'; did you mean 'folds'"),
        ({"test_fraction": 0.9}, "test_fraction=0.9"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(cohort: tuple[Path, Path], keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _recipe(cohort, **keys)


def test_numbers_of_a_small_cohort_stay_what_they_are(cohort: tuple[Path, Path]) -> None:
    """Golden: a change of splits, scaling, choice or resampling shows here."""
    found = run(_recipe(cohort, "linear", c=[0.001, 0.1], folds=3, resamples=200))["metrics"]
    for name, expected in GOLDEN.items():
        assert [found[name][part] for part in ("value", "low", "high")] == pytest.approx(expected, abs=2e-3), name


GOLDEN = {
    "accuracy": [0.938, 0.899, 0.971],
    "balanced_accuracy": [0.939, 0.878, 0.991],
    "auroc": [0.994, 0.986, 1.0],
    "f1": [0.938, 0.858, 0.99],
    "log_loss": [0.309, 0.268, 0.356],
}


def test_the_command_prints_one_object_and_keeps_what_people_read_apart(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    code = "import sys; sys.argv[0] = 'engine'; from engine.cli import main; main()"
    settings = [f"store={cohort[0]}", f"labels={cohort[1]}", f"out={tmp_path / 'r.json'}"]
    command = [sys.executable, "-P", "-c", code, "evaluate", "evaluate/tiny", *settings]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "r.json").read_text())
    assert "left out: 1 embeddings without a label: s.07" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert "r.json is there already" in again.stderr


def test_every_key_is_explained() -> None:
    text = describe_keys("evaluate")
    for name, field in EvaluateRecipe.model_fields.items():
        assert field.description
        assert f"\n{name} " in f"\n{text}"
    assert "encoder.name=hipt_patch:" in text
