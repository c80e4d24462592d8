"""Recipe, weights and patches agree, or the recipe is refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from engine.config import UsageError, apply_overrides, dump, read_recipe, shipped_recipes
from engine.extract_recipe import ExtractRecipe, build_extract_recipe
from engine.extraction.agreement import EncoderSpec, agree, check_spacing
from models import build_model
from models.weights_info import WeightsInfo, weights_digest

Recipe = Callable[..., ExtractRecipe]
HIPT = {"variant": "tiny", "depth": 1, "pos_interpolation": "recomputed"}
GIVEN = ("encoder.name=hipt_patch", "encoder.variant=tiny", "encoder.depth=1", "dataset=d", "out=o")


def _build(*settings: str) -> ExtractRecipe:
    return build_extract_recipe(apply_overrides({}, settings))


def _agree(recipe: ExtractRecipe, **patches: Any) -> EncoderSpec:
    here: dict[str, Any] = {"patch_px": 256, "mpp": 0.5, "stride_px": 256, "region_patches": None}
    return agree(recipe, **{**here, "precision": "float32", **patches})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of HIPT with metadata; those given as None are left out of it."""

    def make(**facts: Any) -> Path:
        state = build_model("hipt_patch", **HIPT).state_dict()
        info = WeightsInfo(
            weights_digest(state), "hipt_patch", HIPT, (0.5,) * 3, (0.5,) * 3, 0.5, pos_interpolation="recomputed"
        )
        path = tmp_path_factory.mktemp("weights") / "model.safetensors"
        save_file(state, path, replace(info, **facts).to_metadata())
        return path

    return make


def test_what_the_metadata_say_is_taken(weights: Callable[..., Path]) -> None:
    spec = _agree(_build("encoder.name=hipt_patch", "dataset=d", "out=o", f"weights={weights()}"))
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)
    assert spec.trained_mpp == 0.5
    assert (spec.config["depth"], spec.config["pos_interpolation"]) == (1, "recomputed")


@pytest.mark.parametrize(
    ("setting", "message", "override"),
    [
        ("normalisation=imagenet", "the weights' metadata say mean", "normalisation"),
        ("trained_mpp=1.0", "the weights' metadata say 0.5 um/px", "spacing"),
        ("encoder.pos_interpolation=given", "the weights' metadata say recomputed", "positions"),
    ],
)
def test_a_recipe_that_contradicts_the_metadata_is_refused_unless_it_says_so(
    setting: str, message: str, override: str, weights: Callable[..., Path]
) -> None:
    given = (*GIVEN, f"weights={weights()}", setting)
    with pytest.raises(UsageError, match=message) as caught:
        _agree(_build(*given))
    assert f"override={override}" in str(caught.value)
    spec = _agree(_build(*given, f"override={override}"))
    if override == "normalisation":
        assert spec.mean == (0.485, 0.456, 0.406)
    if override == "positions":
        from engine.extraction.encoders import Encoder

        assert spec.config["pos_interpolation"] == "given"
        assert Encoder(spec, "cpu").dim == 192


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"mean": None, "std": None}, "state no normalisation; give it as normalisation="),
        ({"mpp": None}, "state no spacing; give trained_mpp=0.5"),
        ({"pos_interpolation": None, "config": {}}, "name no position rule; give encoder.pos_interpolation="),
    ],
)
def test_what_the_metadata_leave_out_the_recipe_must_say(
    facts: dict[str, Any], message: str, weights: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        _agree(_build(*GIVEN, f"weights={weights(**facts)}"))


def test_patches_of_another_spacing_are_refused_unless_the_recipe_says_so(weights: Callable[..., Path]) -> None:
    given = (*GIVEN, f"weights={weights()}")
    with pytest.raises(UsageError, match=r"the patches have 0\.25 um/px, and the encoder was trained at 0\.5"):
        _agree(_build(*given), mpp=0.25)
    assert _agree(_build(*given, "override=spacing"), mpp=0.25)
    assert _agree(_build(*given), mpp=0.51)
    spec = _agree(_build(*given), mpp=None)
    assert "0.25" in check_spacing(spec, 0.25)
    assert "unknown" in check_spacing(spec, float("nan"))
    assert check_spacing(spec, 0.5) == ""


def test_weights_of_another_model_are_refused(weights: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"encoder.name=vittm_hmr: the weights are those of hipt_patch"):
        _agree(_build("encoder.name=vittm_hmr", "dataset=d", "out=o", f"weights={weights()}", "input_px=256"))


def test_one_of_the_two_vits_of_hipt_4k_is_refused_alone(weights: Callable[..., Path]) -> None:
    from engine.extraction.encoders import Encoder

    given = ("encoder.name=hipt_4k", "encoder.region.in_dim=192", "outputs=global", "dataset=d", "out=o")
    spec = _agree(_build(*given, f"weights={weights()}"), region_patches=4)
    with pytest.raises(ValueError, match="the region ViT's as region_weights=FILE"):
        Encoder(spec, "cpu")


def test_a_file_that_is_missing_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        _agree(_build(*GIVEN, "weights=none.pth"))


@pytest.mark.parametrize(
    ("settings", "patches", "message"),
    [
        (["input_px=224"], {}, "the patches have 256 px, and input_px=224; say with fit="),
        (["input_px=320", "fit=crop"], {}, "fit=crop cuts no 320 px out of them"),
        (["encoder.name=hipt_4k", "outputs=global"], {}, "needs regions"),
        (
            ["encoder.name=hipt_4k", "outputs=global"],
            {"region_patches": 4, "stride_px": 128},
            "regions need patches that lie edge to edge",
        ),
        (["encoder.name=vittm_hmr", "encoder.img_size=192"], {}, "the encoder's img_size is 192"),
    ],
)
def test_patches_that_do_not_fit_the_encoder_are_refused(
    settings: list[str], patches: dict[str, Any], message: str
) -> None:
    given = ("encoder.name=hipt_patch", "dataset=d", "out=o", "weights=random", "normalisation=half")
    recipe = _build(*given, *settings)
    with pytest.raises(UsageError, match=message):
        _agree(recipe, **patches)


def test_a_run_of_training_brings_its_config_normalisation_and_spacing(tmp_path: Path) -> None:
    config = {"img_size": 224, "memory_patch": 16, "process_patch": 32, "dim": 96, "depth": 1, "heads": 4}
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (tmp_path / "last").symlink_to("checkpoints/step-00000001")
    save_file(build_model("vittm_hmr", **config).state_dict(), folder / "model.safetensors", {"format": "pt"})
    run = {"model": {"name": "vittm_hmr", **config}, "mean": [0.4] * 3, "std": [0.2] * 3, "dataset": "gone"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run))
    values = read_recipe("extract", "extract/vittm_hmr")
    for place in (tmp_path, folder, folder / "model.safetensors"):
        settings = ["dataset=d", "out=o", f"weights={place}", "trained_mpp=0.5"]
        spec = _agree(build_extract_recipe(apply_overrides(values, settings)))
        assert (spec.mean, spec.std) == ((0.4,) * 3, (0.2,) * 3)
        assert spec.config["dim"] == 96
    from engine.extraction.encoders import Encoder

    encoder = Encoder(spec, "cpu")
    assert encoder.shapes() == {"embedding": (96,)}
    with pytest.raises(UsageError, match="state no spacing"):
        _agree(build_extract_recipe(apply_overrides(values, ["dataset=d", "out=o", f"weights={tmp_path}"])))


