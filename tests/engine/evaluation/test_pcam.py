"""PatchCamelyon's files as users have them, in small: what is read, resized, normalised and said of the protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.config import UsageError, read_recipe
from engine.evaluate import run
from engine.evaluate_recipe import EvaluateRecipe, build_evaluate_recipe
from engine.evaluation.encoder import Encoder, open_encoder
from engine.evaluation.pcam import read_pcam
from models import build_model
from models.weights_info import WeightsInfo, weights_digest

SIZES = {"train": 80, "valid": 30, "test": 40}
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def pcam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose tumours are darker; the tables say which slide each is of."""
    folder = tmp_path_factory.mktemp("pcam")
    for number, (part, size) in enumerate(SIZES.items()):
        rng = np.random.default_rng(number)
        y = rng.integers(2, size=size)
        x = rng.integers(0, 120, size=(size, 96, 96, 3)) + (100 * (1 - y))[:, None, None, None]
        stem = f"camelyonpatch_level_2_split_{part}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file["x"] = x.astype(np.uint8)
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = y.astype(np.uint8).reshape(size, 1, 1, 1)
        lines = [f"{row},{row},{row},True,True,camelyon16_{part}_{row // 4}" for row in range(size)]
        (folder / f"{stem}_meta.csv").write_text("\n".join([",coord_y,coord_x,tumor_patch,center,wsi", *lines]) + "\n")
    return folder


def _recipe(name: str, pcam: Path, **keys: Any) -> EvaluateRecipe:
    encoder = {"name": "vittm_hmr", "dim": 32, "depth": 1, "heads": 2}
    shipped = read_recipe("evaluate", f"evaluate/{name}")
    values = {"pcam": pcam, "encoder": encoder, "weights": "random", "mean": HALF, "std": HALF, "resamples": 50}
    return build_evaluate_recipe({**shipped, **values, **keys})


