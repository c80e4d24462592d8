"""What one worker does with jobs: slides are read ahead, embedded in full batches, and written when they are whole.

Two jobs may be at work in one worker: while the encoder computes for one, the other's first batches are read, and the
last ones of the first are written. The encoder serves one batch at a time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from engine.data.reading import SampleReader
from engine.data.selection import open_datasets
from engine.extraction.agreement import EncoderSpec, check_spacing
from engine.extraction.encoders import Encoder
from engine.extraction.feed import Batch, Slide, batches
from engine.extraction.regions import grouped
from engine.extraction.sources import OpenSlide, ReadSlide, SlideFailureError, SlideTask, StoredSlide, reason_of
from engine.stores import write_slide
from engine.stores.layout import SLIDES, folder_name
from sharding.faults import fault_point

# Batches that are being read while one is embedded.
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is made of. `dataset` is a folder or URL, None where slides are read."""

    store: Path
    encoder: EncoderSpec
    dataset: Path | str | None
    sorted_rows: Path
    threads: int
    gpu: bool


@dataclass(frozen=True, slots=True)
class ExtractJob:
    """Slides that a worker embeds together."""

    slides: tuple[SlideTask, ...]


@dataclass(frozen=True, slots=True)
class SlideResult:
    """What became of a slide. `patches` were embedded, `patches_quarantined` left out; `damage` is their reason."""

    slide_id: str
    status: Literal["done", "quarantined", "skipped"]
    reason: str = ""
    patches: int = 0
    patches_quarantined: int = 0
    host: str = ""
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Begun:
    slide: Slide
    embeddings: np.ndarray[Any, np.dtype[np.float32]]
    started: float = field(default_factory=time.monotonic)


