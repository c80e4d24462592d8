"""HIPT_4K on regions: the published numbers, any size, batches, masks, chunks, devices."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_model
from models.hipt import HIPT4K

PARITY = Path(__file__).parents[2] / "../shared/parity"
VIT: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2}
SMALL: dict[str, Any] = {"patch": VIT, "region": {**VIT, "in_dim": 32}}


def build(**config: Any) -> HIPT4K:
    torch.manual_seed(0)
    model = build_model("hipt_4k", **config).eval()
    assert isinstance(model, HIPT4K)
    return model


def small(**config: Any) -> HIPT4K:
    """Weights that make every part matter: fresh ones leave class tokens and positions near 0."""
    model = build(**SMALL, **config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(one[key], other[key], atol=atol) for key in one)


def test_embeddings_are_the_published_ones() -> None:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    spec = importlib.util.spec_from_file_location("fill_hipt", PARITY / "fill_hipt.py")
    assert spec is not None
    assert spec.loader is not None
    formulas = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formulas)
    model = build()
    for part in (model.model256, model.model4k):
        part.load_state_dict({k: torch.from_numpy(formulas.param(k, v.shape)) for k, v in part.state_dict().items()})
    with torch.no_grad():
        features = model.features(torch.from_numpy(formulas.uniform("region512x512", (1, 3, 512, 512))))
    expected = np.load(PARITY / "hipt_vit.npz")
    assert np.abs(features["cls4k"].numpy() - expected["hipt4k.cls4k.512x512"]).max() < 1e-5
    both = torch.cat([features["mean256"], features["cls4k"]], dim=1)
    assert np.abs(both.numpy() - expected["hipt4k.mean256_cls4k.512x512"]).max() < 1e-5


def test_keys_and_shapes_are_the_published_ones() -> None:
    if not PARITY.is_dir():
        pytest.skip(f"no published keys at {PARITY}")
    expected = json.loads((PARITY / "keys_hipt_vit.json").read_text())["hipt4k"]
    with torch.device("meta"):
        state = build_model("hipt_4k").state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(256, 256, 0, 0), (601, 899, 44, 66), (512, 769, 0, 0), (771, 300, 2, 22), (259, 511, 2, 128)],
)
def test_a_region_of_any_size_is_cut_around_its_middle(height: int, width: int, top: int, left: int) -> None:
    model = small()
    images = torch.randn(1, 3, height, width)
    rows, columns = height // 256, width // 256
    patches = [
        images[:, :, top + 256 * r : top + 256 * (r + 1), left + 256 * c : left + 256 * (c + 1)]
        for r in range(rows)
        for c in range(columns)
    ]
    with torch.no_grad():
        features = model.features(images)
        cls256 = torch.cat([model.model256(patch) for patch in patches])
        cls4k = model.model4k(cls256.T.reshape(1, 32, rows, columns))
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        "cls256": (1, rows * columns, 32),
        "mean256": (1, 32),
        "cls4k": (1, 32),
    }
    assert torch.allclose(features["cls256"][0], cls256, atol=1e-5)
    assert torch.allclose(features["mean256"][0], cls256.mean(dim=0), atol=1e-5)
    assert torch.allclose(features["cls4k"], cls4k, atol=1e-5)


def test_a_batch_is_its_regions_one_by_one_whatever_the_chunk() -> None:
    images = torch.randn(3, 3, 512, 300)
    masks = torch.tensor([[[True], [True]], [[False], [True]], [[True], [False]]])
    with torch.no_grad():
        one_by_one = [small().features(images[i : i + 1]) for i in range(3)]
        masked = [small().features(images[i : i + 1], mask=masks[i : i + 1]) for i in range(3)]
        for chunk in (1, 4, 256):
            model = small(chunk=chunk)
            for alone, mask in ((one_by_one, None), (masked, masks)):
                expected = {key: torch.cat([one[key] for one in alone]) for key in alone[0]}
                assert close(model.features(images, mask=mask), expected)
                assert torch.allclose(model(images, mask=mask), expected["cls4k"], atol=1e-5)


def test_a_masked_patch_is_neither_computed_nor_attended_to() -> None:
    model, images = small(), torch.randn(1, 3, 512, 768)
    mask = torch.tensor([[[True, False, True], [True, True, False]]])
    seen_by_patch_vit = []
    model.model256.register_forward_pre_hook(lambda _, inputs: seen_by_patch_vit.append(len(inputs[0])))
    with torch.no_grad():
        everything, features = model.features(images), model.features(images, mask=mask)
        expected = model.model4k(everything["cls256"].mT.reshape(1, 32, 2, 3), mask=mask)
    assert seen_by_patch_vit == [6, 4]
    assert torch.allclose(features["cls4k"], expected, atol=1e-5)
    assert not torch.allclose(features["cls4k"], everything["cls4k"], atol=1e-3)
    kept = everything["cls256"] * mask.flatten(1).unsqueeze(-1)
    assert torch.allclose(features["cls256"], kept, atol=1e-5)
    assert torch.allclose(features["mean256"], kept.sum(dim=1) / 4, atol=1e-5)


def test_a_mask_of_tokens_hides_parts_of_patches() -> None:
    model, images = small(), torch.randn(1, 3, 256, 512)
    tokens = torch.ones(1, 16, 32, dtype=torch.bool)
    tokens[0, :, 5:16] = False  # of the first patch
    tokens[0, :10, 16:] = False  # of the second
    with torch.no_grad():
        found = model.features(images, mask=tokens)["cls256"][0]
        parts = [model.model256(images[..., s], mask=tokens[..., t]) for s, t in PATCHES_AND_TOKENS]
        assert torch.allclose(found, torch.cat(parts), atol=1e-5)
        tokens[0, :, :16] = False
        features = model.features(images, mask=tokens)
        assert close(features, model.features(images, mask=tokens.view(1, 1, 16, 2, 16).any(dim=(2, 4)))) is False
    assert bool((features["cls256"][0, 0] == 0).all())
    assert torch.allclose(features["cls256"][0, 1], parts[1], atol=1e-5)


PATCHES_AND_TOKENS = ((slice(0, 256), slice(0, 16)), (slice(256, 512), slice(16, 32)))


def test_a_region_without_anything_to_see_has_finite_features_and_gradients() -> None:
    model, images = small(), torch.randn(2, 3, 256, 512)
    features = model.features(images, mask=torch.tensor([[[True, True]], [[False, False]]]))
    assert bool((features["mean256"][1] == 0).all())
    assert all(bool(value.isfinite().all()) for value in features.values())
    nothing = model.features(images, mask=torch.zeros(2, 1, 2, dtype=torch.bool))
    assert torch.allclose(nothing["cls4k"][1], features["cls4k"][1], atol=1e-6)
    (features["cls4k"].sum() + features["mean256"].sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_two_vits_work_on_a_device_each() -> None:
    model = small().split("cpu", "meta")
    features = model.features(torch.randn(1, 3, 256, 512))
    assert {value.device.type for value in features.values()} == {"meta"}
    assert features["cls4k"].shape == (1, 32)
    assert model.model256.cls_token.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_what_one_cpu_gives() -> None:
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        expected = small().features(images)
        found = small().split("cuda:0", "cuda:1").features(images)
    assert close({key: value.cpu() for key, value in found.items()}, expected, atol=1e-3)


def test_bf16_keeps_the_direction_of_every_feature() -> None:
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        exact, rough = build().features(images), build(bf16=True).features(images)
    for key, value in exact.items():
        assert rough[key].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(value, rough[key], dim=-1).min() > 0.999
        assert not torch.equal(value, rough[key])


def test_one_position_rule_goes_to_both_vits() -> None:
    model = build(**SMALL, pos_interpolation="recomputed")
    assert model.model256.pos_interpolation == model.model4k.pos_interpolation == "recomputed"
    assert build(**SMALL).model4k.pos_interpolation == "given"


def test_wrong_inputs_are_refused_with_what_was_found() -> None:
    model = build(**SMALL)
    with pytest.raises(ValueError, match=r"of 256 px or more: found \[1, 3, 255, 512\]"):
        model(torch.zeros(1, 3, 255, 512))
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] \(patches\) or \[1, 32, 48\] \(tokens.*found \[1, 3, 2\]"):
        model(torch.zeros(1, 3, 512, 768), mask=torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match=r"region.in_dim must be the width .*found 384 and 192"):
        build(patch={"variant": "tiny"})
