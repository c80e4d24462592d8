"""YAML and `key.path=value` to a recipe: order, types, and errors that name the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import UsageError, apply_overrides, build, dump, nearest, read_recipe, shipped_recipes
from engine.objective_recipes import OptimRecipe
from engine.recipes import ShardRecipe, TrainRecipe
from engine.train_recipe import build_train_recipe

NEEDED = ["slides=s", "out=o"]


def _shard(*settings: str, **values: Any) -> ShardRecipe:
    return build(ShardRecipe, apply_overrides(values, [*NEEDED, *settings]))


def _train(*settings: str) -> TrainRecipe:
    return build_train_recipe(
        apply_overrides(read_recipe("train", "train/vittm_hmr_tiny"), ["dataset=d", "run=r", *settings])
    )


def test_the_command_line_beats_yaml_which_beats_the_class_default(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("quality: 70\nseed: 5\n")
    values = read_recipe("shard", str(recipe))
    resolved = build(ShardRecipe, apply_overrides(values, [*NEEDED, "seed=6"]))
    assert (resolved.seed, resolved.quality, resolved.context_px) == (6, 70, 256)


def test_the_last_of_two_settings_wins() -> None:
    assert _shard("seed=1", "seed=2").seed == 2


def test_nested_keys_are_set_one_by_one() -> None:
    recipe = _train("optim.lr=1e-3", "model.dim=32")
    assert recipe.optim.lr == 1e-3
    assert recipe.optim.warmup_steps == 5  # from the YAML
    assert recipe.optim.clip_norm == OptimRecipe().clip_norm
    assert recipe.model["dim"] == 32
    assert recipe.model["depth"] == read_recipe("train", "train/vittm_hmr_tiny")["model"]["depth"]


def test_overrides_leave_the_values_they_came_from_alone() -> None:
    values: dict[str, Any] = {"optim": {"lr": 1.0}}
    apply_overrides(values, ["optim.lr=2", "seed=1"])
    assert values == {"optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("text", "value"), [("2e-2", 0.02), ("5E+1", 50.0), ("0.25", 0.25), ("1", 1.0), (".5", 0.5), ("2e0", 2.0)]
)
def test_floats_are_read_as_people_write_them(text: str, value: float) -> None:
    assert _shard(f"mpp={text}").mpp == value


def test_a_value_may_hold_equals_signs_and_spaces() -> None:
    recipe = _shard("slides=/data/a=b/c d/*.svs")
    assert recipe.slides == "/data/a=b/c d/*.svs"


@pytest.mark.parametrize("setting", ["context_px", "=3", "a b=3", "optim..lr=3", "-x=3", ".=3"])
def test_what_is_no_setting_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="is no setting"):
        apply_overrides({}, [setting])


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match="mpp is a value, not a group"):
        apply_overrides({"mpp": 0.5}, ["mpp.x=3"])


@pytest.mark.parametrize(
    ("setting", "wrong", "right"),
    [("contxt_px=3", "contxt_px", "context_px"), ("slide=3", "slide", "slides"), ("MPP=3", "MPP", "mpp")],
)
def test_an_unknown_key_names_the_nearest(setting: str, wrong: str, right: str) -> None:
    with pytest.raises(UsageError) as caught:
        _shard(setting)
    assert f"unknown key {wrong!r}" in str(caught.value)
    assert right in str(caught.value).removeprefix(f"unknown key {wrong!r}")


def test_an_unknown_nested_key_is_named_with_its_path() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'optim\.lrr'; did you mean '(optim\.)?lr'"):
        _train("optim.lrr=3")


def test_an_unknown_key_without_a_likeness_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"known: .*context_px"):
        _shard("zzzzzz=1")


def test_every_mistake_of_a_recipe_is_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        build(ShardRecipe, {"quality": 0, "seeed": 1})
    text = str(caught.value)
    for part in ("'slides' is missing", "'out' is missing", "quality=0", "'seeed'"):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("source", ["tiny", "shrad/tiny", "shard/tinny"])
def test_an_unknown_recipe_names_the_nearest_one(source: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'shard/tiny'"):
        read_recipe("shard", source)


def test_a_recipe_of_another_verb_is_not_suggested_as_itself() -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe("shard", "train/vittm_hmr_tiny")
    assert "did you mean 'train/vittm_hmr_tiny'" not in str(caught.value)
    assert "shard/tiny" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- 1\n- 2\n", "list"), ("just text", "str"), ("a: [1\n", "no valid YAML"), ("a: b: c\n", "no valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason) as caught:
        read_recipe("shard", str(path))
    assert "\n" not in str(caught.value)


def test_a_recipe_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_recipe("shard", str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError):
        read_recipe("shard", str(tmp_path / "folder.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError):
        read_recipe("shard", str(tmp_path / "binary.yaml"))


def test_an_empty_recipe_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert read_recipe("shard", str(path)) == {}


@pytest.mark.parametrize("name", shipped_recipes("shard"))
def test_shipped_shard_recipes_are_valid(name: str) -> None:
    build(ShardRecipe, apply_overrides(read_recipe("shard", name), NEEDED))


@pytest.mark.parametrize("name", shipped_recipes("train"))
def test_shipped_train_recipes_are_valid(name: str) -> None:
    build_train_recipe(apply_overrides(read_recipe("train", name), ["dataset=d", "run=r"]))


@pytest.mark.parametrize("settings", [[], ["mpp=native", "workers=3", "stride_px=128", "slides=a/*.svs"]])
def test_a_dumped_shard_recipe_means_the_same(tmp_path: Path, settings: list[str]) -> None:
    recipe = _shard(*settings)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert build(ShardRecipe, read_recipe("shard", str(path))) == recipe


def test_a_dumped_train_recipe_means_the_same(tmp_path: Path) -> None:
    recipe = _train("optim.betas=[0.8, 0.9]", "processes=2")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert build_train_recipe(read_recipe("train", str(path))) == recipe


def test_nearest_says_nothing_of_an_empty_choice() -> None:
    assert nearest("x", []) == "."