class Extractor:
    """Embeds the slides of jobs; may be called from two threads at a time. `number` is that of its GPU."""

    def __init__(self, spec: WorkerSpec, number: int = 0) -> None:
        self._spec = spec
        device = f"cuda:{number % torch.cuda.device_count()}" if spec.gpu else "cpu"
        if not spec.gpu:
            torch.set_num_threads(spec.threads)
        self.encoder = self.make_encoder(spec.encoder, device)
        self._turn = threading.Lock()
        self._pool = ThreadPoolExecutor(spec.threads, thread_name_prefix="patches")
        self._reader: SampleReader | None = None
        if spec.dataset is not None:
            self._reader = SampleReader(open_datasets([spec.dataset]))

    def make_encoder(self, spec: EncoderSpec, device: str) -> Encoder:
        """The encoder; a benchmark has others."""
        return Encoder(spec, device)

    def open(self, task: SlideTask) -> OpenSlide:
        """Open one slide. Raises what makes it fail."""
        if self._reader is None:
            opened: OpenSlide = ReadSlide(task, self._spec.encoder.fit)
        else:
            opened = StoredSlide(self._reader, self._spec.sorted_rows, task, self._spec.encoder.fit)
        mpp = opened.rows.column("mpp")[0].as_py()
        if reason := check_spacing(self._spec.encoder, float("nan") if mpp is None else mpp):
            opened.close()
            raise SlideFailureError(f"{reason}; override=spacing takes it all the same")
        return opened

    def __call__(self, job: ExtractJob) -> list[SlideResult]:
        """Do one job; slides that the store has already are skipped. A slide that fails is a result, no exception."""
        run = _Run(self, job)
        with contextlib.closing(run):
            return run.results()

    def embed(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Embed a batch, float32 [filled, dim]."""
        with self._turn:
            found = self.encoder.patches(batch.images)
        return found.cpu().numpy()[: batch.filled]

    def write(self, begun: _Begun) -> SlideResult:
        """Write a slide whose patches are all embedded, and say what became of it."""
        slide, task = begun.slide, begun.slide.open.task
        reason = slide.failure or slide.open.failure(slide.damaged)
        if not reason:
            try:
                self._write(begun)
            except ValueError as error:  # a value that the store's dtype does not hold
                reason = str(error)
        seconds = round(time.monotonic() - begun.started, 3)
        if reason:
            return SlideResult(task.slide_id, "quarantined", reason, host=socket.gethostname(), seconds=seconds)
        return SlideResult(
            task.slide_id,
            "done",
            next(iter(slide.damaged.values()), ""),
            slide.patches - len(slide.damaged),
            len(slide.damaged),
            socket.gethostname(),
            seconds,
        )

    def _write(self, begun: _Begun) -> None:
        slide, task = begun.slide, begun.slide.open.task
        keep = np.ones(slide.patches, bool)
        keep[list(slide.damaged)] = False
        rows: pa.Table = slide.open.rows.filter(pa.array(keep))
        xy0, embeddings = slide.open.xy0[keep], begun.embeddings[keep]
        spec, encoder = self._spec.encoder, self.encoder
        if spec.side is None:
            arrays: dict[str, Any] = {"embedding": embeddings}
        else:
            found = grouped(rows, xy0, spec.side, spec.partial)
            rows, xy0, present = found.rows, found.xy0, found.places >= 0
            with self._turn:
                outputs = encoder.regions(embeddings[found.places], present)
            arrays = encoder.named(outputs) | {"present": present}
        attributes = task.identity | {"patches_quarantined": len(slide.damaged)}
        fault_point("extract.before_slide")
        write_slide(self._spec.store, task.slide_id, {**arrays, "xy0": xy0}, rows, attributes)


class _Run:
    """One job on its way through a worker."""

    def __init__(self, worker: Extractor, job: ExtractJob) -> None:
        self._worker, self._job = worker, job
        self._results: list[SlideResult] = []
        self._begun: dict[Slide, _Begun] = {}
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="open")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: list[Future[SlideResult]] = []

    def results(self) -> list[SlideResult]:
        worker = self._worker
        spec, encoder = worker._spec, worker.encoder
        feed = batches(
            self._slides(),
            worker._pool,
            batch_size=encoder.batch_size,
            px=spec.encoder.input_px,
            ahead=_AHEAD,
            pinned=spec.gpu,
        )
        for batch in feed:
            fault_point("extract.batch")
            self._take(batch, worker.embed(batch))
        for slide in list(self._begun):  # those that failed before all of their patches were read
            self._finish(slide)
        return self._results + [future.result() for future in self._writing]

    def _slides(self) -> Iterator[Slide]:
        """The slides of the job, the next one being opened while one is read."""
        tasks = []
        for task in self._job.slides:
            if (self._worker._spec.store / SLIDES / folder_name(task.slide_id)).is_dir():
                self._results.append(SlideResult(task.slide_id, "skipped"))
            else:
                tasks.append(task)
        opening = [self._opener.submit(self._worker.open, task) for task in tasks[:1]]
        for number, task in enumerate(tasks):
            opening += [self._opener.submit(self._worker.open, after) for after in tasks[number + 1 : number + 2]]
            try:
                slide = Slide(opening[number].result())
            except Exception as error:
                self._results.append(
                    SlideResult(task.slide_id, "quarantined", reason_of(error), host=socket.gethostname())
                )
                continue
            self._begun[slide] = _Begun(slide, np.empty((slide.patches, self._worker.encoder.dim), np.float32))
            yield slide

    def _take(self, batch: Batch, embeddings: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        for part in batch.parts:
            slide = part.slide
            begun = self._begun.get(slide)
            if begun is None:
                continue
            begun.embeddings[part.first : part.first + part.count] = embeddings[part.at : part.at + part.count]
            slide.done += part.count
            if slide.done == slide.patches:
                self._finish(slide)

    def _finish(self, slide: Slide) -> None:
        begun = self._begun.pop(slide)
        slide.open.close()
        while sum(not future.done() for future in self._writing) > 1:
            next(future for future in self._writing if not future.done()).result()
        self._writing.append(self._writer.submit(self._worker.write, begun))

    def close(self) -> None:
        for slide in self._begun:
            slide.open.close()
        self._opener.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
