from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.augment import AUGMENT_DRAWS, Augment, Changes, draw_changes
from engine.data.draws import uniforms
from engine.data.finish import changes_of, empty_images, finish
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, CropView

EVERYTHING = Augment(jitter=0.8, grey=0.2, stain=0.5, blur=0.5, solarise=0.3, stain_sigma=0.2)


def drawn(augment: Augment | None, count: int, output: str = "float32", seed: int = 5) -> Changes:
    draws = uniforms(seed, np.arange(count), 0, AUGMENT_DRAWS)
    return draw_changes(augment, draws, normalise=output != "uint8", mean=IMAGENET_MEAN, std=IMAGENET_STD)


def crops(count: int, size_px: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size_px, size_px, 3)).astype(np.uint8))


def finished(pixels: torch.Tensor, changes: Changes, output: Any = "float32", **options: Any) -> torch.Tensor:
    images = empty_images(CropView(pixels.shape[1], output=output, **options), len(pixels))
    finish(pixels, changes, images)
    return images


def spelled_out(augment: Augment, pixels: Any, draws: Any) -> Any:
    """One crop, float64[3, S, S] in 0..1, step by step; the order and the constants are those of the docstrings."""
    luma = np.array([0.299, 0.587, 0.114])
    around = 2 * draws - 1
    values = pixels.astype(np.float64)
    if draws[6] < augment.stain:
        stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
        amounts = -np.log((values + 1) / 256) @ np.linalg.inv(stains)
        amounts = amounts * (1 + augment.stain_sigma * around[[7, 9, 11]]) + augment.stain_sigma * around[[8, 10, 12]]
        values = np.clip(256 * np.exp(-amounts @ stains) - 1, 0, 255)
    values /= 255
    if draws[0] < augment.jitter:
        values = values * (1 + augment.brightness * around[1])
        contrast = 1 + augment.contrast * around[2]
        values = values * contrast + (1 - contrast) * (luma @ IMAGENET_MEAN)
        grey = (values @ luma)[..., None]
        values = grey + (1 + augment.saturation * around[3]) * (values - grey)
        yiq = np.array([luma, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
        parts = values @ yiq.T
        angle = 2 * np.pi * augment.hue * around[4]
        chroma = (parts[..., 1] + 1j * parts[..., 2]) * np.exp(1j * angle)
        values = np.stack([parts[..., 0], chroma.real, chroma.imag], axis=-1) @ np.linalg.inv(yiq).T
    if draws[5] < augment.grey:
        values = np.repeat((values @ luma)[..., None], 3, axis=-1)
    values = np.clip(values, 0, 1).transpose(2, 0, 1)
    if draws[13] < augment.blur:
        low, high = augment.blur_sigma_px
        sigma, radius = low + draws[14] * (high - low), augment.blur_radius_px
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        for axis in (1, 2):
            padded = np.pad(values, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="reflect")
            values = np.apply_along_axis(np.convolve, axis, padded, kernel, "valid")
    if draws[15] < augment.solarise:
        values = np.where(values >= 0.5, 1 - values, values)
    return values


@pytest.mark.parametrize(
    "augment",
    [
        Augment(jitter=1.0),
        Augment(grey=0.5),
        Augment(stain=0.7, stain_sigma=0.2),
        Augment(blur=0.7),
        Augment(solarise=0.5),
        EVERYTHING,
    ],
    ids=["jitter", "grey", "stain", "blur", "solarise", "everything"],
)
def test_values_are_what_the_steps_give_one_by_one(augment: Augment) -> None:
    pixels, draws = crops(24), uniforms(5, np.arange(24), 0, AUGMENT_DRAWS)
    expected = np.stack([spelled_out(augment, crop.numpy(), one) for crop, one in zip(pixels, draws, strict=True)])
    mean, std = (np.array(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    floats = finished(pixels, drawn(augment, 24)).numpy()
    assert np.abs(floats - (expected - mean) / std).max() < 1e-4
    halves = finished(pixels, drawn(augment, 24, "float16"), "float16")
    assert halves.dtype == torch.float16
    assert np.abs(halves.float().numpy() - (expected - mean) / std).max() < 3e-3
    levels = finished(pixels, drawn(augment, 24, "uint8"), "uint8").numpy()
    assert levels.dtype == np.uint8
    assert np.abs(levels - 255 * expected).max() < 0.51
    assert np.abs(levels - pixels.permute(0, 3, 1, 2).numpy().astype(int)).mean() > 1  # it does something


@pytest.mark.parametrize("output", ["uint8", "float16", "float32"])
def test_what_is_off_changes_nothing(output: Any) -> None:
    pixels = crops(5)
    plain = finished(pixels, drawn(None, 5, output), output)
    assert torch.equal(finished(pixels, drawn(Augment(), 5, output), output), plain)
    never = Augment(jitter=1e-12, grey=1e-12, stain=1e-12, blur=1e-12, solarise=1e-12)
    assert torch.equal(finished(pixels, drawn(never, 5, output), output), plain)
    if output == "uint8":
        assert torch.equal(plain, pixels.permute(0, 3, 1, 2))


def test_each_augmentation_is_as_frequent_as_asked_for() -> None:
    changes = drawn(Augment(jitter=0.8, stain=0.3, blur=0.5, solarise=0.2), 4000, "uint8")
    assert changes.matrix is not None
    assert changes.stain is not None
    assert changes.blur is not None
    assert changes.solarise is not None
    jittered = (changes.matrix != np.eye(3, 4)).any(axis=(1, 2))
    stained, blurred = ~np.isnan(changes.stain[:, 0, 0]), changes.blur[:, 0] < 1
    for happens, share in ((jittered, 0.8), (stained, 0.3), (blurred, 0.5), (changes.solarise, 0.2)):
        assert happens.mean() == pytest.approx(share, abs=0.03)
    assert np.abs(np.corrcoef([jittered, stained, blurred, changes.solarise]) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("output", ["uint8", "float32"])
def test_a_crop_comes_out_the_same_alone_and_in_a_batch(output: Any) -> None:
    pixels, changes = crops(11), drawn(EVERYTHING, 11, output)
    together = finished(pixels, changes, output)
    for index in range(11):
        alone = finished(pixels[index : index + 1], changes_of(changes, slice(index, index + 1)), output)
        assert torch.equal(alone[0], together[index])
    later = draw_changes(
        EVERYTHING,
        uniforms(5, np.arange(7, 11), 0, AUGMENT_DRAWS),
        normalise=output != "uint8",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    assert np.array_equal(later.matrix, changes.matrix[7:])  # type: ignore[index, arg-type]
    assert np.array_equal(later.stain, changes.stain[7:], equal_nan=True)  # type: ignore[index, arg-type]
    assert np.array_equal(later.blur, changes.blur[7:])  # type: ignore[index, arg-type]


@pytest.mark.parametrize("output", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_order_in_memory_is_as_asked_for_and_changes_no_value(output: Any, channels_last: bool) -> None:
    pixels, changes = crops(3), drawn(EVERYTHING, 3, output)
    images = finished(pixels, changes, output, channels_last=channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(images, finished(pixels, changes, output))


def test_hue_turns_colours_and_leaves_grey_alone() -> None:
    turned = Augment(jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0.1)
    draws = np.zeros((1, AUGMENT_DRAWS))
    draws[0, 4] = 1 - 1e-9  # a tenth of a turn
    changes = draw_changes(turned, draws, normalise=False, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert changes.matrix is not None
    for grey in (0, 100, 255):
        assert changes.matrix[0, :, :3] @ np.full(3, grey) + changes.matrix[0, :, 3] == pytest.approx(grey, abs=0.01)
    before = np.array([160.0, 120.0, 150.0])
    after = changes.matrix[0, :, :3] @ before
    hues = [colorsys.rgb_to_hsv(*(colour / 255))[0] for colour in (before, after)]
    assert 0.05 < abs(hues[1] - hues[0]) % 1 < 0.95
    assert after @ [0.299, 0.587, 0.114] == pytest.approx(before @ [0.299, 0.587, 0.114], abs=0.01)


def test_more_haematoxylin_is_darker_and_glass_stays_white() -> None:
    draws = np.full((1, AUGMENT_DRAWS), 0.5)  # no change of any amount
    draws[0, 6:8] = 0, 1 - 1e-9  # but of haematoxylin's
    changes = draw_changes(
        Augment(stain=1.0, stain_sigma=0.3), draws, normalise=False, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    nucleus = np.rint(256 * np.exp(-np.array([0.65, 0.70, 0.29])) - 1).astype(np.uint8)
    pixels = torch.from_numpy(np.stack([np.full((1, 1, 3), 255, np.uint8), nucleus[None, None]]))
    changes = changes._replace(matrix=np.repeat(changes.matrix, 2, 0), stain=np.repeat(changes.stain, 2, 0))  # type: ignore[arg-type]
    glass, stained = finished(pixels, changes, "uint8")[:, :, 0, 0].int().tolist()
    assert glass == [255, 255, 255]
    expected = 256 * np.exp(-1.3 * np.array([0.65, 0.70, 0.29])) - 1
    assert np.abs(np.array(stained) - expected).max() < 2


def test_impossible_settings_are_refused() -> None:
    for wrong, match in (
        ({"jitter": 1.1}, "jitter"),
        ({"blur": -0.1}, "blur"),
        ({"hue": 0.6}, "hue"),
        ({"brightness": 1.5}, "brightness"),
        ({"blur_sigma_px": (2.0, 1.0)}, "blur_sigma_px"),
    ):
        with pytest.raises(ValueError, match=match):
            Augment(**wrong)
    with pytest.raises(ValueError, match="reaches 4 px, too far for crops of 4 px"):
        CropView(4, augment=Augment(blur=0.5))
