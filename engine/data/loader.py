"""The patch loader: plans batches, reads them ahead, has a decoder decode them, and counts what was delivered.

Everything that decides *what* is delivered lives here and in the modules it calls; a decoder only turns encoded samples
and windows into tensors. That is why two backends give the same batches, and why one integer, `seen`, is the state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from engine.data.ahead import OneAhead, making_thread
from engine.data.augment import Changes
from engine.data.batches import Decoded, Decoder, EncodedBatch, PatchBatch
from engine.data.draws import DRAWS_VERSION
from engine.data.finish import changes_of
from engine.data.order import Stream, planned_rows
from engine.data.reading import Pending, SampleReader
from engine.data.views import CropView, CropWindows, draw_view
from sharding.index import Dataset

Rows = npt.NDArray[np.int64]

_DRAWN_TOGETHER = 256  # patches: to draw for so many takes little longer than for one


@dataclass(slots=True)
class _Ahead:
    """A batch that is planned, see EncodedBatch, and being read."""

    positions: Rows
    rows: Rows
    windows: list[CropWindows]
    changes: list[Changes]
    present: npt.NDArray[np.bool_] | None
    reads: list[Pending] = field(default_factory=list)


class PatchLoader:
    """An endless iterator of PatchBatch. Make one with `open_loader`; leave it with `close` or as a context manager."""

    def __init__(
        self,
        dataset: Dataset,
        reader: SampleReader,
        decoder: Decoder,
        *,
        stream: Stream,
        regions: Rows | None,
        batch_size_per_rank: int,
        views: Sequence[CropView],
        seen: int,
        rank: int,
        world_size: int,
        read_ahead: int,
    ) -> None:
        """`stream` orders rows, or `regions` (see `region_rows`) where these are the samples.

        read_ahead: batches that are read, at least, beside those inside the decoder; encoded batches are small.
        """
        self._reader = reader
        self._decoder = decoder
        self._regions = regions
        self._stream = stream
        self._digest = str(dataset.meta["digest"])
        self._batch_size_per_rank = batch_size_per_rank
        self._batches_at_once = reader.batches_at_once(
            batch_size_per_rank * (1 if regions is None else regions.shape[1])
        )
        self._views = tuple(views)
        self._rank = rank
        self._world_size = world_size
        self._read_ahead = read_ahead
        self._seen = seen
        self._batches: Generator[Decoded, None, None] | OneAhead[Decoded] | None = None
        # On a GPU the decoder has to run in the thread whose stream takes its batches.
        self._thread = making_thread("loader") if decoder.device.type == "cpu" else None
        self._failure: Exception | None = None
        self._interrupted = False
        self._closed = False

    @property
    def seen(self) -> int:
        """Samples delivered so far by all ranks together, prefetched ones not counted."""
        return self._seen

    @property
    def views(self) -> tuple[CropView, ...]:
        """What is delivered of each sample."""
        return self._views

    @property
    def backend(self) -> str:
        """The backend in use, "dali" or "torch"."""
        return self._decoder.backend

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self._decoder.device

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides which samples come next, as plain numbers, strings and lists."""
        return {
            "seen": self._seen,
            "order": self._stream.order,
            "draws": DRAWS_VERSION,
            "seed": int(self._stream.seed),
            "dataset": self._digest,
            "views": [view.as_dict() for view in self._views],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; batch size and world size may differ. Raises ValueError where the rest does."""
        for name, here in self.state_dict().items():
            if name not in state:
                raise ValueError(f"cannot resume: the loader state lacks {name!r}")
            if name != "seen" and state[name] != here:
                raise ValueError(
                    f"cannot resume: {name!r} is {here!r} here, but {state[name]!r} in the saved state; "
                    "resume with what the run was started with, or start a new run"
                )
        seen = checked_seen(state["seen"])
        self._restart()
        self._seen = seen

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PatchBatch:
        """Return the next batch. After an error the loader stands where it stood: at the samples delivered."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._interrupted:
            self._restart()
        if self._batches is None:
            batches = self._decoder.decode(self._encoded_batches(self._seen))
            self._batches = OneAhead(batches, self._thread) if self._thread is not None else batches
        try:
            decoded = next(self._batches, None)
        except Exception:
            self._restart()
            raise
        except BaseException:
            self._interrupted = True  # Ctrl-C must not wait here for what the thread is at: a store may be silent
            raise
        if decoded is None:
            failure = self._failure
            self._restart()
            assert failure is not None, "the stream has no end, so only a failure ends it"
            raise failure
        encoded, images = decoded
        # From the positions that came out, not from a counter of what went in: the two differ by what is prefetched.
        self._seen = int(encoded.positions[0]) + self._batch_size_per_rank * (self._world_size - self._rank)
        sample_ids = np.array([sample.sample_id for sample in encoded.samples], dtype=np.uint64)
        batch = PatchBatch(images, torch.from_numpy(encoded.rows), sample_ids)
        return batch if encoded.present is None else _of_regions(batch, encoded.present)

    def close(self) -> None:
        """Stop all threads and close all files; idempotent. Delivered batches stay valid."""
        if not self._closed:
            self._closed = True
            self._reader.stop()
            self._restart()
            if self._thread is not None:
                self._thread.shutdown()
            self._decoder.close()
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restart(self) -> None:
        """Drop what is prefetched; the next batch is planned anew from `seen`."""
        if self._batches is not None:
            self._batches.close()
        self._batches, self._failure, self._interrupted = None, None, False

    def _encoded_batches(self, first: int) -> Iterator[EncodedBatch]:
        """Plan and read batches ahead, from global position `first` on. It ends only on an error, left in `_failure`.

        Ending, not raising, lets a decoder deliver the good batches it already holds.
        """
        pending: deque[_Ahead] = deque()
        planned = self._plans(first)
        try:
            while True:
                while len(pending) < max(self._read_ahead, self._batches_at_once + 1):
                    together = list(islice(planned, self._batches_at_once))
                    reads = iter(self._reader.submit(np.concatenate([batch.rows for batch in together])))
                    for batch in together:
                        batch.reads = list(islice(reads, len(batch.rows)))
                    pending.extend(together)
                batch = pending.popleft()
                samples = self._reader.collect(batch.reads)
                yield self._repaired(
                    EncodedBatch(batch.positions, batch.rows, samples, batch.windows, batch.changes, batch.present)
                )
        except Exception as failure:
            self._failure = failure
        finally:
            for batch in pending:
                for read in batch.reads:
                    read.task.cancel()

    def _plans(self, first: int) -> Iterator[_Ahead]:
        """Plan batches from global position `first` on, without end."""
        planned = planned_rows(self._stream, self._batch_size_per_rank, self._rank, self._world_size, first=first)
        while True:
            some = [self._patches(*next(planned))]
            size = len(some[0][0])
            some += [self._patches(*next(planned)) for _ in range(_DRAWN_TOGETHER // size - 1)]
            positions = np.concatenate([positions for positions, _, _ in some])
            drawn = [
                draw_view(view, number, seed=self._stream.seed, positions=positions, patch_px=self._reader.patch_px)
                for number, view in enumerate(self._views)
            ]
            for number, (positions, rows, present) in enumerate(some):
                here = slice(number * size, (number + 1) * size)
                windows = [CropWindows(*(field[here] for field in windows)) for windows, _ in drawn]
                yield _Ahead(positions, rows, windows, [changes_of(changes, here) for _, changes in drawn], present)

    def _patches(self, positions: Rows, rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.bool_] | None]:
        """Return positions, rows and `present` of the patches of a batch of samples, or of regions."""
        if self._regions is None:
            return positions, rows.copy(), None  # a delivered batch must not keep all that was planned with it
        rows = self._regions[rows]
        present = rows >= 0
        # Decoders want full batches, so another patch of the region stands in for a missing one. All patches of a
        # region share its position, and with it every draw.
        filled = np.where(present, rows, rows.max(axis=1, keepdims=True)).reshape(-1)
        return positions.repeat(rows.shape[1]), filled, present

    def _repaired(self, batch: EncodedBatch) -> EncodedBatch:
        """Replace bad samples; here there are none, for `collect` has raised."""
        return batch


def _of_regions(batch: PatchBatch, present: npt.NDArray[np.bool_]) -> PatchBatch:
    """Group a batch of patches by region, and take out what only stood in for a missing patch."""
    mask = torch.from_numpy(present)
    for images in batch.images:
        images[(~mask).flatten().to(images.device)] = 0
    return PatchBatch(
        [images.unflatten(0, present.shape) for images in batch.images],
        batch.rows.view(mask.shape).where(mask, -1),
        np.where(present, batch.sample_ids.reshape(present.shape), 0).astype(np.uint64),
        mask,
    )


def checked_seen(seen: int) -> int:
    """Return `seen` (numpy's integers too) as an int if it counts samples, else raise ValueError."""
    if isinstance(seen, bool) or not isinstance(seen, int | np.integer) or seen < 0:
        raise ValueError(f"seen is {seen!r}; it counts delivered samples: a whole number from 0 on")
    return int(seen)
