"""The fast decoder: NVIDIA DALI, on the CPU or the GPU. The one module that imports nvidia.dali.

DALI gets encoded samples and windows and keeps no state: it draws nothing, orders nothing and reads no file. Only the
crop is decoded. On the CPU that is bit for bit what a full decode and a slice give (`torch_loader` is the
specification, the tests compare); the GPU's decoder computes its own IDCT and may differ by rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types

from engine.data.batches import Decoded, EncodedBatch
from engine.data.reading import BadSampleError
from engine.data.views import CropView

_PREFETCH = 2  # batches inside DALI beside the one being used

Source = Callable[[], tuple[Any, ...]]


class DaliDecoder:
    """Decodes batches of exactly `batch_size` samples; `bad_sample(row, reason)` describes what fails."""

    backend = "dali"

    def __init__(
        self,
        views: Sequence[CropView],
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
        bad_sample: Callable[[int, str], BadSampleError],
    ) -> None:
        self.device = device
        self._views = tuple(views)
        self._batch_size = batch_size
        self._threads = threads
        self._bad_sample = bad_sample

    def decode(self, encoded: Iterator[EncodedBatch]) -> Generator[Decoded, None, None]:
        """See `Decoder.decode`. Each call builds a pipeline (10 ms): after an error DALI's is not to be trusted."""
        in_flight: deque[EncodedBatch] = deque()
        # no_copy lends our arrays to DALI, so they stay here until no batch inside it can need them: as many as DALI
        # holds, and as many again, because on the GPU a copy may still run when its batch is handed out.
        lent: deque[tuple[Any, ...]] = deque(maxlen=2 * (_PREFETCH + 1))

        def source() -> tuple[Any, ...]:
            batch = next(encoded, None)
            if batch is None:
                raise StopIteration  # DALI then delivers what it holds
            in_flight.append(batch)
            lent.append(_inputs(self._views, batch))
            return lent[-1]

        on_gpu = self.device.type == "cuda"
        pipeline = _crops(
            source,
            self._views,
            on_gpu,
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
            # With the older executor (exec_dynamic=False) a tensor handed over by dlpack is overwritten two batches on.
            exec_dynamic=True,
        )
        while True:
            try:
                # Bound to torch's stream, so that DALI reuses a tensor's memory only after torch's work on it.
                outputs = pipeline.run(torch.cuda.current_stream(self.device) if on_gpu else None)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explain(in_flight, error) from error
            batch = in_flight.popleft()
            *images, positions = outputs
            if not np.array_equal(positions.as_array(), batch.positions):
                raise RuntimeError(
                    f"DALI delivered positions {positions.as_array()[:3]}..., expected {batch.positions[:3]}...: "
                    "a fault of the loader, please report it; backend='torch' does without DALI"
                )
            yield batch, [self._to_torch(view, out) for view, out in zip(self._views, images, strict=True)]

    def close(self) -> None:
        """Do nothing: the pipeline ends with the iterator of `decode`."""

    def _to_torch(self, view: CropView, output: Any) -> torch.Tensor:
        tensor = torch.from_dlpack(output.as_tensor())  # no copy
        return tensor.permute(0, 3, 1, 2) if view.output == "uint8" else tensor

    def _explain(self, in_flight: deque[EncodedBatch], error: RuntimeError) -> Exception:
        """Find the sample that DALI failed on: it names none, and a batch fails as a whole."""
        for batch in in_flight:
            for row, sample in zip(batch.rows.tolist(), batch.samples, strict=True):
                try:
                    simplejpeg.decode_jpeg(sample.jpeg, "RGB", strict=True)
                except ValueError as reason:
                    return self._bad_sample(row, f"it does not decode ({reason})")
        if not in_flight:
            return RuntimeError(f"DALI could not start on {self.device}: {error}. backend='torch' does without DALI.")
        first, last = in_flight[0].positions[[0, -1]]
        return RuntimeError(
            f"DALI failed at positions {first} to {last}, although every sample there decodes without it: {error}. "
            "backend='torch' does without DALI."
        )


def _inputs(views: tuple[CropView, ...], batch: EncodedBatch) -> tuple[Any, ...]:
    """Lay out a batch as `_crops` expects it: JPEG streams, positions, then each view's windows and flips if any."""
    per_view: list[Any] = []
    for view, windows in zip(views, batch.windows, strict=True):
        per_view.append(np.stack([windows.x0, windows.y0], axis=1))
        if view.flips:  # DALI warns about an input that nothing uses
            per_view += [windows.flip_x, windows.flip_y]
    return [sample.jpeg for sample in batch.samples], batch.positions, *per_view


@pipeline_def
def _crops(source: Source, views: tuple[CropView, ...], on_gpu: bool) -> tuple[Any, ...]:
    """Define the pipeline: per view uint8[H, W, 3] or float32[3, H, W], then the stream positions, int64[]."""
    ndims = [1, 0]
    for view in views:
        ndims += [1, 0, 0] if view.flips else [1]
    jpegs, positions, *arguments = fn.external_source(
        source=source,
        num_outputs=len(ndims),
        batch=True,
        no_copy=True,
        dtype=[types.UINT8, types.INT64] + [types.INT32] * (len(ndims) - 2),
        ndim=ndims,
    )
    remaining = iter(arguments)
    images = []
    for view in views:
        start = next(remaining)
        flip_x, flip_y = (next(remaining), next(remaining)) if view.flips else (0, 0)
        crop = fn.decoders.image_slice(
            jpegs,
            device="mixed" if on_gpu else "cpu",
            start=start,
            shape=[view.size_px, view.size_px],
            axis_names="WH",
            output_type=types.RGB,
            # An EXIF tag must not turn a patch: the index knows where its pixels lie.
            adjust_orientation=False,
            # The GPU's default upsampling of chroma differs from libjpeg's.
            jpeg_fancy_upsampling=True,
        )
        if view.output == "uint8":
            if view.flips:
                crop = fn.flip(crop, horizontal=flip_x, vertical=flip_y)
        else:
            if view.flips:
                crop = fn.flip(crop, horizontal=0, vertical=flip_y)
            crop = fn.crop_mirror_normalize(
                crop,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in view.mean],
                std=[255 * value for value in view.std],
                mirror=flip_x,
            )
        images.append(crop)
    return *images, positions
