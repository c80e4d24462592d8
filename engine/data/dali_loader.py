"""The fast decoder: NVIDIA DALI, on the CPU or the GPU. The one module that imports nvidia.dali.

DALI gets encoded samples and windows and keeps no state: it draws nothing, orders nothing and reads no file. Only what
some view shows is decoded. `torch_loader` is the specification, and the tests compare. On the CPU, images are equal to
the bit, but for plain float32 views, which DALI normalises: 1e-5. On a GPU, whose decoder has an IDCT of its own: 1.5
grey levels on average, 8 at most at 4:4:4; twice the average where a view is resized or augmented. What DALI does
slowly or not at all (resizing and colour on the CPU, quarter turns) is left to `engine.data.finish`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types

from engine.data.batches import Decoded, EncodedBatch
from engine.data.finish import (
    ImageMemory,
    empty_images,
    finish,
    finish_samples,
    finishing_pool,
    submit_samples,
    turn,
)
from engine.data.reading import BadSampleError
from engine.data.views import CropView, boxes

Source = Callable[[], tuple[Any, ...]]


class DaliDecoder:
    """Decodes batches of exactly `batch_size` samples, `prefetch` of them beside the one being used.

    `bad_sample(row, reason)` describes what fails.
    """

    backend = "dali"

    def __init__(
        self,
        views: Sequence[CropView],
        *,
        batch_size: int,
        threads: int,
        prefetch: int,
        device: torch.device,
        bad_sample: Callable[[int, str], BadSampleError],
    ) -> None:
        self.device = device
        self._views = tuple(views)
        self._batch_size = batch_size
        self._threads = threads
        self._prefetch = prefetch
        self._bad_sample = bad_sample
        self._on_gpu = device.type == "cuda"
        self._dali_resizes = self._on_gpu  # whole batches there; on the CPU that is slow, see `engine.data.finish`
        self._memory = [ImageMemory(view) for view in self._views]
        self._pool = finishing_pool(threads, "dali-finish")

    def decode(self, encoded: Iterator[EncodedBatch]) -> Generator[Decoded, None, None]:
        """See `Decoder.decode`."""
        batches = self._run(encoded)
        pending: deque[tuple[EncodedBatch, list[torch.Tensor], list[Future[None]]]] = deque()
        failure: Exception | None = None
        ended = False
        try:
            while True:
                while not ended and len(pending) < self._prefetch:
                    try:
                        batch, outputs = next(batches)
                        pending.append((batch, *self._finished(batch, outputs)))
                    except StopIteration:
                        ended = True
                    except Exception as error:  # raised once the good batches before it are delivered
                        failure, ended = error, True
                    if ended or not pending[-1][2]:
                        break  # nothing is computed meanwhile, so there is nothing to gain by going ahead
                if not pending:
                    break
                batch, images, tasks = pending.popleft()
                for task in tasks:
                    task.result()
                yield batch, images
        finally:
            for _, _, tasks in pending:
                for task in tasks:
                    task.cancel()
            batches.close()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Stop the threads; the pipeline ends with the iterator of `decode`."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, encoded: Iterator[EncodedBatch]) -> Generator[tuple[EncodedBatch, list[Any]], None, None]:
        """Yield each batch with DALI's outputs, from a pipeline of its own (10 ms): an error ruins one."""
        in_flight: deque[EncodedBatch] = deque()
        # no_copy lends our arrays to DALI, so they stay here until no batch inside it can need them: as many as DALI
        # holds, and as many again, because on the GPU a copy may still run when its batch is handed out.
        lent: deque[tuple[Any, ...]] = deque(maxlen=2 * (self._prefetch + 1))

        def source() -> tuple[Any, ...]:
            batch = next(encoded, None)
            if batch is None:
                raise StopIteration  # DALI then delivers what it holds
            in_flight.append(batch)
            lent.append(_inputs(self._views, self._dali_resizes, batch))
            return lent[-1]

        pipeline = _crops(
            source,
            self._views,
            self._on_gpu,
            self._dali_resizes,
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self.device.index if self._on_gpu else None,
            prefetch_queue_depth=self._prefetch,
            # With the older executor (exec_dynamic=False) a tensor handed over by dlpack is overwritten two batches on.
            exec_dynamic=True,
        )
        while True:
            try:
                # Bound to torch's stream, so that DALI reuses a tensor's memory only after torch's work on it.
                outputs = pipeline.run(torch.cuda.current_stream(self.device) if self._on_gpu else None)
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
            yield batch, images

    def _finished(self, batch: EncodedBatch, outputs: list[Any]) -> tuple[list[torch.Tensor], list[Future[None]]]:
        """Return the images of all views, and the tasks that still write into them."""
        images = []
        unfinished = []
        remaining = iter(outputs)
        for number, view in enumerate(self._views):
            if not view.is_plain and not self._dali_resizes:
                images.append(self._memory[number].empty_images(self._batch_size))
                unfinished.append(number)
                continue
            tensor = torch.from_dlpack(next(remaining).as_tensor())  # no copy
            if view.is_plain:
                images.append(tensor.permute(0, 3, 1, 2) if view.output == "uint8" else tensor)
            else:
                images.append(empty_images(view, self._batch_size, self.device))
                finish(turn(tensor, batch.windows[number]), batch.changes[number], images[-1])
        if not unfinished:
            return images, []
        decoded = next(remaining)
        origins = boxes(batch.windows)[0]

        def finish_some(indices: range) -> None:
            patches = [np.asarray(decoded[index]) for index in indices]
            for number in unfinished:
                finish_samples(
                    self._views[number],
                    patches,
                    batch.windows[number],
                    batch.changes[number],
                    indices.start,
                    images[number],
                    origins=origins[indices.start : indices.stop],
                )

        return images, submit_samples(self._pool, finish_some, self._batch_size, threads=self._threads)

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


