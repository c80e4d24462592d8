"""DALI and nvImageCodec by themselves: the stock pipeline, and the limit, which is the decoding of a crop alone.

The one module of the benchmarks that imports `nvidia`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types

from benchmarks.feeds import Feed, Patches
from benchmarks.loader_peers import Peer
from engine.data.ect import Int32
from engine.data.views import CropView, draw_view

_SHUFFLED = 1000  # samples in the reader's buffer
_PATCHES_DECODED = 2048  # kept in memory for the limit


def dali_stock(patches: Patches, view: CropView) -> Feed:
    """DALI's webdataset reader with idx files, a full decode, and DALI's own operators for what the view says."""
    shards = patches.shards

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        pipeline = _stock(shards, view, patches.patch_px, **_one_core(patches.batch_size), seed=1)
        yield _tensors(pipeline, channels_last=view.output == "uint8")

    return feed


@pipeline_def
def _stock(shards: list[str], view: CropView, patch_px: int) -> Any:
    jpegs = fn.readers.webdataset(
        paths=shards,
        index_paths=[f"{shard.removesuffix('.tar')}.idx" for shard in shards],
        ext=["jpg"],
        missing_component_behavior="error",
        random_shuffle=True,
        initial_fill=_SHUFFLED,
    )
    images = fn.decoders.image(jpegs)
    size = view.size_px
    if view.ect is None:
        places = [fn.random.uniform(range=(0.0, 1.0)) for _ in range(2)]
        images = fn.crop(images, crop=(size, size), crop_pos_x=places[0], crop_pos_y=places[1])
    else:
        low, high = (scale * (size / patch_px) ** 2 for scale in view.ect.scale)
        images = fn.random_resized_crop(
            images,
            size=(size, size),
            random_area=(low, high),
            random_aspect_ratio=view.ect.aspect,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
    if view.augment is not None:
        images = fn.color_twist(
            images,
            brightness=_around(1, view.augment.brightness),
            contrast=_around(1, view.augment.contrast),
            saturation=_around(1, view.augment.saturation),
            hue=_around(0, 360 * view.augment.hue),
        )
    mirrors = [fn.random.coin_flip(probability=0.5) for _ in range(2)]
    if view.output == "uint8":
        return fn.flip(images, horizontal=mirrors[0], vertical=mirrors[1])
    return fn.crop_mirror_normalize(
        fn.flip(images, horizontal=0, vertical=mirrors[1]),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in view.mean],
        std=[255 * value for value in view.std],
        mirror=mirrors[0],
    )


def _around(middle: float, most: float) -> Any:
    return fn.random.uniform(range=(middle - most, middle + most))


def dali_limit(patches: Patches, view: CropView) -> Feed:
    """DALI's decoder of the view's windows alone, from memory."""
    batches = _decodable(patches, view)

    @contextmanager
    def feed() -> Iterator[Iterator[Any]]:
        order = itertools.cycle(batches)
        yield _outputs(_slices(lambda: next(order), "cpu", 0.0, **_one_core(patches.batch_size)))

    return feed


def nvimgcodec_limit(patches: Patches, view: CropView) -> Feed:
    """nvImageCodec's CPU decoder of the view's windows alone, from memory; what parses headers is not counted."""
    from nvidia import nvimgcodec

    streams = [
        [
            nvimgcodec.CodeStream(jpeg).get_sub_code_stream(region=nvimgcodec.Region(y, x, y + height, x + width))
            for jpeg, (x, y), (width, height) in zip(jpegs, starts.tolist(), sizes.tolist(), strict=True)
        ]
        for jpegs, starts, sizes in _decodable(patches, view)
    ]

    @contextmanager
    def feed() -> Iterator[Iterator[Any]]:
        # With libjpeg's own upsampling of chroma, as our loader's.
        decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            options=":fancy_upsampling=1",
        )
        yield (decoder.decode(batch) for batch in itertools.cycle(streams))

    return feed


def gpu_decoder(patches: Patches, view: CropView, *, threads: int, cut: bool, hw_decoder_load: float) -> Feed:
    """DALI's decoder on the GPU alone, from memory: of the view's windows (`cut`), or of whole patches."""
    batches = _decodable(patches, view)

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        order = itertools.cycle(batches)
        settings = _one_core(patches.batch_size) | {"num_threads": threads, "device_id": torch.cuda.current_device()}
        define = _slices if cut else _whole
        pipeline = define(lambda: next(order), "mixed", hw_decoder_load, **settings)
        yield _tensors(pipeline, channels_last=True)

    return feed


Decodable = tuple[list[npt.NDArray[np.uint8]], Int32, Int32]
"""A batch of JPEG streams, and of their windows the corners and the sizes, int32[n, 2] each (x, y)."""


def _decodable(patches: Patches, view: CropView) -> list[Decodable]:
    jpegs = [np.frombuffer(jpeg, np.uint8) for jpeg in itertools.islice(patches.payloads(), _PATCHES_DECODED)]
    batches = []
    for first in range(0, len(jpegs) - patches.batch_size + 1, patches.batch_size):
        positions = np.arange(first, first + patches.batch_size)
        windows, _ = draw_view(view, 0, seed=1, positions=positions, patch_px=patches.patch_px)
        starts, sizes = np.stack([windows.x0, windows.y0], 1), np.stack([windows.width, windows.height], 1)
        batches.append((jpegs[first : first + patches.batch_size], starts, sizes))
    return batches


@pipeline_def
def _slices(source: Callable[[], Decodable], device: str, hw_decoder_load: float) -> Any:
    jpegs, starts, sizes = _external(source)
    return fn.decoders.image_slice(
        jpegs,
        device=device,
        start=starts,
        shape=sizes,
        axis_names="WH",
        hw_decoder_load=hw_decoder_load,
        jpeg_fancy_upsampling=True,
    )


@pipeline_def
def _whole(source: Callable[[], Decodable], device: str, hw_decoder_load: float) -> Any:
    jpegs, starts, sizes = _external(source)
    images = fn.decoders.image(jpegs, device=device, hw_decoder_load=hw_decoder_load, jpeg_fancy_upsampling=True)
    return fn.slice(images, start=starts, shape=sizes, axis_names="WH")


def _external(source: Callable[[], Decodable]) -> Any:
    return fn.external_source(
        source=source,
        num_outputs=3,
        batch=True,
        no_copy=True,
        dtype=[types.UINT8, types.INT32, types.INT32],
        ndim=[1, 1, 1],
    )


def _one_core(batch_size: int) -> dict[str, Any]:
    return {"batch_size": batch_size, "num_threads": 1, "device_id": None, "exec_dynamic": True}


def _outputs(pipeline: Any) -> Iterator[Any]:
    while True:
        (images,) = pipeline.run()
        yield images


def _tensors(pipeline: Any, *, channels_last: bool) -> Iterator[torch.Tensor]:
    for images in _outputs(pipeline):
        tensor = torch.from_dlpack(images.as_tensor())  # no copy
        yield tensor.permute(0, 3, 1, 2) if channels_last else tensor


LIMITS: dict[str, Peer] = {"limit_dali": dali_limit, "limit_nvimgcodec": nvimgcodec_limit}
