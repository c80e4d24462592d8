"""ViTTM-HMR: the original to the last digit, and the repaired default free of the original's defects."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_model
from models.config import ViTTMHMRConfig
from models.objectives.hmr import (
    constant_cosine,
    masked_targets,
    masked_tokens,
    negative_cosine,
    normalise_targets,
    pixel_targets,
)
from models.vittm_hmr import HMRBlock, LinearCrossAttention, ViTTMHMR

PARITY = Path(__file__).parents[2] / "../shared/parity"
TINY: dict[str, Any] = {"img_size": 128, "memory_patch": 8, "process_patch": 32, "dim": 64, "depth": 2, "heads": 4}
SMALL: dict[str, Any] = {"img_size": 64, "memory_patch": 8, "process_patch": 16, "dim": 32, "depth": 2, "heads": 4}
TOLERANCE = 1e-5  # the published numbers are given to 1e-4


def build(seed: int = 0, **config: Any) -> ViTTMHMR:
    torch.manual_seed(seed)
    model = build_model("vittm_hmr", **config)
    assert isinstance(model, ViTTMHMR)
    return model


def stained(batch: int, side: int, seed: int = 0) -> Tensor:
    """Smooth pink images with darker spots, normalised: [B, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 1, side // 8, side // 8, generator=generator)
    tissue = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    stain = torch.tensor([-0.4, -0.9, -0.3]).view(1, 3, 1, 1) * (
        1 + 0.3 * torch.randn(batch, 1, 1, 1, generator=generator)
    )
    return (
        torch.tensor([1.4, 0.5, 1.2]).view(1, 3, 1, 1)
        + stain * tissue
        + 0.05 * torch.randn(batch, 3, side, side, generator=generator)
    )


# The published model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity() -> Any:
    if not PARITY.is_dir():
        pytest.skip(f"no published numbers at {PARITY}")
    spec = importlib.util.spec_from_file_location("fill_vittm", PARITY / "fill_vittm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(model: torch.nn.Module, param: Callable[..., np.ndarray], prefix: str = "") -> None:
    model.load_state_dict({k: torch.from_numpy(param(prefix + k, v.shape)) for k, v in model.state_dict().items()})


def largest_error(found: Tensor, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max())


def key_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def test_original_has_the_published_keys_and_size(parity: Any) -> None:
    keys = json.loads((PARITY / "keys_hmr.json").read_text())
    full = build(preset="original")
    assert key_shapes(full) == keys["hmr_full"]
    assert key_shapes(build(preset="original", **TINY)) == keys["hmr_tiny"]


def test_original_has_32_46_million_parameters() -> None:
    with torch.device("meta"):
        model = ViTTMHMR(ViTTMHMRConfig(preset="original"))
    assert sum(p.numel() for p in model.parameters()) == 32_460_672


def test_pieces_match_the_published_code(parity: Any) -> None:
    expected = np.load(PARITY / "hmr_pieces.npz")
    attention = LinearCrossAttention(64, 4)
    fill(attention, parity.param, "lca.")
    query, source = (torch.from_numpy(parity.inp(n, s)) for n, s in (("lca/q", (2, 5, 64)), ("lca/kv", (2, 11, 64))))
    assert largest_error(attention(query, source), expected["lca_out"]) < TOLERANCE

    block = HMRBlock(64, 4)
    fill(block, parity.param, "blk.")
    process, memory = (torch.from_numpy(parity.inp(f"blk/{n}", (2, t, 64))) for n, t in (("proc", 16), ("mem", 32)))
    process, memory = block(process, memory)
    assert largest_error(process, expected["blk_proc"]) < TOLERANCE
    assert largest_error(memory, expected["blk_mem"]) < TOLERANCE


def test_whole_model_matches_the_published_code_forward_and_backward(parity: Any) -> None:
    expected = np.load(PARITY / "hmr_tiny.npz")
    model = build(preset="original", **TINY).eval()
    fill(model, parity.param)
    images = torch.from_numpy(parity.inp("tiny/image", (2, 3, 128, 128)))
    noise = torch.from_numpy(expected["noise"])
    for ratio, tag in ((0.0, "m0"), (0.75, "m75")):
        out = model(images, mask_ratio=ratio, noise=noise)
        assert largest_error(out["loss"], expected[f"loss_{tag}"]) < TOLERANCE
        assert largest_error(out["prediction"], expected[f"pred_{tag}"]) < TOLERANCE
        assert largest_error(out["target"], expected["target"]) < TOLERANCE
    assert largest_error(model.features(images), expected["probe_feat"]) < TOLERANCE

    out["loss"].backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert sorted(gradients) == sorted(map(str, expected["grad_keys"]))
    for key, norm in zip(map(str, expected["grad_keys"]), expected["grad_l2_m75"], strict=True):
        gradient = gradients[key]
        if np.isnan(norm):
            assert gradient is None, key
        else:
            assert gradient is not None, key
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), key


# Where original and repaired differ ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "identical"), [("original", True), ("repaired", False)])
def test_hidden_tokens_know_their_position_only_when_repaired(preset: str, identical: bool) -> None:
    model = build(preset=preset, **SMALL).eval()
    noise = torch.rand(2, model.config.num_process)
    with torch.no_grad():
        tokens = model._encode(stained(2, 64), masked_tokens(noise, 0.75))
    hidden = tokens[0][masked_tokens(noise, 0.75)[0]]
    assert len(hidden) == 12
    spread = float((hidden - hidden[0]).abs().max())
    assert (spread < 1e-5) is identical, spread


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("target", ["random_projection", "pixels"])
def test_every_trainable_parameter_of_the_repaired_model_gets_a_gradient(target: str, mask_ratio: float) -> None:
    model = build(target=target, **SMALL)
    model(stained(4, 64), mask_ratio=mask_ratio)["loss"].backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == (["target_embed.weight"] if target == "random_projection" else [])
    if mask_ratio:
        unmoved = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
        assert unmoved == []


def test_original_leaves_the_last_write_without_a_gradient() -> None:
    model = build(preset="original", **SMALL)
    model(stained(2, 64))["loss"].backward()
    dead = {key.rpartition(".")[0] for key, p in model.named_parameters() if p.grad is None}
    assert {"target_embed", "blocks.1.norm_write", "blocks.1.mlp_memory.0"} <= dead


def test_repaired_scores_hidden_positions_only() -> None:
    model = build(**SMALL).eval()
    images, noise = stained(2, 64), torch.rand(2, 16)
    hidden = masked_targets(masked_tokens(noise, 0.75), 2)
    out = model(images, noise=noise)
    cosine = torch.nn.functional.cosine_similarity(out["prediction"], out["target"], dim=-1)
    assert out["loss"].item() == pytest.approx(-cosine[hidden].mean().item(), abs=1e-6)
    out = model(images, noise=noise, mask_ratio=0.0)
    cosine = torch.nn.functional.cosine_similarity(out["prediction"], out["target"], dim=-1)
    assert out["loss"].item() == pytest.approx(-cosine.mean().item(), abs=1e-6)


def test_a_constant_scores_well_on_original_targets_and_badly_on_repaired_ones() -> None:
    images = stained(8, 64)
    assert build(preset="original", **SMALL)(images)["constant_cosine"] > 0.9
    out = build(**SMALL)(images)
    assert out["constant_cosine"] < 0.3
    assert out["constant_cosine"] <= out["image_constant_cosine"] <= 1.0


def test_repaired_process_tokens_see_a_low_resolution_view() -> None:
    model = build(**SMALL).eval()
    images = stained(1, 64)
    checker = (torch.arange(64)[:, None] + torch.arange(64)[None]) % 2 * 2.0 - 1.0  # mean 0 in every 2 x 2
    checker[:, 32:] = 0.0
    assert model.process_embed.weight.shape[-2:] == (8, 8)
    assert torch.allclose(model.features(images), model.features(images + checker), atol=1e-5)
    target, detailed = (model(x)["target"] for x in (images, images + checker))
    assert not torch.allclose(target, detailed, atol=0.1)


# The repaired model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("img_size", "memory_patch", "process_patch"),
    [(224, 16, 32), (128, 8, 32), (256, 16, 64), (96, 32, 32), (64, 4, 16)],
)
def test_shapes_follow_the_sizes(img_size: int, memory_patch: int, process_patch: int) -> None:
    sizes = {"img_size": img_size, "memory_patch": memory_patch, "process_patch": process_patch}
    model = build(dim=32, depth=1, heads=2, **sizes)
    images = stained(2, img_size)
    out = model(images)
    num_targets = (img_size // memory_patch) ** 2
    assert out["loss"].shape == ()
    assert out["prediction"].shape == out["target"].shape == (2, num_targets, 32)
    assert out["target"].dtype == out["prediction"].dtype == torch.float32
    assert not out["target"].requires_grad
    assert model.features(images).shape == (2, 32)
    assert model.memory_bank.shape == (1, num_targets, 32)


def test_loss_falls_well_below_every_constant_on_a_small_batch() -> None:
    model = build(**SMALL)
    images, noise = stained(8, 64), torch.rand(8, 16)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for _ in range(60):
        out = model(images, noise=noise)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(out["loss"].item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert -losses[-1] > out["constant_cosine"] + 0.2
    assert -losses[-1] > out["image_constant_cosine"]


def test_same_noise_gives_the_same_numbers_and_other_noise_others() -> None:
    model = build(**SMALL)
    images, noise = stained(2, 64), torch.rand(2, 16)
    first, second = model(images, noise=noise), model(images, noise=noise)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["prediction"], model(images, noise=1 - noise)["prediction"])
    torch.manual_seed(3)
    drawn = torch.rand(2, 16)
    torch.manual_seed(3)
    assert torch.equal(model(images)["loss"], model(images, noise=drawn)["loss"])


@pytest.mark.parametrize("preset", ["repaired", "original"])
def test_bf16_autocast_stays_close_to_float32(preset: str) -> None:
    model = build(preset=preset, **SMALL)
    images, noise = stained(4, 64), torch.rand(4, 16)
    exact = model(images, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images, noise=noise)
    assert rough["loss"].dtype == rough["prediction"].dtype == torch.float32
    assert torch.equal(rough["target"], exact["target"])
    assert rough["loss"].item() == pytest.approx(exact["loss"].item(), abs=5e-3)
    rough["loss"].backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_wrong_inputs_are_refused_with_what_was_found() -> None:
    model = build(**SMALL)
    with pytest.raises(ValueError, match=r"shape \[B, 3, 64, 64\] \(img_size\): found \[2, 3, 32, 32\]"):
        model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"found \[3, 64, 64\]"):
        model.features(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 16\).*found \(2, 9\)"):
        model(torch.zeros(2, 3, 64, 64), noise=torch.rand(2, 9))
    for ratio, sentence in ((1.0, r"in \[0, 1\): found 1.0"), (-0.1, "found -0.1"), (0.99, "none of 16 .* visible")):
        with pytest.raises(ValueError, match=sentence):
            model(torch.zeros(2, 3, 64, 64), mask_ratio=ratio)


