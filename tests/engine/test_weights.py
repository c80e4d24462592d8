"""`engine weights`: what a checkpoint holds, and safetensors that say how they are to be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from engine.config import UsageError
from engine.weights import convert, describe, inspect
from models import build_model, load_weights
from models.weights_info import WeightsInfo

VIT = ["dim=16", "depth=1", "heads=2"]
SMALL: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2}


def save(path: Path, name: str, **config: Any) -> dict[str, torch.Tensor]:
    """A DINO run of that model, its state dict under the teacher."""
    torch.manual_seed(0)
    state = build_model(name, **config).state_dict()
    teacher = {f"module.backbone.{key}": value for key, value in state.items()}
    torch.save({"teacher": {**teacher, "module.head.mlp.0.weight": torch.zeros(2)}, "epoch": 1}, path)
    return state


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("hipt_patch", {"variant": "tiny"}),
        ("hipt_region", {}),
        ("hipt_slide", {"n_classes": 7}),
        ("hipt_n", {"n_classes": 3}),
    ],
)
def test_a_model_is_recognised_by_its_keys_and_shapes(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    state = save(tmp_path / "run.pth", name, **config)
    found = inspect(tmp_path / "run.pth")
    assert (found["model"], found["wrapper"], found["left_out"]) == (name, "teacher", 1)
    assert found["entries"] == len(state)
    assert found["parameters"] == sum(value.numel() for value in state.values())
    assert found["dtypes"] == {"float32": len(state)}
    assert {one["name"]: one["shape"] for one in found["weights"]} == {k: list(v.shape) for k, v in state.items()}
    assert found["mean"] is found["mpp"] is found["pos_interpolation"] is None
    assert all(word in describe(found) for word in (name, "teacher", found["digest"], "unknown"))


def test_a_checkpoint_that_no_model_has_is_shown_all_the_same(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 2, dtype=torch.float16)}, tmp_path / "w.pt")
    found = inspect(tmp_path / "w.pt")
    assert (found["model"], found["entries"], found["parameters"]) == (None, 1, 6)
    assert found["weights"] == [{"name": "a.weight", "dtype": "float16", "shape": [3, 2]}]
    assert "not recognised" in describe(found)


def test_a_published_model_is_converted_with_what_is_known_of_it(tmp_path: Path) -> None:
    state = save(tmp_path / "vit4k.pth", "hipt_region")
    result = convert(tmp_path / "vit4k.pth")
    out = tmp_path / "vit4k.safetensors"
    assert result["out"] == str(out)
    assert {key: json.loads(metadata(out)[key]) for key in ("model", "mean", "std", "mpp", "pos_interpolation")} == {
        "model": "hipt_region",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "mpp": 0.5,
        "pos_interpolation": "given",
    }
    assert json.loads(metadata(out)["digest"]) == result["digest"] == inspect(tmp_path / "vit4k.pth")["digest"]
    model = build_model("hipt_region", **json.loads(metadata(out)["config"]))
    info = load_weights(model, out)
    assert isinstance(info, WeightsInfo)
    assert info.digest == result["digest"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # Once converted, a file says by itself what it is.
    again = convert(out, tmp_path / "again.safetensors")
    assert metadata(Path(again["out"])) == metadata(out)
    assert inspect(out)["mpp"] == 0.5


def test_what_is_given_is_written_down(tmp_path: Path) -> None:
    save(tmp_path / "w.pth", "hipt_patch", **SMALL)
    settings = [*VIT, "pos_interpolation=recomputed"]
    result = convert(tmp_path / "w.pth", model="hipt_patch", settings=settings, normalisation="imagenet", mpp=0.25)
    assert (result["mpp"], result["pos_interpolation"]) == (0.25, "recomputed")
    assert result["mean"] == (0.485, 0.456, 0.406)
    assert result["config"]["dim"] == 16
    own = convert(
        tmp_path / "w.pth",
        tmp_path / "new" / "own.safetensors",
        model="hipt_patch",
        settings=VIT,
        normalisation="0.7,0.6,0.7/0.2,0.2,0.1",
        mpp=1,
    )
    assert (own["mean"], own["std"]) == ((0.7, 0.6, 0.7), (0.2, 0.2, 0.1))
    assert "0.7, 0.6, 0.7" in describe(own)


def test_types_and_shared_storage_survive(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in build_model("hipt_patch", **SMALL).state_dict().items()}
    joint = torch.zeros(32, dtype=torch.float16)
    state["norm.weight"], state["norm.bias"] = joint[:16], joint[16:]
    torch.save(state, tmp_path / "w.pt")
    result = convert(tmp_path / "w.pt", model="hipt_patch", settings=VIT)
    assert inspect(Path(result["out"]))["dtypes"] == {"float16": len(state)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "weights that no model has by default; name it with --model"),
        ({"model": "hipt_pach"}, "--model hipt_pach: there is no such model; did you mean 'hipt_patch'"),
        ({"model": "hipt_patch", "settings": ["deep=1"]}, "no setting 'deep'; did you mean 'depth'"),
        ({"model": "hipt_patch", "settings": VIT, "normalisation": "halve"}, "--normalisation halve: expected half"),
        ({"model": "hipt_patch", "settings": VIT, "normalisation": "1,1,1/0,1,1"}, "deviations above 0"),
        ({"model": "hipt_patch", "settings": VIT, "mpp": 0}, "--mpp 0: expected um/px above 0"),
        ({"out": "w.pth"}, "w.pth is there already"),
        ({"out": "w.npz"}, "expected a name that ends in .safetensors"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    save(tmp_path / "w.pth", "hipt_patch", **SMALL)
    if "out" in arguments:
        arguments = {"out": tmp_path / arguments["out"]}
    with pytest.raises(UsageError, match=sentence):
        convert(tmp_path / "w.pth", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_normalisation_and_spacing_of_any_other_model_must_be_given(tmp_path: Path) -> None:
    save(tmp_path / "w.pth", "timm", architecture="resnet18")
    model: dict[str, Any] = {"model": "timm", "settings": ["architecture=resnet18"]}
    for given in ({}, {"mpp": 0.5}, {"normalisation": "imagenet"}):
        with pytest.raises(UsageError, match="normalisation and spacing that timm was trained with must be known"):
            convert(tmp_path / "w.pth", **model, **given)
    result = convert(tmp_path / "w.pth", **model, mpp=0.5, normalisation="imagenet")
    assert (result["pos_interpolation"], result["config"]["architecture"]) == (None, "resnet18")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "w.pth", "hipt_patch", **SMALL)
    with pytest.raises(ValueError, match=r"does not fit PatchViT .* 12 missing: blocks\.1"):
        convert(tmp_path / "w.pth", model="hipt_patch", settings=["dim=16", "depth=2", "heads=2"])


def test_the_command_line_shows_converts_and_ends_with_the_right_codes(tmp_path: Path) -> None:
    save(tmp_path / "w.pth", "hipt_region")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")

    def engine(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", "from engine.cli import main; main()", "weights", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    done = engine("inspect", "w.pth", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "hipt_region"
    done = engine("convert", "w.pth", "--out", "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert "out.safetensors: 78 weights of hipt_region" in done.stdout
    assert "published HIPT weights: normalisation half" in done.stderr
    for arguments, said in (
        (("inspect", "none.pth"), "none.pth does not exist"),
        (("inspect", "lfs.pth"), "is a Git-LFS pointer"),
        (("convert", "w.pth", "--out", "out.safetensors"), "is there already"),
    ):
        done = engine(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert said in done.stderr
        assert "Traceback" not in done.stderr
