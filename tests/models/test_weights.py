"""Checkpoints load completely or not at all, and an error names the file and what does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import load_weights


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
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
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