def _encoder(side: int) -> Encoder:
    """The mean of red over the left half."""
    return Encoder(lambda images: images[:, 0, :, : side // 2].mean(dim=(1, 2))[:, None], HALF, HALF, "cpu", {})


def test_features_are_of_resized_and_normalised_images_in_the_order_of_the_file(pcam: Path) -> None:
    with h5py.File(pcam / "camelyonpatch_level_2_split_train_x.h5") as file:
        pixels = file["x"][:7]
    counts = {"train": 7, "val": 0, "test": 3}
    samples, fold = read_pcam(pcam, _encoder(96), counts, resize_px=96, batch_size=2)
    assert samples.x[:7, 0] == pytest.approx((pixels[:, :, :48, 0].mean(axis=(1, 2)) / 255 - 0.5) / 0.5, abs=1e-5)
    assert (fold.train.tolist(), fold.val.tolist(), fold.test.tolist()) == (list(range(7)), [], [7, 8, 9])
    bilinear = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (256, 256), mode="bilinear"
    )
    resized, _ = read_pcam(pcam, _encoder(256), counts, resize_px=256, batch_size=5)
    expected = (bilinear[:, 0, :, :128].mean(dim=(1, 2)) / 255 - 0.5) / 0.5
    assert resized.x[:7, 0] == pytest.approx(expected.numpy(), abs=1e-4)


def test_the_smoke_protocol_is_that_of_vittm_hmr_and_says_what_is_not(pcam: Path, tmp_path: Path) -> None:
    asked = _recipe("pcam_smoke", pcam)
    assert (asked.train_images, asked.val_images, asked.test_images) == (5000, 0, 1000)
    with pytest.raises(ValueError, match=r"train_images=5000: .*train_x\.h5 holds 80"):
        run(asked)
    out = tmp_path / "result.json"
    result = run(_recipe("pcam_smoke", pcam, train_images=60, test_images=40, scale="standard", out=out))
    assert result["differences"] == [
        "train_images: 60 (vittm-hmr: 5000)",
        "test_images: 40 (vittm-hmr: 1000)",
        "scale: standard (vittm-hmr: none)",
    ]
    assert result["protocol"] == "pcam_linear"
    assert result["folds"][0]["n"] == {"train": 60, "val": 0, "test": 40}
    assert result["folds"][0]["groups"] == {"train": 15, "val": 0, "test": 10}
    assert result["interval"]["resampled"] == "slide_id"
    assert result["features"]["weights"] == "random"
    assert result["features"]["seen_mpp"] == pytest.approx(0.3645)
    assert 0 <= result["metrics"]["auroc"]["value"] <= 1
    assert out.is_file()


def test_the_full_splits_choose_on_the_validation_and_train_on_the_training_images(pcam: Path) -> None:
    result = run(_recipe("pcam", pcam, c=[0.01, 1.0]))
    assert result["folds"][0]["n"] == {"train": 80, "val": 30, "test": 40}
    assert result["folds"][0]["chosen"] in (0.01, 1.0)
    assert result["recipe"]["refit"] is False
    assert result["metrics"]["auroc"]["value"] > 0.9
    again = build_evaluate_recipe(result["recipe"])
    assert run(again)["metrics"] == result["metrics"]


def test_without_tables_each_image_is_its_own_group(pcam: Path, tmp_path: Path) -> None:
    for file in pcam.glob("*.h5"):
        (tmp_path / file.name).symlink_to(file)
    result = run(_recipe("pcam", tmp_path, probe="knn", scale="none"))
    assert (result["interval"]["resampled"], result["n"]["groups"]) == ("image", 150)
    (tmp_path / "camelyonpatch_level_2_split_valid_y.h5").unlink()
    with pytest.raises(ValueError, match=r"there is no camelyonpatch_level_2_split_valid_y\.h5"):
        run(_recipe("pcam", tmp_path))


def test_any_encoder_gives_features_of_its_width() -> None:
    images = torch.rand(2, 3, 32, 32)
    for name, config, width in (
        ("timm", {"architecture": "resnet10t"}, 512),
        ("hipt_patch", {"variant": "tiny", "depth": 1}, 192),
        ("vittm_hmr", {"img_size": 32, "memory_patch": 8, "process_patch": 16, "dim": 32, "depth": 1, "heads": 2}, 32),
    ):
        encoder = open_encoder(name, config, Path("random"), mean=HALF, std=HALF, seed=1)
        found = encoder.embed(images.to(encoder.device))
        assert (found.shape, found.dtype, found.requires_grad) == ((2, width), torch.float32, False)
        again = open_encoder(name, config, Path("random"), mean=HALF, std=HALF, seed=1)
        assert torch.equal(found, again.embed(images.to(encoder.device)))


def test_normalisation_is_that_of_the_weights_unless_the_recipe_says_one(tmp_path: Path) -> None:
    state = build_model("hipt_patch", variant="tiny", depth=1).state_dict()
    info = WeightsInfo(weights_digest(state), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), mpp=0.5)
    save_file(state, tmp_path / "known.safetensors", info.to_metadata())
    save_file(state, tmp_path / "unknown.safetensors")
    config = {"variant": "tiny", "depth": 1}
    known = open_encoder("hipt_patch", config, tmp_path / "known.safetensors")
    assert (known.mean, known.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (known.facts["weights"], known.facts["mpp"]) == (info.digest, 0.5)
    assert open_encoder("hipt_patch", config, tmp_path / "known.safetensors", mean=HALF, std=HALF).mean == HALF
    with pytest.raises(ValueError, match="does not say how pixels are normalised: give mean and std"):
        open_encoder("hipt_patch", config, tmp_path / "unknown.safetensors")


def test_a_run_of_training_brings_config_and_normalisation(pcam: Path, tmp_path: Path) -> None:
    config = {"img_size": 128, "memory_patch": 16, "process_patch": 32, "dim": 32, "depth": 1, "heads": 2}
    state = build_model("vittm_hmr", **config).state_dict()
    info = WeightsInfo(weights_digest(state), "vittm_hmr", config, HALF, HALF, 0.5)
    (tmp_path / "last").mkdir()
    save_file(state, tmp_path / "last" / "model.safetensors", info.to_metadata())
    given = {"encoder": {"name": "vittm_hmr"}, "weights": tmp_path, "mean": None, "std": None}
    features = run(_recipe("pcam", pcam, resize_px=128, **given))["features"]
    assert (features["weights"], features["config"]["dim"], features["mean"]) == (info.digest, 32, [0.5, 0.5, 0.5])
    with pytest.raises(UsageError, match=r"img_size is 128, and resize_px=256: give resize_px=128"):
        run(_recipe("pcam", pcam, **given))
    given["encoder"] = {"name": "vittm_hmr", "dim": 64}
    with pytest.raises(UsageError, match=r"encoder\.dim=64: the weights' metadata say 32"):
        run(_recipe("pcam", pcam, resize_px=128, **given))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"encoder": None}, r"'encoder\.name' is missing"),
        ({"encoder": {"name": "hipt"}}, r"encoder\.name=hipt: there is no such encoder of images"),
        ({"encoder": {"name": "abmil"}}, "no such encoder of images"),
        ({"encoder": {"name": "hipt_patch", "dept": 3}}, r"unknown key 'encoder\.dept'; did you mean 'depth'"),
        ({"weights": None}, "'weights' is missing"),
        ({"mean": None, "std": None}, "state no normalisation"),
        ({"labels": "l.csv"}, "labels with pcam"),
        ({"folds": 3}, "folds=3 with pcam"),
    ],
)
def test_what_a_recipe_lacks_is_named(pcam: Path, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _recipe("pcam", pcam, **keys)


def test_files_that_are_no_patchcamelyon_are_refused(tmp_path: Path) -> None:
    for kind in ("x", "y"):
        with h5py.File(tmp_path / f"camelyonpatch_level_2_split_train_{kind}.h5", "w") as file:
            file[kind] = np.zeros((4, 64, 64, 3) if kind == "x" else (4, 1, 1, 1), np.uint8)
    with pytest.raises(ValueError, match=r"found uint8 \[4, 64, 64, 3\] and 4 labels; expected uint8 \[N, 96, 96, 3\]"):
        read_pcam(tmp_path, _encoder(96), {"train": None, "val": 0, "test": None}, resize_px=96, batch_size=2)
