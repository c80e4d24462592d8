"""What people load patches with today: webdataset, LitData, MosaicML Streaming or OpenSlide itself, each with PIL.

A peer draws the same windows, flips and colours as a view of ours does and delivers the same kind of batch, in this
process and on its core. It checks no bytes, and its state is not one integer. Of the usual ways the fastest was taken:
windows drawn with Python's `random`, one `resize` with a box for ECT, uint8 stacked by numpy, floats by torchvision's
ToTensor and Normalize in place, and torch.stack (as torch's default collation); jitter on PIL's images (on tensors it
takes longer).
"""

from __future__ import annotations

import io
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.feeds import Feed, Patches
from engine.data.views import CropView

Peer = Callable[[Patches, CropView], Feed]

_SHUFFLED = 1000  # samples in webdataset's buffer


class PilTransform:
    """A view with PIL and torchvision."""

    def __init__(self, view: CropView) -> None:
        self._view = view
        augment = view.augment
        self._jitter = augment and transforms.ColorJitter(
            augment.brightness, augment.contrast, augment.saturation, augment.hue
        )
        self._to_float = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(view.mean, view.std, inplace=True)]
        )

    def __call__(self, patch: Image.Image) -> Any:
        image = self._crop(patch)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self._jitter:
            image = self._jitter(image)
        return np.asarray(image) if self._view.output == "uint8" else self._to_float(image)

    def collate(self, images: list[Any]) -> torch.Tensor:
        """One batch [B, 3, S, S] of what calls returned."""
        if self._view.output == "uint8":
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return torch.stack(images)

    def batches(self, patches: Iterable[Image.Image], batch_size: int) -> Iterator[torch.Tensor]:
        patches = iter(patches)
        while True:
            yield self.collate([self(patch) for patch in islice(patches, batch_size)])

    def _crop(self, patch: Image.Image) -> Image.Image:
        size, ect = self._view.size_px, self._view.ect
        width = height = size
        if ect is not None:
            area = size**2 * random.uniform(*ect.scale)
            aspect = math.exp(random.uniform(math.log(ect.aspect[0]), math.log(ect.aspect[1])))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        x, y = random.randint(0, patch.width - width), random.randint(0, patch.height - height)
        box = (x, y, x + width, y + height)
        if ect is None:
            return patch.crop(box)
        return patch.resize((size, size), Image.Resampling.BILINEAR, box)


def webdataset_pil(patches: Patches, view: CropView) -> Feed:
    """WebDataset: resampled shards, a shuffle buffer, `decode("pil")`."""
    import webdataset

    shards = patches.shards

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        transform = PilTransform(view)
        # `initial`: the buffer is full before the first batch, and takes one for one from then on.
        dataset = (
            webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
            .shuffle(_SHUFFLED, initial=_SHUFFLED)
            .decode("pil")
            .to_tuple("jpg")
            .map(lambda sample: transform(sample[0]))
            .batched(patches.batch_size, collation_fn=transform.collate)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing its shards to the interpreter
            batches = iter(dataset)
            yield batches
            batches.close()

    return feed


def litdata_pil(patches: Patches, view: CropView) -> Feed:
    """LitData: a shuffled StreamingDataset over local chunks of JPEG streams."""
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    def write(folder: Path) -> None:
        cache = Cache(str(folder), chunk_bytes="64MB")
        for number, payload in enumerate(patches.payloads()):
            cache[number] = payload
        cache.done()
        cache.merge()

    folder = patches.copied("litdata", write)

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        dataset = StreamingDataset(str(folder), shuffle=True)
        decoded = (Image.open(io.BytesIO(payload)) for payload in _endless(dataset))
        yield PilTransform(view).batches(decoded, patches.batch_size)

    return feed


def streaming_pil(patches: Patches, view: CropView) -> Feed:
    """MosaicML Streaming: a shuffled StreamingDataset over local MDS shards of JPEG streams."""
    from streaming import MDSWriter, StreamingDataset

    def write(folder: Path) -> None:
        with MDSWriter(out=str(folder), columns={"jpeg": "bytes"}) as writer:
            for payload in patches.payloads():
                writer.write({"jpeg": payload})

    folder = patches.copied("streaming", write)

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        before, tempfile.tempdir = tempfile.tempdir, str(patches.copies)  # where it puts its lock files
        try:
            dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=patches.batch_size)
        finally:
            tempfile.tempdir = before
        decoded = (Image.open(io.BytesIO(sample["jpeg"])) for sample in _endless(dataset))
        yield PilTransform(view).batches(decoded, patches.batch_size)

    return feed


def openslide_pil(patches: Patches, view: CropView) -> Feed:
    """OpenSlide on the fly, as vittm-hmr does: each patch's region is read from its slide in random order, and cut."""
    from sharding.readers.openslide_reader import openslide

    index = pq.read_table(patches.dataset / "index.parquet", columns=["slide_id", "x0", "y0", "level", "read_px"])
    slides = pq.read_table(patches.dataset / "slides.parquet", columns=["slide_id", "path"])
    path_of = dict(zip(*slides.to_pydict().values(), strict=True))
    rows = list(zip(*index.to_pydict().values(), strict=True))

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        opened = {slide_id: openslide.OpenSlide(path) for slide_id, path in path_of.items()}

        def regions() -> Iterator[Image.Image]:
            while True:
                slide_id, x0, y0, level, read_px = random.choice(rows)
                yield opened[slide_id].read_region((x0, y0), level, (read_px, read_px)).convert("RGB")

        yield PilTransform(view).batches(regions(), patches.batch_size)
        for slide in opened.values():
            slide.close()

    return feed


def _endless(dataset: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from dataset


PIL_PEERS: dict[str, Peer] = {
    "openslide_pil": openslide_pil,
    "webdataset_pil": webdataset_pil,
    "litdata_pil": litdata_pil,
    "streaming_pil": streaming_pil,
}
