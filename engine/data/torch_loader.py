"""The plain decoder, and the specification of every other one: full decode, slice, and `engine.data.finish`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from engine.data.batches import Decoded, EncodedBatch
from engine.data.finish import ImageMemory, finish_samples, finishing_pool, submit_samples
from engine.data.reading import BadSampleError
from engine.data.views import CropView


class TorchDecoder:
    """Decodes with simplejpeg (libjpeg-turbo) in threads, `prefetch` batches at a time.

    `bad_sample(row, reason)` describes what fails.
    """

    backend = "torch"

    def __init__(
        self,
        views: Sequence[CropView],
        *,
        threads: int,
        prefetch: int,
        device: torch.device,
        bad_sample: Callable[[int, str], BadSampleError],
    ) -> None:
        self.device = device
        self._views = tuple(views)
        self._threads = threads
        self._prefetch = prefetch
        self._bad_sample = bad_sample
        self._memory = [ImageMemory(view) for view in self._views]
        self._pool = finishing_pool(threads, "torch-decoder")

    def decode(self, encoded: Iterator[EncodedBatch]) -> Generator[Decoded, None, None]:
        """See `Decoder.decode`."""
        pending: deque[tuple[EncodedBatch, list[torch.Tensor], list[Future[None]]]] = deque()
        try:
            while True:
                while len(pending) < self._prefetch and (batch := next(encoded, None)) is not None:
                    tensors = [memory.empty_images(len(batch.rows)) for memory in self._memory]
                    decode_some = partial(self._decode_some, batch, tensors)
                    tasks = submit_samples(self._pool, decode_some, len(batch.rows), threads=self._threads)
                    pending.append((batch, tensors, tasks))
                if not pending:
                    return
                batch, tensors, tasks = pending.popleft()
                for task in tasks:
                    task.result()
                yield batch, [images.to(self.device) for images in tensors]
        finally:
            for _, _, tasks in pending:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode_some(self, batch: EncodedBatch, tensors: list[torch.Tensor], indices: range) -> None:
        """Decode samples and write each view of them into tensors[view]."""
        patches = [self._decoded(batch, index) for index in indices]
        for view, windows, changes, images in zip(self._views, batch.windows, batch.changes, tensors, strict=True):
            finish_samples(view, patches, windows, changes, indices.start, images)

    def _decoded(self, batch: EncodedBatch, index: int) -> npt.NDArray[np.uint8]:
        try:
            # Strict: what libjpeg would repair with a warning is damage here.
            return simplejpeg.decode_jpeg(batch.samples[index].jpeg, "RGB", strict=True)
        except ValueError as error:
            raise self._bad_sample(int(batch.rows[index]), f"it does not decode ({error})") from error