# The objective, by hand ----------------------------------------------------------------------------------------------


def test_the_tokens_of_smallest_noise_stay_visible() -> None:
    hidden = masked_tokens(torch.tensor([[0.4, 0.1, 0.3, 0.2]]), 0.5)
    assert hidden.tolist() == [[True, False, True, False]]


def test_a_hidden_token_hides_the_memory_patches_it_covers() -> None:
    grid = masked_targets(torch.tensor([[True, False, False, True]]), 2).view(4, 4)
    assert grid.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_pixel_targets_are_row_major_patches() -> None:
    image = torch.arange(3 * 4 * 4.0).view(1, 3, 4, 4)
    patches = pixel_targets(image, 2)
    assert patches.shape == (1, 4, 12)
    assert patches[0, 1].tolist() == image[0, :, :2, 2:].flatten().tolist()


@pytest.mark.parametrize(("over", "axis"), [("batch", (0, 1)), ("image", (1,)), ("patch", (2,))])
def test_normalised_targets_are_centred_and_scaled_over_the_named_axis(over: Any, axis: tuple[int, ...]) -> None:
    target = normalise_targets(3 + 2 * torch.randn(4, 9, 16), over)
    assert torch.allclose(target.mean(dim=axis), torch.zeros(()), atol=1e-5)
    assert torch.allclose(target.square().mean(dim=axis), torch.ones(()), atol=1e-4)


def test_constant_cosine_is_what_the_best_constant_scores() -> None:
    torch.manual_seed(0)
    target = torch.randn(3, 8, 5) + 0.5
    where = masked_tokens(torch.rand(3, 8), 0.5)
    best = torch.nn.functional.normalize(target, dim=-1)[where].mean(dim=0)
    scored = -negative_cosine(best.expand_as(target), target, where)
    assert torch.allclose(constant_cosine(target, where), scored, atol=1e-6)
    others = [-negative_cosine(torch.randn(5).expand_as(target), target, where) for _ in range(50)]
    assert max(others) < scored
    assert constant_cosine(target, where, per="image") > scored
