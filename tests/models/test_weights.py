"""Checkpoints load completely or not at all, and an error names the file and what does not fit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import build_model, load_weights
from models.weights_info import WeightsInfo, weights_digest

PARITY = Path(__file__).parents[2] / "../shared/parity"
ATTENTION_MIL: dict[str, Any] = {"in_dim": 32, "embed_dims": [], "attention_dim": 16, "n_classes": 3}
ATTENTION_MIL["classifier_dims"] = [16]


class Classifier(nn.Module):
    """A model that does have a `head.`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


class Encoder(nn.Module):
    """A model without a head, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)


class Dangerous:
    """A pickle that would run code when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, ("1/0",))


def weights(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Encoder().state_dict()


def assert_loaded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def test_safetensors_load(encoder: Encoder, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    load_weights(encoder, str(tmp_path / "model.safetensors"))
    assert_loaded(encoder, weights())


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict", "model", "teacher", "student"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "_orig_mod."])
def test_known_wrappers_and_prefixes_are_undone(
    encoder: Encoder, tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    state: dict[str, Any] = {prefix + key: value for key, value in weights().items()}
    state[prefix + "head.mlp.weight"] = torch.zeros(3)
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "checkpoint.pth")
    load_weights(encoder, tmp_path / "checkpoint.pth")
    assert_loaded(encoder, weights())


def test_the_teacher_is_preferred_to_the_student(encoder: Encoder, tmp_path: Path) -> None:
    torch.save({"student": weights(2), "teacher": weights(1)}, tmp_path / "dino.pth")
    load_weights(encoder, tmp_path / "dino.pth")
    assert_loaded(encoder, weights(1))


def test_a_prefix_that_is_the_models_own_name_is_kept(tmp_path: Path) -> None:
    wrapped = nn.ModuleDict({"backbone": Encoder()})
    torch.save({f"module.backbone.{key}": value for key, value in weights().items()}, tmp_path / "w.pt")
    load_weights(wrapped, tmp_path / "w.pt")
    assert_loaded(wrapped["backbone"], weights())


def test_missing_extra_and_misshapen_keys_are_listed_and_nothing_is_loaded(encoder: Encoder, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = weights()
    del state["norm.bias"]
    state["body.weight"] = torch.zeros(5, 4)
    state |= {f"tail.{i}": torch.zeros(1) for i in range(7)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit Encoder") as error:
        load_weights(encoder, tmp_path / "w.pth")
    message = str(error.value)
    assert str(tmp_path / "w.pth") in message
    assert "1 missing: norm.bias" in message
    assert "7 not in the model: tail.0, tail.1, tail.2, tail.3, tail.4, ..." in message
    assert "body.weight [5, 4] instead of [4, 4]" in message
    assert_loaded(encoder, before)


def test_a_head_is_required_where_the_model_has_one(tmp_path: Path) -> None:
    state = Classifier().state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"2 missing: head\.bias, head\.weight"):
        load_weights(Classifier(), tmp_path / "w.pth")


def test_one_key_under_two_prefixes_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    torch.save(weights() | {"module.body.bias": torch.zeros(4)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"'body\.bias' twice"):
        load_weights(encoder, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 86\n", "Git-LFS pointer"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer"),
        ("a.pth", b"\n<!DOCTYPE html><html>Virus scan warning</html>", "web page"),
        ("a.safetensors", b"<html><head></head></html>", "web page"),
        ("a.pth", b"", "is empty"),
        ("a.pth", b"\x80\x02not a pickle", "cannot be read as plain weights"),
        ("a.pt", b"PK\x03\x04 a cut-off zip", "cannot be read as plain weights"),
        ("a.safetensors", b"\xff" * 40, "damaged or no safetensors"),
        ("a.npz", b"weights", "suffix '.npz'"),
    ],
)
def test_files_that_are_no_checkpoint_are_named(
    encoder: Encoder, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        load_weights(encoder, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "pickle"])
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_cut_off_file_is_named(encoder: Encoder, tmp_path: Path, legacy: bool, kept: float) -> None:
    path = tmp_path / "w.pth"
    torch.save(weights(), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"w\.pth cannot be read as plain weights"):
        load_weights(encoder, path)


def test_a_changed_byte_among_the_weights_is_found(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(weights(), path)
    content = bytearray(path.read_bytes())
    content[content.index(weights()["body.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth is damaged: .*data/\d+ in it does not have its checksum"):
        load_weights(encoder, path)


def test_a_missing_file_and_a_folder_are_named(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        load_weights(encoder, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_weights(encoder, tmp_path)


def test_a_pickle_with_code_is_refused_without_running_it(encoder: Encoder, tmp_path: Path) -> None:
    torch.save({"model": weights(), "hook": Dangerous()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        load_weights(encoder, tmp_path / "w.pth")


def test_a_file_without_a_state_dict_says_what_it_holds(encoder: Encoder, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds a dict with the keys epoch, optimizer: expected a state dict"):
        load_weights(encoder, tmp_path / "w.pth")


# Published encoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entries"), [("hipt_patch", 150), ("hipt_region", 78)])
def test_a_whole_dino_run_gives_its_teacher_backbone(tmp_path: Path, name: str, entries: int) -> None:
    torch.manual_seed(1)
    backbone = build_model(name).state_dict()
    assert len(backbone) == entries
    teacher = {f"module.backbone.{key}": value for key, value in backbone.items()}
    teacher["module.head.last_layer.weight_v"] = torch.zeros(8, 4)
    student = {key: torch.zeros_like(value) for key, value in teacher.items()}
    run = {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(lr=1e-3), "optimizer": {}}
    torch.save(run, tmp_path / "checkpoint.pth")
    torch.manual_seed(2)
    model = build_model(name)
    load_weights(model, tmp_path / "checkpoint.pth")
    assert_loaded(model, backbone)


@pytest.mark.parametrize(
    ("architecture", "settings", "classifier"),
    [
        ("resnet34", {}, "fc"),
        ("resnet50", {}, "fc"),
        ("vit_base_patch16_224", {"depth": 2}, "head"),
        # UNI: a ViT-L/16 with layer scale; two of its blocks.
        ("vit_large_patch16_224", {"depth": 2, "init_values": 1e-5, "dynamic_img_size": True}, None),
    ],
)
def test_files_of_other_encoders_load_without_their_classifier(
    tmp_path: Path, architecture: str, settings: dict[str, Any], classifier: str | None
) -> None:
    torch.manual_seed(1)
    published: Any = timm.create_model(architecture, num_classes=10 if classifier else 0, **settings).eval()
    torch.save(published.state_dict(), tmp_path / "pytorch_model.bin")
    model = build_model("timm", architecture=architecture, settings=settings).eval()
    load_weights(model, tmp_path / "pytorch_model.bin")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(images), published.forward_head(published.forward_features(images), pre_logits=True))
    assert not any(key.startswith(("fc.", "head.")) for key in model.state_dict())


def test_an_encoder_that_timm_lacks_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no architecture 'resnet500'; near it are resnet50\w*, \w+, \w+; timm"):
        build_model("timm", architecture="resnet500")
    with pytest.raises(ValueError, match=r"resnet18 refuses the settings \{'depht': 2\}"):
        build_model("timm", architecture="resnet18", settings={"depht": 2})


def test_the_region_vit_of_a_later_reimplementation_is_renamed(tmp_path: Path) -> None:
    vit = {"in_dim": 8, "dim": 16, "depth": 1, "heads": 2}
    torch.manual_seed(1)
    model = build_model("hipt_local_global", n_classes=2, in_dim=16, dim=18, region=vit)
    state = {key.replace("local_vit.", "vit_region."): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, expected)


@pytest.mark.parametrize(
    ("file", "published", "name", "config"),
    [
        ("hipt_slide", "c.LocalHIPT_4096", "hipt_local_global", {"n_classes": 4}),
        ("hipt_slide", "c.LocalHIPT_2048_pre4096", "hipt_local_global", {"n_classes": 4}),
        ("hipt_slide", "c.LocalHIPT_2048", "hipt_local_global", {"n_classes": 4, "region": {"pos_grid": 7}}),
        ("hipt_slide", "c.LocalHIPT_2048_masked", "hipt_local_global", {"n_classes": 4, "region": {"pos_grid": 7}}),
        ("hipt_slide", "DSMIL", "dsmil", {}),
        ("hipt_slide", "MIL_fc", "pool_mil", {"pool": "top", "embed_dims": [384]}),
        ("hmr", "mil_simple", "abmil", {**ATTENTION_MIL, "gated": False}),
        ("hmr", "mil_gated", "abmil", ATTENTION_MIL),
    ],
)
def test_every_published_key_finds_its_place(
    tmp_path: Path, file: str, published: str, name: str, config: dict[str, Any]
) -> None:
    if not PARITY.is_dir():
        pytest.skip(f"no published keys at {PARITY}")
    lists = json.loads((PARITY / f"keys_{file}.json").read_text())
    (shapes,) = (keys for title, keys in lists.items() if title.split(" ")[0] == published)
    torch.manual_seed(0)
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "w.pth")
    model = build_model(name, **config)
    load_weights(model, tmp_path / "w.pth")
    loaded = list(model.state_dict().values())
    assert len(loaded) == len(state)
    assert all(any(torch.equal(value, own) for own in loaded) for value in state.values())


def test_a_foreign_classifier_is_ignored_whatever_its_layers(encoder: Encoder, tmp_path: Path) -> None:
    torch.save({**weights(), "classifier.0.weight": torch.zeros(3, 4)}, tmp_path / "w.pth")
    load_weights(encoder, tmp_path / "w.pth")
    assert_loaded(encoder, weights())


def test_a_hub_that_does_not_answer_is_said_clearly(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(name: str, *, weights_only: bool) -> dict[str, Tensor]:
        asked.append((name, weights_only))
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", refuse)
    with pytest.raises(
        RuntimeError, match=r"hf-hub:owner/name cannot be fetched \(ConnectionError: no route to host\)"
    ):
        load_weights(encoder, "hf-hub:owner/name")
    monkeypatch.setattr("timm.models.load_state_dict_from_hf", lambda name, weights_only: weights())
    load_weights(encoder, "hf-hub:owner/name")
    assert_loaded(encoder, weights())
    assert asked == [("owner/name", True)]


# What is known of weights --------------------------------------------------------------------------------------------


def info(**facts: Any) -> WeightsInfo:
    return WeightsInfo(weights_digest(weights()), **facts)


def test_the_digest_is_of_names_types_shapes_and_values_in_any_container(encoder: Encoder, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    torch.save({"teacher": {f"module.{key}": value for key, value in weights().items()}}, tmp_path / "w.pth")
    one, other = (load_weights(encoder, tmp_path / name) for name in ("w.safetensors", "w.pth"))
    assert one == other == info()
    state = {"a": torch.zeros(2, 3), "b": torch.tensor(1)}
    digest = weights_digest(state)
    assert digest == weights_digest(dict(reversed(state.items())))
    for other_state in (
        {"a": torch.zeros(3, 2), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 3), "c": torch.tensor(1)},
        {"a": torch.zeros(2, 3), "b": torch.tensor(2)},
    ):
        assert weights_digest(other_state) != digest
    assert weights_digest({"a": torch.zeros(2, dtype=torch.bfloat16)}).startswith("sha256:")


def test_what_is_known_comes_back_with_the_weights(encoder: Encoder, tmp_path: Path) -> None:
    known = info(model="timm", config={"a": 1}, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), mpp=0.5)
    save_file(weights(), tmp_path / "w.safetensors", known.to_metadata())
    assert load_weights(encoder, tmp_path / "w.safetensors") == known
    assert WeightsInfo.from_metadata({"format": "pt", "digest": "of another program"}) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"digest": '"sha256:0"'}, "is damaged: its weights have sha256:.*, its metadata says sha256:0"),
        ({"engine_weights": "2"}, "metadata has version 2: expected 1"),
        ({"mpp": "half"}, "metadata cannot be read"),
    ],
)
def test_metadata_that_contradicts_the_weights_is_refused(
    encoder: Encoder, tmp_path: Path, change: dict[str, str], sentence: str
) -> None:
    save_file(weights(), tmp_path / "w.safetensors", {**info(mpp=0.5).to_metadata(), **change})
    with pytest.raises(ValueError, match=rf"w\.safetensors.*{sentence}"):
        load_weights(encoder, tmp_path / "w.safetensors")


def test_a_head_that_is_left_out_is_no_damage(tmp_path: Path) -> None:
    state = Classifier().state_dict()
    save_file(state, tmp_path / "w.safetensors", WeightsInfo(weights_digest(state), mpp=0.5).to_metadata())
    body = nn.ModuleDict({"body": nn.Linear(4, 4)})
    assert load_weights(body, tmp_path / "w.safetensors").mpp == 0.5
    assert torch.equal(body.state_dict()["body.weight"], state["body.weight"])


def test_weights_of_another_position_rule_are_refused(tmp_path: Path) -> None:
    small = {"dim": 16, "depth": 1, "heads": 2}
    model = build_model("hipt_patch", **small)
    state = model.state_dict()
    known = WeightsInfo(weights_digest(state), pos_interpolation="recomputed")
    save_file(state, tmp_path / "w.safetensors", known.to_metadata())
    with pytest.raises(ValueError, match="trained with pos_interpolation=recomputed, and the model has given"):
        load_weights(model, tmp_path / "w.safetensors")
    load_weights(build_model("hipt_patch", **small, pos_interpolation="recomputed"), tmp_path / "w.safetensors")
