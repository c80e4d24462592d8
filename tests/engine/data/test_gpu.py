"""The loader on a GPU. Decoding there is close to the specification, not equal: nvJPEG has its own inverse DCT."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types

from engine.data import Augment, CropView, Ect, open_loader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch finds none on this machine"),
]

# Grey levels of 255. An inverse DCT in other arithmetic rounds differently by 1 or 2 per component, and colour
# conversion adds up to as much again: that is all there is at 4:4:4. Subsampled chroma of these noisy patches may be
# interpolated otherwise at a crop's edge, which is a small share of the pixels. A window that is shifted by one pixel,
# or chroma that is not interpolated at all, differs by more than 6 on average (measured with libjpeg).
MEAN_TOLERANCE = 1.5
MAX_TOLERANCE_444 = 8
FAR_SHARE = 0.05  # of values that differ by more than MAX_TOLERANCE_444


def open_both(dataset: Any, views: list[CropView], **options: Any) -> tuple[Any, Any]:
    """Open the loader on the GPU, and the specification on the CPU."""
    merged: dict[str, Any] = {"batch_size_per_rank": 8, "views": views} | options
    fast = open_loader(dataset.path, backend="dali", device="cuda", **merged)
    return fast, open_loader(dataset.path, backend="torch", device="cpu", **merged)


def assert_close(images: torch.Tensor, expected: torch.Tensor, rows: torch.Tensor) -> None:
    """Compare uint8 crops of the fixture's patches, of which every third row is stored as 4:4:4."""
    assert images.device.type == "cuda"
    assert images.dtype == expected.dtype == torch.uint8
    difference = (images.cpu().int() - expected.int()).abs()
    assert difference.float().mean() <= MEAN_TOLERANCE
    assert (difference > MAX_TOLERANCE_444).float().mean() <= FAR_SHARE
    full = difference[rows % 3 == 0]
    assert full.numel() == 0 or full.max() <= MAX_TOLERANCE_444


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("size_px", [64, 33, 96])
def test_dali_on_the_gpu_delivers_what_the_plain_loader_specifies(dataset: Any, flips: bool, size_px: int) -> None:
    fast, plain = open_both(dataset, [CropView(size_px, flips=flips, output="uint8")])
    with fast, plain:
        for _ in range(6):
            one, other = next(fast), next(plain)
            assert torch.equal(one.rows, other.rows)
            assert_close(one.images[0], other.images[0], other.rows)


