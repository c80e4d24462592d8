"""ViTTM-HMR: the original to the last digit, and the repaired default free of the original's defects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_model
from models.config import ViTTMHMRConfig
from models.objectives.hmr import masked_targets, masked_tokens
from models.vittm_hmr import HMRBlock, LinearCrossAttention, ViTTMHMR

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


def largest_error(found: Tensor, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max())


def key_shapes(model: torch.nn.Module) -> list[tuple[str, list[int]]]:
    return [(key, list(value.shape)) for key, value in model.state_dict().items()]


def test_original_has_the_published_keys_in_their_order(vittm_parity: Any) -> None:
    keys = vittm_parity.keys("hmr")
    full = build(preset="original")
    assert key_shapes(full) == list(keys["hmr_full"].items())
    assert key_shapes(build(preset="original", **TINY)) == list(keys["hmr_tiny"].items())


def test_original_has_32_46_million_parameters() -> None:
    with torch.device("meta"):
        model = ViTTMHMR(ViTTMHMRConfig(preset="original"))
    assert sum(p.numel() for p in model.parameters()) == 32_460_672


def test_pieces_match_the_published_code(vittm_parity: Any) -> None:
    expected = vittm_parity.arrays("hmr_pieces")
    attention = LinearCrossAttention(64, 4)
    vittm_parity.fill(attention, "lca.")
    query, source = vittm_parity.input("lca/q", 2, 5, 64), vittm_parity.input("lca/kv", 2, 11, 64)
    assert largest_error(attention(query, source), expected["lca_out"]) < TOLERANCE

    block = HMRBlock(64, 4)
    vittm_parity.fill(block, "blk.")
    process, memory = vittm_parity.input("blk/proc", 2, 16, 64), vittm_parity.input("blk/mem", 2, 32, 64)
    process, memory = block(process, memory)
    assert largest_error(process, expected["blk_proc"]) < TOLERANCE
    assert largest_error(memory, expected["blk_mem"]) < TOLERANCE


def test_whole_model_matches_the_published_code_forward_and_backward(vittm_parity: Any) -> None:
    expected = vittm_parity.arrays("hmr_tiny")
    model = build(preset="original", **TINY).eval()
    vittm_parity.fill(model)
    images = vittm_parity.input("tiny/image", 2, 3, 128, 128)
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


def test_the_loss_can_count_visible_positions_too() -> None:
    images, noise = stained(2, 64), torch.rand(2, 16)
    out = build(loss_on="all", **SMALL).eval()(images, noise=noise)
    cosine = torch.nn.functional.cosine_similarity(out["prediction"], out["target"], dim=-1)
    assert out["loss"].item() == pytest.approx(-cosine.mean().item(), abs=1e-6)
    hidden = build(**SMALL).eval()(images, noise=noise)
    assert torch.equal(hidden["prediction"], out["prediction"])
    assert abs(hidden["loss"].item() - out["loss"].item()) > 1e-4
    assert hidden["constant_cosine"] != out["constant_cosine"]


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


# Memory from the image, and the teacher ------------------------------------------------------------------------------


def test_memory_of_the_image_shows_nothing_that_is_hidden() -> None:
    model = build(memory="image", **SMALL).eval()
    images, noise = stained(2, 64), torch.rand(2, 16)
    hidden = masked_tokens(noise, 0.75)
    pixels = torch.nn.functional.interpolate(hidden.view(2, 1, 4, 4).float(), size=64).bool()
    other = torch.where(pixels, torch.randn(2, 3, 64, 64), images)
    first, second = model(images, noise=noise)["prediction"], model(other, noise=noise)["prediction"]
    assert torch.equal(first, second)
    assert not torch.allclose(first, model(torch.where(pixels, images, other + 1), noise=noise)["prediction"])


def test_memory_of_the_image_gives_features_the_full_resolution() -> None:
    checker = (torch.arange(64)[:, None] + torch.arange(64)[None]) % 2 * 2.0 - 1.0  # mean 0 in every 2 x 2
    images = stained(1, 64)
    for memory, sees_it in (("bank", False), ("image", True)):
        model = build(memory=memory, **SMALL).eval()
        same = torch.allclose(model.features(images), model.features(images + checker), atol=1e-5)
        assert same is not sees_it


def test_a_new_teacher_is_the_student_and_gives_one_token_per_target() -> None:
    model = build(target="ema", target_norm="none", memory="image", **SMALL)
    images = stained(2, 64)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in model.teacher.named_parameters())
    target = model(images)["target"]
    assert target.shape == (2, 64, 32)
    assert torch.allclose(target, model.fine_tokens(images), atol=1e-6)
    with torch.no_grad():
        model.norm.weight.mul_(2.0)
    assert not torch.allclose(target, model.fine_tokens(images), atol=0.1)
    assert torch.allclose(target, model(images)["target"], atol=1e-6)


def test_the_teacher_reads_the_memory_patch_in_its_place() -> None:
    model = build(target="ema", target_norm="none", **SMALL).eval()
    images = stained(1, 64)
    changed = images.clone()
    changed[:, :, 8:16, 24:32] += 1.0  # row 1, column 3 of 8 x 8 memory patches
    moved = (model(images)["target"] - model(changed)["target"]).norm(dim=-1)[0]
    assert int(moved.argmax()) == 8 + 3


def test_the_teacher_follows_along_half_a_cosine() -> None:
    model = build(target="ema", ema_momentum=0.9, **SMALL)
    before = model.teacher.norm.weight.clone()
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    model.after_step(3, 4)
    share = 0.1 * (np.cos(np.pi * 3 / 4) + 1) / 2
    assert torch.allclose(model.teacher.norm.weight, before + share, atol=1e-7)
    model.after_step(4, 4)
    assert torch.allclose(model.teacher.norm.weight, before + share, atol=1e-7)


def test_a_model_without_a_teacher_stays_as_it_is_after_a_step() -> None:
    model = build(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.after_step(1, 10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
