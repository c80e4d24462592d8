"""The loader on a GPU. Decoding there is close to the specification, not equal: nvJPEG has its own inverse DCT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.data import Augment, CropView, Ect, open_loader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch finds none on this machine"),
]

# Grey levels of 255. An inverse DCT in other arithmetic rounds differently by 1 or 2 per component, and colour
# conversion adds up to as much again; chroma upsampling differs more at single pixels.
MEAN_TOLERANCE = 1.0
MAX_TOLERANCE = 24


@pytest.mark.parametrize("flips", [True, False])
def test_dali_on_the_gpu_delivers_what_the_plain_loader_specifies(dataset: Any, flips: bool) -> None:
    views = [CropView(64, flips=flips, output="uint8")]
    with (
        open_loader(dataset.path, batch_size_per_rank=8, views=views, backend="dali", device="cuda") as fast,
        open_loader(dataset.path, batch_size_per_rank=8, views=views, backend="torch", device="cpu") as plain,
    ):
        for _ in range(6):
            one, other = next(fast), next(plain)
            assert one.images[0].device.type == "cuda"
            assert torch.equal(one.rows, other.rows)
            difference = (one.images[0].cpu().int() - other.images[0].int()).abs()
            assert difference.float().mean() <= MEAN_TOLERANCE
            assert difference.max() <= MAX_TOLERANCE


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
    with (
        open_loader(dataset.path, batch_size_per_rank=8, views=views, backend="dali", device="cuda") as fast,
        open_loader(dataset.path, batch_size_per_rank=8, views=views, backend="torch", device="cpu") as plain,
    ):
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
