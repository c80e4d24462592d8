"""What a recipe may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import UsageError, build, section
from engine.keys import describe_keys
from engine.recipes import ShardRecipe, TrainRecipe
from engine.train_recipe import build_train_recipe
from models.config import MODEL_CONFIGS


def _shard(**values: Any) -> ShardRecipe:
    return build(ShardRecipe, {"slides": "s", "out": "o", **values})


def _train(**values: Any) -> TrainRecipe:
    return build_train_recipe({"dataset": "d", "run": "r", "steps": 1, "model": {"name": "vittm_hmr"}, **values})


def test_a_recipe_is_frozen() -> None:
    recipe = _shard()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mpp": 0.001}, "mpp=0.001"),
        ({"mpp": 1000}, "mpp=1000"),
        ({"mpp": -0.5}, "mpp=-0.5"),
        ({"mpp": float("nan")}, "mpp=nan"),
        ({"mpp": "fine"}, "mpp=fine"),
        ({"context_px": 0}, "context_px=0"),
        ({"context_px": 256.5}, "context_px=256.5"),
        ({"stride_px": 8}, "stride_px=8"),
        ({"context_px": 256, "stride_px": 512}, "stride_px=512"),
        ({"context_px": 256, "stride_px": 255}, "even"),
        ({"min_tissue": 1.5}, "min_tissue=1.5"),
        ({"min_tissue": float("nan")}, "min_tissue=nan"),
        ({"max_bad_fraction": -1}, "max_bad_fraction=-1"),
        ({"quality": 101}, "quality=101"),
        ({"reader": "pillow"}, "reader=pillow"),
        ({"routes": "copy"}, "routes=copy"),
        ({"permute": "random"}, "permute=random"),
        ({"group_slides": 0}, "group_slides=0"),
        ({"region_patches": 1}, "region_patches=1"),
        ({"region_patches": 257}, "region_patches=257"),
        ({"tissue": "deep"}, "tissue=deep"),
        ({"min_object_um2": -1}, "min_object_um2=-1"),
        ({"max_hole_um2": float("nan")}, "max_hole_um2=nan"),
        ({"check_tiles": "perhaps"}, "check_tiles=perhaps"),
        ({"subset": 0}, "subset=0"),
        ({"barcodes": "gtex"}, "barcodes=gtex"),
        ({"patches_per_shard": 0}, "patches_per_shard=0"),
        ({"workers": 0}, "workers=0"),
        ({"workers": -2}, "workers=-2"),
        ({"workers": "many"}, "workers=many"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
    ],
)
def test_shard_values_out_of_range_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        _shard(**values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_hold_what_decides_bytes_and_nothing_of_places_or_workers() -> None:
    one = build(ShardRecipe, {"slides": "a", "out": "b", "workers": 1})
    elsewhere = {"slides": "c", "out": "d", "workers": 7, "plans": "p", "md5_manifest": "m", "subset": 3}
    other = build(ShardRecipe, {**elsewhere, "barcodes": "tcga"})
    assert one.options() == other.options()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mpp", 1.0),
        ("context_px", 128),
        ("stride_px", 128),
        ("min_tissue", 0.1),
        ("quality", 90),
        ("reader", "openslide"),
        ("max_bad_fraction", 0.1),
        ("patches_per_shard", 7),
        ("seed", 3),
        ("tissue", "clam"),
        ("min_object_um2", 5.0),
        ("max_hole_um2", 5.0),
        ("region_patches", 4),
        ("optimize_huffman", False),
        ("routes", "decode"),
        ("check_tiles", False),
        ("patch_flags", False),
        ("permute", "global"),
        ("group_slides", 2),
    ],
)
def test_every_key_that_decides_bytes_is_in_the_options(key: str, value: Any) -> None:
    assert _shard(**{key: value}).options() != _shard().options()


def test_native_and_numbers_are_told_apart_and_equal_numbers_are_not() -> None:
    assert _shard(mpp="native").options().mpp is None
    assert _shard(mpp=1).options() == _shard(mpp=1.0).options() == _shard(mpp="1.0").options()


def test_a_stride_that_is_left_out_is_the_context() -> None:
    assert _shard(context_px=320).options().stride_px == 320


def test_a_train_recipe_checks_the_models_own_keys() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'model\.dims'; did you mean '(model\.)?dim'"):
        _train(model={"name": "vittm_hmr", "dims": 3})
    with pytest.raises(UsageError, match=r"model\.depth=-1"):
        _train(model={"name": "vittm_hmr", "depth": -1})


def test_a_train_recipe_needs_a_known_model() -> None:
    with pytest.raises(UsageError, match=r"model\.name"):
        _train(model=None)
    with pytest.raises(UsageError, match=r"model\.name"):
        _train(model={"dim": 3})
    with pytest.raises(UsageError, match="did you mean 'vittm_hmr'"):
        _train(model={"name": "vitm_hmr"})


def test_the_model_sees_the_crop() -> None:
    assert _train(crop_px=192).model["img_size"] == 192
    with pytest.raises(UsageError, match="img_size"):
        _train(crop_px=192, model={"name": "vittm_hmr", "img_size": 224})


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size=10 with processes=4"):
        _train(batch_size=10, processes=4)


@pytest.mark.parametrize("verb", ["shard", "train"])
def test_keys_lists_every_key_of_the_recipe(verb: str) -> None:
    text = describe_keys(verb)
    recipe = ShardRecipe if verb == "shard" else TrainRecipe
    words = {line.split()[0] for line in text.splitlines() if line and not line.startswith(" ")}
    assert {
        name for name, field in recipe.model_fields.items() if section(field.annotation) is not field.annotation
    } <= words
    if verb == "train":
        assert {"optim.lr", "model.dim", "ect", "ect.scale", "dino.small_px", "locality.block_rows"} <= words
        assert all(f"model.name={name}" in text for name in MODEL_CONFIGS)


def test_a_number_may_name_a_folder() -> None:
    assert _shard(out=2026).out == Path("2026")