def _inputs(views: tuple[CropView, ...], dali_resizes: bool, batch: EncodedBatch) -> tuple[Any, ...]:
    """Lay out a batch as `_crops` expects it: JPEG streams, positions, boxes, then what the views take, see there."""
    starts, sizes = boxes(batch.windows)
    per_view: list[Any] = []
    for view, windows in zip(views, batch.windows, strict=True):
        if len(views) > 1 and (view.is_plain or dali_resizes):
            per_view.append(np.stack([windows.x0, windows.y0], axis=1) - starts)
            per_view.append(np.stack([windows.width, windows.height], axis=1))
        if view.is_plain and view.flips:  # DALI warns about an input that nothing uses
            per_view += [windows.flip_x, windows.flip_y]
    return [sample.jpeg for sample in batch.samples], batch.positions, starts, sizes, *per_view


@pipeline_def
def _crops(source: Source, views: tuple[CropView, ...], on_gpu: bool, dali_resizes: bool) -> tuple[Any, ...]:
    """Define the pipeline. A sample is decoded once, the box around all its windows, and each view is cut out of that.

    Plain views are finished here: uint8[H, W, 3] or float32[3, H, W]. Of the others come, if DALI resizes,
    uint8[H, W, 3] at the view's size, else the decoded box, once. The positions come last.
    """
    ndims = [1, 0, 1, 1]
    for view in views:
        ndims += [1, 1] * (len(views) > 1 and (view.is_plain or dali_resizes)) + [0, 0] * (view.is_plain and view.flips)
    jpegs, positions, box_start, box_size, *arguments = fn.external_source(
        source=source,
        num_outputs=len(ndims),
        batch=True,
        no_copy=True,
        dtype=[types.UINT8, types.INT64] + [types.INT32] * (len(ndims) - 2),
        ndim=ndims,
    )
    box = fn.decoders.image_slice(
        jpegs,
        device="mixed" if on_gpu else "cpu",
        start=box_start,
        shape=box_size,
        axis_names="WH",
        output_type=types.RGB,
        # An EXIF tag must not turn a patch: the index knows where its pixels lie.
        adjust_orientation=False,
        # The GPU's default upsampling of chroma differs from libjpeg's.
        jpeg_fancy_upsampling=True,
        # By default some places of a batch go to the hardware engines and others not, and the two round differently:
        # a sample's pixels would depend on its place. All that the engines can decode goes there (or nothing, with 0).
        hw_decoder_load=1.0,
    )
    remaining = iter(arguments)
    images = []
    for view in views:
        if not view.is_plain and not dali_resizes:
            continue
        crop = box
        if len(views) > 1:
            crop = fn.slice(box, start=next(remaining), shape=next(remaining), axis_names="WH")
        if view.is_plain:
            flips = (next(remaining), next(remaining)) if view.flips else None
            images.append(_flipped(crop, view, flips))
        else:
            images.append(_resized(crop, view))
    decoded = [] if dali_resizes or all(view.is_plain for view in views) else [box]
    return *images, *decoded, positions


def _flipped(crop: Any, view: CropView, flips: tuple[Any, Any] | None) -> Any:
    """Flip, and normalise where the view is of floats."""
    if view.output == "uint8":
        return fn.flip(crop, horizontal=flips[0], vertical=flips[1]) if flips else crop
    if flips:
        crop = fn.flip(crop, horizontal=0, vertical=flips[1])
    return fn.crop_mirror_normalize(
        crop,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in view.mean],
        std=[255 * value for value in view.std],
        mirror=flips[0] if flips else 0,
    )


def _resized(crop: Any, view: CropView) -> Any:
    """Resize as `engine.data.finish.resize`, give or take one grey level.

    Only the outermost pixels of an axis that shrinks differ more, by 13 on noise that shrinks to a quarter: there DALI
    repeats the crop's edge, and the specification weighs what there is.
    """
    if view.ect is None:
        return crop
    return fn.resize(
        crop, resize_x=view.size_px, resize_y=view.size_px, interp_type=types.INTERP_LINEAR, antialias=True
    )
