"""Views beyond a plain crop: the backends deliver the same, and what `engine.data.finish` specifies."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types

from engine.data import Augment, CropView, Ect, SampleStream, dino_views, open_loader
from engine.data.dali_loader import _resized
from engine.data.finish import empty_images, finish_samples, resize
from engine.data.views import draw_view

EVERYTHING = Augment(jitter=0.8, grey=0.2, stain=0.5, blur=0.5, solarise=0.3)
ECT = CropView(40, ect=Ect(), output="uint8")
VIEWS = {
    "ect": [ECT],
    "ect, float": [CropView(61, ect=Ect((0.3, 1.0), (0.75, 1.33), "patch_area"))],
    "rotations": [CropView(33, rotations=True, output="uint8")],
    "colour": [CropView(40, augment=EVERYTHING)],
    "everything, in half precision": [CropView(40, rotations=True, ect=Ect(), augment=EVERYTHING, output="float16")],
    "channels last": [CropView(40, channels_last=True), CropView(40, channels_last=False, output="uint8")],
    "plain and not": [CropView(33, output="uint8"), ECT, CropView(32), CropView(96, centre=True, flips=False)],
    "multi-crop": dino_views(56, 24, num_small=3),
    "extended context": dino_views(56, 24, num_small=3, ect=Ect(), solarise=0.0),
}


def open_cpu(dataset: Any, backend: Any, views: Any, batch_size: int = 6, **options: Any) -> Any:
    merged: dict[str, Any] = {"seed": 9, "threads": 2, "device": "cpu"} | options
    return open_loader(dataset.path, batch_size_per_rank=batch_size, views=views, backend=backend, **merged)


def take(loader: Any, count: int) -> Any:
    return [next(loader) for _ in range(count)]


def assert_same_images(batches: Any, others: Any) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.rows, other.rows)
        for images, other_images in zip(batch.images, other.images, strict=True):
            assert torch.equal(images, other_images)


@pytest.mark.parametrize("name", VIEWS)
def test_a_batch_holds_what_was_drawn(dataset: Any, backend: Any, name: str) -> None:
    views = VIEWS[name]
    with open_cpu(dataset, backend, views, 7) as loader:
        batches = take(loader, 3)
    rows = SampleStream(37, seed=9).rows(0, 21)
    patches = [simplejpeg.decode_jpeg(dataset.payloads[row]) for row in rows]
    for number, view in enumerate(views):
        windows, changes = draw_view(view, number, seed=9, positions=np.arange(21), patch_px=96)
        expected = empty_images(view, 21)
        for index, patch in enumerate(patches):
            finish_samples(view, [patch], windows, changes, index, expected)
        images = [batch.images[number] for batch in batches]
        order = torch.channels_last if view.is_channels_last else torch.contiguous_format
        assert all(image.is_contiguous(memory_format=order) for image in images)
        assert images[0].dtype == getattr(torch, view.output)
        # Only DALI's own normalising, of plain views, rounds otherwise than ours.
        tolerance = 1e-5 if view.is_plain and view.output == "float32" else 0
        torch.testing.assert_close(torch.cat(images), expected, rtol=0, atol=tolerance)


def test_multi_crop_has_the_views_of_its_recipe(dataset: Any) -> None:
    views = dino_views(48, 32, num_small=8, ect=Ect())
    with open_cpu(dataset, "torch", views, 4) as loader:
        batch = next(loader)
    assert [tuple(images.shape) for images in batch.images] == [(4, 3, 48, 48)] * 2 + [(4, 3, 32, 32)] * 8
    assert not torch.equal(batch.images[0], batch.images[1])
    assert not torch.equal(batch.images[2], batch.images[3])
    dino_views(224, 98, ect=Ect())[0].check_fits(392, 392)
    dino_views()[0].check_fits(224, 224)
    with pytest.raises(ValueError, match="241 x 241"):
        dino_views(224, 98, ect=Ect())[0].check_fits(240, 240)


def test_a_view_may_take_the_draws_of_another(dataset: Any, backend: Any) -> None:
    view = CropView(40, rotations=True, ect=Ect(), augment=EVERYTHING)
    twin = CropView(40, rotations=True, ect=Ect(), augment=EVERYTHING, draws_of=0)
    with open_cpu(dataset, backend, [view, twin, view]) as loader:
        first, second, other = next(loader).images
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="draws_of"):
        CropView(40, draws_of=-1)


@pytest.mark.parametrize("threads", [1, 3])
def test_images_depend_neither_on_ranks_nor_on_threads(dataset: Any, backend: Any, threads: int) -> None:
    views = VIEWS["everything, in half precision"] + VIEWS["plain and not"]
    with open_cpu(dataset, backend, views, 12) as loader:
        alone = take(loader, 3)
    parts = []
    for rank in range(3):
        with open_cpu(dataset, backend, views, 4, rank=rank, world_size=3, threads=threads) as loader:
            parts.append(take(loader, 3))
    for batch, *of_ranks in zip(alone, *parts, strict=True):
        for number, images in enumerate(batch.images):
            assert torch.equal(images, torch.cat([part.images[number] for part in of_ranks]))


def test_resume_delivers_the_identical_rest(dataset: Any, backend: Any) -> None:
    views = VIEWS["extended context"]
    with open_cpu(dataset, backend, views) as loader:
        take(loader, 2)
        assert loader.seen == 12
        state = json.loads(json.dumps(loader.state_dict()))
        rest = take(loader, 3)
    with open_cpu(dataset, backend, views) as loader:
        take(loader, 1)
        loader.load_state_dict(state)
        assert_same_images(rest, take(loader, 3))
    with (
        open_cpu(dataset, backend, dino_views(56, 24, num_small=3, ect=Ect((0.9, 1.0)), solarise=0.0)) as loader,
        pytest.raises(ValueError, match="'views'"),
    ):
        loader.load_state_dict(state)


def test_delivered_images_are_never_overwritten(dataset: Any, backend: Any) -> None:
    with open_cpu(dataset, backend, VIEWS["plain and not"]) as loader:
        kept = take(loader, 8)
        copies = [[images.clone() for images in batch.images] for batch in kept]
        take(loader, 8)
    for batch, copied in zip(kept, copies, strict=True):
        assert all(torch.equal(images, copy) for images, copy in zip(batch.images, copied, strict=True))


def test_the_good_batches_before_a_bad_sample_are_delivered(make_dataset: Any, paint: Any, backend: Any) -> None:
    rows = SampleStream(12, seed=9).rows(0, 12)
    payloads = [paint(row, 96) for row in range(12)]
    payloads[rows[8]] = payloads[rows[8]][:2000]  # its header is whole, and its crc32 is that of what is there
    made = make_dataset(payloads)
    with open_cpu(made, backend, [ECT], 2) as loader:
        batches = take(loader, 4)
        with pytest.raises(RuntimeError, match="does not decode"):
            next(loader)
        assert loader.seen == 8
    with open_cpu(make_dataset([paint(row, 96) for row in range(12)]), backend, [ECT], 2) as loader:
        assert_same_images(batches, take(loader, 4))


def test_dali_resizes_within_one_grey_level_of_the_specification() -> None:
    # On a GPU DALI does the resizing. Its operator is the same on the CPU, where it is only slower.
    random = np.random.default_rng(0)
    sizes = [(61, 58), (67, 70), (70, 66), (64, 64), (40, 90), (100, 33), (256, 256)]
    crops = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    view = CropView(64, ect=Ect())

    @pipeline_def
    def resizing() -> Any:
        return _resized(fn.external_source(lambda: crops, dtype=types.UINT8, ndim=3, layout="HWC"), view)

    (resized,) = resizing(batch_size=len(crops), num_threads=1, device_id=None, exec_dynamic=True).run()
    for crop, image in zip(crops, resized.as_array(), strict=True):
        difference = np.abs(image.astype(int) - resize(torch.from_numpy(crop), 64).numpy())
        assert difference[1:-1, 1:-1].max() <= 1
        assert difference.max() <= (2 if max(crop.shape) <= 70 else 20)  # edges: the more, the more it shrinks


@pytest.mark.parametrize("name", VIEWS)
def test_the_steps_of_the_gpu_deliver_the_same(dataset: Any, name: str) -> None:
    # DALI resizes and torch finishes whole batches, as on a GPU, with DALI's operators on the CPU.
    views = VIEWS[name]
    with open_cpu(dataset, "dali", views, 7) as loader, open_cpu(dataset, "torch", views, 7) as plain:
        loader._decoder._dali_resizes = True
        for batch, other in zip(take(loader, 3), take(plain, 3), strict=True):
            assert torch.equal(batch.rows, other.rows)
            for view, images, expected in zip(views, batch.images, other.images, strict=True):
                assert images.dtype == expected.dtype
                assert images.stride() == expected.stride()
                # A grey level is about 0.02 after normalising. Augmenting passes on what resizing rounds otherwise.
                level = 1 if view.output == "uint8" else 0.02
                tolerance = 0.001 * level if view.ect is None else level
                assert (images.float() - expected.float()).abs().mean() <= tolerance


def test_torch_keeps_its_threads_and_a_closed_loader_leaves_none(dataset: Any, backend: Any) -> None:
    num_torch, running = torch.get_num_threads(), threading.active_count()
    with open_cpu(dataset, backend, [ECT]) as loader:
        next(loader)
        assert torch.get_num_threads() == num_torch
        assert threading.active_count() > running
    assert threading.active_count() == running
