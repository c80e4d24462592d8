"""Memory of images is used again, and never while somebody holds it."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from engine.data import CropView
from engine.data.finish import ImageMemory, empty_images


@pytest.mark.parametrize("view", [CropView(8), CropView(8, output="uint8"), CropView(8, output="float16")])
def test_memory_comes_back_when_the_last_holder_lets_go(view: CropView) -> None:
    memory = ImageMemory(view)
    images = memory.empty_images(4)
    expected = empty_images(view, 4)
    assert (images.shape, images.stride(), images.dtype) == (expected.shape, expected.stride(), expected.dtype)
    place = images.data_ptr()
    part = images[1:2].numpy()  # shares the memory
    del images
    gc.collect()
    other = memory.empty_images(4)
    assert other.data_ptr() != place
    del part
    gc.collect()
    assert memory.empty_images(4).data_ptr() == place


def test_memory_of_another_size_is_not_taken() -> None:
    memory = ImageMemory(CropView(8))
    del_me = memory.empty_images(4)
    del del_me
    assert memory.empty_images(5).shape == (5, 3, 8, 8)


def test_images_outlive_the_loader_that_lent_them() -> None:
    memory = ImageMemory(CropView(8))
    images = memory.empty_images(2).fill_(3.0)
    del memory
    np.full(images.numel(), 7.0, np.float32)
    assert torch.equal(images, torch.full((2, 3, 8, 8), 3.0))