def test_resnet50_is_cut_off_after_its_third_stage_as_in_clam(tmp_path: Path) -> None:
    import timm

    from engine.extraction.encoders import Encoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        whole: Any = timm.create_model("resnet50", pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet50.pth")
    values = read_recipe("extract", "extract/resnet50")
    settings = ["dataset=d", "out=o", f"weights={tmp_path / 'resnet50.pth'}", "batch_size=1"]
    encoder = Encoder(_agree(build_extract_recipe(apply_overrides(values, settings))), "cpu")
    assert encoder.dim == 1024
    pixels = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        x = whole.maxpool(whole.act1(whole.bn1(whole.conv1((pixels[0].permute(2, 0, 1) / 255 - mean)[None] / std))))
        exact = whole.layer3(whole.layer2(whole.layer1(x))).mean(dim=(2, 3))
    torch.testing.assert_close(encoder.patches(pixels), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", shipped_recipes("extract"))
def test_shipped_recipes_are_valid_and_a_dumped_one_means_the_same(name: str, tmp_path: Path) -> None:
    given = ["dataset=d", "out=o", *([] if name == "extract/tiny" else ["weights=w.pth"])]
    recipe = build_extract_recipe(apply_overrides(read_recipe("extract", name), given))
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert build_extract_recipe(read_recipe("extract", str(tmp_path / "recipe.yaml"))) == recipe


@pytest.mark.parametrize("name", [name for name in shipped_recipes("extract") if name != "extract/tiny"])
def test_no_shipped_recipe_but_tiny_makes_random_features(name: str) -> None:
    with pytest.raises(UsageError, match="the key 'weights' is missing"):
        build_extract_recipe(apply_overrides(read_recipe("extract", name), ["dataset=d", "out=o"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["encoder.name=hipt_path"], "there is no such encoder; did you mean 'hipt_patch'"),
        (["encoder.variants=tiny"], r"unknown key 'encoder\.variants'; did you mean 'variant'"),
        (["slides=s"], "give either dataset=DATASET or slides=SLIDES"),
        (["outputs=global"], "only hipt_4k has that choice"),
        (["intermediate=3"], "only timm has that choice"),
        (["fit=crop"], "fit=crop without input_px"),
        (["batch_size=0"], "expected 1 or more, or auto"),
        (["patches.mp=1"], r"unknown key 'patches\.mp'"),
    ],
)
def test_mistakes_of_a_recipe_are_told(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _build("weights=random", *GIVEN, *settings)
