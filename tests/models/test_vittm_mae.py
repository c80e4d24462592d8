"""ViTTM as a masked autoencoder: nothing hidden is seen, everything hidden is scored, by either stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import build_model
from models.config import resolve_config
from models.objectives.hmr import normalise_targets, pixel_targets
from models.vittm_mae import ViTTMMAE

SMALL: dict[str, Any] = {
    **{"img_size": 64, "memory_patch": 8, "process_patch": 16, "dim": 32, "depth": 2, "heads": 2},
    **{"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
}


def build(seed: int = 0, **config: Any) -> ViTTMMAE:
    torch.manual_seed(seed)
    model = build_model("vittm_mae", **SMALL, **config)
    assert isinstance(model, ViTTMMAE)
    return model


def hidden_pixels(mask: torch.Tensor, side: int) -> torch.Tensor:
    """A mask of patches [B, T] as one of pixels [B, 1, side, side]."""
    grid = round(mask.shape[1] ** 0.5)
    return torch.nn.functional.interpolate(mask.view(-1, 1, grid, grid).float(), size=side).bool()


def test_shapes_follow_the_streams() -> None:
    model = build()
    out = model(torch.randn(2, 3, 64, 64))
    assert out["memory_prediction"].shape == out["memory_target"].shape == (2, 64, 192)
    assert out["process_prediction"].shape == out["process_target"].shape == (2, 16, 768)
    assert {name for name, value in out.items() if value.ndim == 0} == {
        "loss",
        "memory_loss",
        "process_loss",
        "constant_loss",
    }
    assert not any(out[f"{stream}_target"].requires_grad for stream in ("memory", "process"))
    assert model.features(torch.randn(2, 3, 64, 64)).shape == (2, 32)


def test_aligned_masks_hide_the_same_places_and_neither_stream_sees_them() -> None:
    model = build().eval()
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    (process, process_kept), (memory, memory_kept) = (model._hidden(noise, 0.75)[s] for s in ("process", "memory"))
    assert (process_kept, memory_kept) == (4, 16)
    assert torch.equal(hidden_pixels(process, 64), hidden_pixels(memory, 64))
    other = torch.where(hidden_pixels(process, 64), torch.randn(2, 3, 64, 64), images)
    first, second = model(images, noise=noise), model(other, noise=noise)
    for stream in ("memory", "process"):
        assert torch.equal(first[f"{stream}_prediction"], second[f"{stream}_prediction"])
        assert not torch.equal(first[f"{stream}_target"], second[f"{stream}_target"])


def test_independent_masks_take_noise_for_the_process_stream_and_then_for_memory() -> None:
    model = build(mask="independent")
    noise = torch.rand(2, 16 + 64)
    hidden = model._hidden(noise, 0.75)
    for stream, part, kept in (("process", noise[:, :16], 4), ("memory", noise[:, 16:], 16)):
        threshold = part.sort(dim=1).values[:, kept - 1 : kept]
        assert hidden[stream][1] == kept
        assert torch.equal(hidden[stream][0], part > threshold)


@pytest.mark.parametrize(("mask", "other", "numbers"), [("process", "memory", 16), ("memory", "process", 64)])
def test_a_mask_of_one_stream_leaves_the_other_whole(mask: str, other: str, numbers: int) -> None:
    model = build(mask=mask)
    assert model.config.num_noise == numbers
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, numbers)
    hidden = model._hidden(noise, 0.75)
    assert hidden[mask][0].sum().item() == 2 * numbers * 3 // 4
    assert not hidden[other][0].any()
    out = model(images, noise=noise)
    error = (out[f"{other}_prediction"] - out[f"{other}_target"]).square().mean()
    assert torch.allclose(out[f"{other}_loss"], error, atol=1e-6)
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_loss_counts_hidden_patches_alone_and_adds_the_streams() -> None:
    model = build().eval()
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    out, hidden = model(images, noise=noise), model._hidden(noise, 0.75)
    constant = 0.0
    for stream, patch in (("memory", 8), ("process", 16)):
        where = hidden[stream][0]
        target = normalise_targets(pixel_targets(images, patch), "patch")
        assert torch.equal(out[f"{stream}_target"], target)
        squares = (out[f"{stream}_prediction"] - target)[where].square()
        assert torch.allclose(out[f"{stream}_loss"], squares.mean(), atol=1e-6)
        constant += target[where].var(dim=0, correction=0).mean().item()
    assert out["loss"].item() == pytest.approx((out["memory_loss"] + out["process_loss"]).item())
    assert out["constant_loss"].item() == pytest.approx(constant, rel=1e-5)


def test_without_a_mask_every_patch_is_seen_and_scored() -> None:
    model = build().eval()
    images = torch.randn(2, 3, 64, 64)
    out = model(images, mask_ratio=0.0)
    memory, process = model.tokens(images)
    every = torch.arange(64).expand(2, -1)
    assert torch.allclose(out["memory_prediction"], model.memory_decoder(model.memory_norm(memory), every), atol=1e-5)
    assert torch.allclose(out["process_prediction"], model.process_decoder(process, every[:, :16]), atol=1e-5)
    assert torch.allclose(
        out["memory_loss"], (out["memory_prediction"] - out["memory_target"]).square().mean(), atol=1e-6
    )


def test_the_decoders_tell_hidden_places_apart() -> None:
    model = build().eval()
    out = model(torch.randn(1, 3, 64, 64), noise=torch.arange(16.0)[None])
    hidden = out["process_prediction"][0, 4:]
    assert (hidden - hidden[0]).abs()[1:].amax(dim=1).min() > 1e-3


def test_loss_falls_below_the_best_constant_on_a_small_batch() -> None:
    model = build(target_norm="none")
    images, noise = torch.randn(4, 3, 1, 1).expand(-1, -1, 64, 64).contiguous(), torch.rand(4, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        out = model(images, noise=noise)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
    assert out["loss"].item() < 0.2 * out["constant_loss"].item()


def test_wrong_inputs_are_refused_with_what_was_found() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"shape \[B, 3, 64, 64\] \(img_size\): found \[2, 3, 32, 32\]"):
        model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 16\).*found \(2, 9\)"):
        model(torch.zeros(2, 3, 64, 64), noise=torch.rand(2, 9))
    with pytest.raises(ValueError, match=r"none of 16 .* visible"):
        model(torch.zeros(2, 3, 64, 64), mask_ratio=0.99)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"read_write": "tl"}, "read_write='tl' with fusion='add' needs every token.*take read_write lin"),
        ({"fusion": "add_erase"}, "fusion='add_erase' needs every token"),
        ({"memory_patch": 32, "process_patch": 28}, "multiple of memory_patch: found 28 and 32; take mask='independ"),
        ({"decoder_heads": 7}, "decoder_dim must be a multiple of decoder_heads: found 512 and 7"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_config("vittm_mae", settings)
