"""The plain decoder, and the specification of every other one: full decode, slice, flip, normalise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from engine.data.batches import Decoded, EncodedBatch
from engine.data.reading import BadSampleError
from engine.data.views import CropView

_BATCHES_IN_DECODE = 2  # one being decoded while one is being used

Arrays = list[npt.NDArray[Any]]


class TorchDecoder:
    """Decodes with simplejpeg (libjpeg-turbo) in threads; `bad_sample(row, reason)` describes what fails."""

    backend = "torch"

    def __init__(
        self,
        views: Sequence[CropView],
        *,
        threads: int,
        device: torch.device,
        bad_sample: Callable[[int, str], BadSampleError],
    ) -> None:
        self.device = device
        self._views = tuple(views)
        self._bad_sample = bad_sample
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="torch-decoder")

    def decode(self, encoded: Iterator[EncodedBatch]) -> Generator[Decoded, None, None]:
        """See `Decoder.decode`."""
        pending: deque[tuple[EncodedBatch, Arrays, list[Future[None]]]] = deque()
        try:
            while True:
                while len(pending) < _BATCHES_IN_DECODE and (batch := next(encoded, None)) is not None:
                    arrays = [_empty_images(view, len(batch.rows)) for view in self._views]
                    tasks = [self._pool.submit(self._decode_one, batch, i, arrays) for i in range(len(batch.rows))]
                    pending.append((batch, arrays, tasks))
                if not pending:
                    return
                batch, arrays, tasks = pending.popleft()
                for task in tasks:
                    task.result()
                yield batch, [self._to_device(images) for images in arrays]
        finally:
            for _, _, tasks in pending:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode_one(self, batch: EncodedBatch, index: int, arrays: Arrays) -> None:
        """Decode sample number `index` and write each view of it into arrays[view][index]."""
        try:
            # Strict: what libjpeg would repair with a warning is damage here.
            patch = simplejpeg.decode_jpeg(batch.samples[index].jpeg, "RGB", strict=True)
        except ValueError as error:
            raise self._bad_sample(int(batch.rows[index]), f"it does not decode ({error})") from error
        for view, windows, images in zip(self._views, batch.windows, arrays, strict=True):
            x0, y0 = int(windows.x0[index]), int(windows.y0[index])
            crop = patch[y0 : y0 + view.size_px, x0 : x0 + view.size_px]
            if windows.flip_x[index]:
                crop = crop[:, ::-1]
            if windows.flip_y[index]:
                crop = crop[::-1]
            if view.output == "uint8":
                images[index] = crop
            else:
                mean, std = (np.array(value, np.float32)[:, None, None] for value in (view.mean, view.std))
                # The scale of 255 is folded into mean and std, so that each pixel is touched twice, not three times.
                np.subtract(crop.transpose(2, 0, 1), mean * 255, out=images[index])
                images[index] /= std * 255

    def _to_device(self, images: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(images)
        if images.dtype == np.uint8:
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor.to(self.device)


def _empty_images(view: CropView, batch_size: int) -> npt.NDArray[Any]:
    """Return float32[B, 3, H, W], or uint8[B, H, W, 3], the order in which decoders write."""
    if view.output == "uint8":
        return np.empty((batch_size, view.size_px, view.size_px, 3), np.uint8)
    return np.empty((batch_size, 3, view.size_px, view.size_px), np.float32)