def test_rgb_jpegs_with_adobes_marker_keep_their_colours(make_dataset: Any) -> None:
    # As they are copied from Aperio slides: three components that are no YCbCr, and an APP14 segment that says so.
    random = np.random.default_rng(0)
    payloads = []
    for _ in range(9):
        pixels = random.integers(0, 256, (12, 12, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        payloads.append(imagecodecs.jpeg8_encode(pixels, level=90, colorspace="RGB", outcolorspace="RGB"))
        assert b"Adobe" in payloads[-1][:64]
    made = make_dataset(payloads)
    fast, plain = open_both(made, [CropView(64, output="uint8")])
    with fast, plain:
        for _ in range(3):
            one, other = next(fast).images[0].cpu().int(), next(plain).images[0].int()
            assert (one - other).abs().float().mean() <= MEAN_TOLERANCE  # as YCbCr it would be tens
            assert (one - other).abs().max() <= MAX_TOLERANCE_444


def test_a_sample_is_the_same_at_any_place_of_any_batch(dataset: Any) -> None:
    views = [CropView(64, output="uint8")]
    options: dict[str, Any] = {"views": views, "backend": "dali", "device": "cuda"}
    with (
        open_loader(dataset.path, batch_size_per_rank=12, **options) as large,
        open_loader(dataset.path, batch_size_per_rank=3, **options) as small,
    ):
        for _ in range(4):
            together = torch.cat([next(small).images[0] for _ in range(4)])
            assert torch.equal(next(large).images[0], together)


def test_resume_delivers_the_identical_rest(dataset: Any) -> None:
    views = [CropView(64), CropView(48, rotations=True, ect=Ect(), augment=Augment(jitter=0.8, blur=0.5))]
    options: dict[str, Any] = {"batch_size_per_rank": 6, "views": views, "backend": "dali", "device": "cuda"}
    with open_loader(dataset.path, **options) as loader:
        for _ in range(3):
            next(loader)
        state = loader.state_dict()
        rest = [next(loader) for _ in range(4)]
    with open_loader(dataset.path, **options) as loader:
        loader.load_state_dict(state)
        for batch in rest:
            other = next(loader)
            assert torch.equal(batch.rows, other.rows)
            assert all(torch.equal(one, two) for one, two in zip(batch.images, other.images, strict=True))


@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_decoding_a_region_equals_decoding_all_and_cutting(dataset: Any, hw_decoder_load: float) -> None:
    """What `engine bench loader` chooses between may differ in speed alone."""
    jpegs = [np.frombuffer(data, np.uint8) for data in dataset.payloads[::3]]  # 4:4:4
    start, shape = np.array([17, 5], np.int32), np.array([48, 40], np.int32)
    options = {"device": "mixed", "hw_decoder_load": hw_decoder_load, "output_type": types.RGB}

    @pipeline_def
    def both() -> Any:
        encoded = fn.external_source(lambda: jpegs, dtype=types.UINT8, ndim=1)
        region = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="WH", **options)
        return region, fn.slice(fn.decoders.image(encoded, **options), start=start, shape=shape, axis_names="WH")

    pipeline = both(batch_size=len(jpegs), num_threads=2, device_id=0, exec_dynamic=True)
    region, cut = (output.as_cpu().as_array().astype(int) for output in pipeline.run())
    expected = np.stack([simplejpeg.decode_jpeg(data)[5:45, 17:65] for data in dataset.payloads[::3]]).astype(int)
    assert np.abs(region - cut).max() <= 4
    assert np.abs(region - expected).max() <= MAX_TOLERANCE_444


def test_floats_are_the_normalised_pixels(dataset: Any) -> None:
    fast, plain = open_both(dataset, [CropView(64), CropView(64, output="float16")])
    with fast, plain:
        for one, other in zip(next(fast).images, next(plain).images, strict=True):
            assert one.dtype == other.dtype
            # A grey level is 1 / 255 / 0.22, about 0.018.
            assert (one.cpu().float() - other.float()).abs().mean() <= 0.018 * MEAN_TOLERANCE


def test_the_plain_loader_moves_its_batches_to_the_gpu(dataset: Any) -> None:
    options: dict[str, Any] = {"batch_size_per_rank": 8, "views": [CropView(64), CropView(32, output="uint8")]}
    with (
        open_loader(dataset.path, backend="torch", device="cuda", **options) as there,
        open_loader(dataset.path, backend="torch", device="cpu", **options) as here,
    ):
        for one, other in zip(next(there).images, next(here).images, strict=True):
            assert one.device.type == "cuda"
            assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(
    "views",
    [
        [CropView(64, ect=Ect(), output="uint8")],
        [CropView(64, output="uint8"), CropView(32, rotations=True, output="uint8")],
        [CropView(64, rotations=True, ect=Ect(), augment=Augment(jitter=0.8, grey=0.2, stain=0.5), output="uint8")] * 2,
    ],
    ids=["ect", "two views", "augmented"],
)
def test_other_views_are_as_close(dataset: Any, views: list[CropView]) -> None:
    fast, plain = open_both(dataset, views)
    with fast, plain:
        for _ in range(6):
            for one, other in zip(next(fast).images, next(plain).images, strict=True):
                assert one.is_contiguous(memory_format=torch.channels_last)
                # Resizing may round by one more, and jitter stretches a difference.
                assert (one.cpu().int() - other.int()).abs().float().mean() <= 2 * MEAN_TOLERANCE


def test_float_batches_stay_valid_while_later_ones_are_loaded(dataset: Any) -> None:
    with open_loader(dataset.path, batch_size_per_rank=8, views=[CropView(64)], device="cuda") as loader:
        batches = [next(loader).images[0] for _ in range(8)]
        copies = [batch.clone() for batch in batches]
        for _ in range(8):
            next(loader)
        torch.cuda.synchronize()
        assert all(torch.equal(batch, copy) for batch, copy in zip(batches, copies, strict=True))
