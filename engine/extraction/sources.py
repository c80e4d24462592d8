"""The patches of one slide, from a dataset or from the slide itself: which they are, and their pixels.

Patches come in the order of (row, col) of the grid. A stored sample is checked against its crc32; a slide is read as
`engine shard` reads it, so its patches and pixels are those that would be stored, without the JPEG between them where a
patch is no copy of a TIFF tile.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from PIL import Image

from engine.data.reading import BadSampleError, SampleReader
from sharding.encode import read_patch
from sharding.faults import fault_point
from sharding.index import Dataset
from sharding.plan import SlidePlan, plan_slide
from sharding.slide import DamagedTileError, Slide, SlideError, fingerprint, open_slide
from sharding.stage import SlideJob, bad_reason, unexpected

Pixels = npt.NDArray[np.uint8]
Fit = Literal["exact", "crop", "resize"]

# Columns of a store's rows, in their order; x0 and y0 become the array xy0.
COLUMNS = ("sample_id", "row", "col", "level", "read_px", "mpp", "tissue_fraction", "flags", "region")
_PATCHES_PER_TASK = 16


class SlideFailureError(Exception):
    """A slide gives no embeddings; the message is the reason."""


@dataclass(frozen=True, slots=True)
class SlideTask:
    """One slide of a run: `patches` of the sorted rows from `first` on, or a slide to be read (`job`).

    Of a slide that is read `patches` is a guess by its size. `identity` is what the store keeps of the slide's origin.
    """

    slide_id: str
    patches: int
    identity: dict[str, Any]
    first: int = 0
    job: SlideJob | None = None


class OpenSlide(Protocol):
    """An open slide. `rows` has COLUMNS, `xy0` is int32 [patches, 2], both in the order of the patches."""

    task: SlideTask
    rows: pa.Table
    xy0: npt.NDArray[np.int32]

    def submit(self, pool: ThreadPoolExecutor, first: int, out: Pixels) -> list[Future[dict[int, str]]]:
        """Read patches `first`, `first + 1` ... into `out`, uint8 [n, px, px, 3], in tasks of the pool.

        A task returns the damaged patches that are to be left out, place -> reason, and raises where the slide fails.
        """
        ...

    def failure(self, damaged: dict[int, str]) -> str:
        """Why so many damaged patches are too many; empty where they are not."""
        ...

    def close(self) -> None: ...


def reason_of(error: Exception) -> str:
    """What a slide's failure is put down to."""
    if isinstance(error, SlideError | SlideFailureError | BadSampleError | OSError):
        return " ".join(str(error).split())
    return unexpected(error)


def fitted(pixels: Pixels, out: Pixels, fit: Fit) -> None:
    """Write a patch [side, side, 3] into `out` [px, px, 3]: cut from its centre, or resized (Pillow's bicubic)."""
    px = out.shape[0]
    if fit == "resize" and len(pixels) != px:
        out[:] = np.asarray(Image.fromarray(pixels).resize((px, px), Image.Resampling.BICUBIC))
        return
    margin = (len(pixels) - px) // 2
    out[:] = pixels[margin : margin + px, margin : margin + px]


class StoredSlide:
    """A slide of a dataset. A damaged sample is the slide's failure."""

    def __init__(self, reader: SampleReader, sorted_rows: Path, task: SlideTask, fit: Fit) -> None:
        import polars as pl

        self.task = task
        table = pl.scan_parquet(sorted_rows).slice(task.first, task.patches).collect().to_arrow()
        found = set(table.column("slide_id").unique().to_pylist())
        assert found == {task.slide_id}, f"{sorted_rows} has {found} where {task.slide_id} is expected"
        self.rows = table.select(COLUMNS)
        self.xy0 = np.stack([table.column(name).to_numpy() for name in ("x0", "y0")], axis=1).astype(np.int32)
        self._reader, self._fit = reader, fit
        self._numbers = table.column("number").to_numpy().astype(np.int64)

    def submit(self, pool: ThreadPoolExecutor, first: int, out: Pixels) -> list[Future[dict[int, str]]]:
        """See OpenSlide."""
        numbers = self._numbers[first : first + len(out)]
        pending = self._reader.submit(numbers)

        def decode(start: int, stop: int) -> dict[int, str]:
            fault_point("extract.read")
            samples = self._reader.collect(pending[start:stop])
            for place, sample in enumerate(samples, start):
                try:
                    if out.shape[1] == self._reader.patch_px:
                        simplejpeg.decode_jpeg(sample.jpeg, "RGB", buffer=out[place], strict=True)
                    else:
                        fitted(simplejpeg.decode_jpeg(sample.jpeg, "RGB", strict=True), out[place], self._fit)
                except ValueError as error:
                    bad = self._reader.bad_sample(int(numbers[place]), f"it does not decode ({error})")
                    raise bad from error
            return {}

        return [pool.submit(decode, *part) for part in _parts(len(out))]

    def failure(self, damaged: dict[int, str]) -> str:
        """See OpenSlide."""
        return ""

    def close(self) -> None:
        """See OpenSlide."""


class ReadSlide:
    """A slide that is planned and read here. Damaged patches are left out, as `engine shard` does."""

    def __init__(self, task: SlideTask, fit: Fit) -> None:
        assert task.job is not None
        self.task, self._job, self._fit = task, task.job, fit
        self._idle: queue.SimpleQueue[Slide] = queue.SimpleQueue()
        if fingerprint(Path(self._job.path)) != self._job.fingerprint:
            raise SlideError("the file changed since the run began; run again")
        with self._slide() as slide:
            self._plan = plan_slide(
                slide, self._job.fingerprint, self._job.options, mpp_override=self._job.mpp_override
            )
        rows = self._plan.rows
        if self._plan.num_patches == 0:
            self.close()
            raise SlideFailureError("no patch holds enough tissue")
        self.rows, self.xy0 = _described(self._plan), np.stack([rows["x0"], rows["y0"]], axis=1)

    def submit(self, pool: ThreadPoolExecutor, first: int, out: Pixels) -> list[Future[dict[int, str]]]:
        """See OpenSlide."""
        window_x, window_y = (axis[first : first + len(out)].tolist() for axis in self._plan.windows())
        cells = self._plan.rows[["col", "row"]][first : first + len(out)].tolist()

        def read(start: int, stop: int) -> dict[int, str]:
            fault_point("extract.read")
            damaged = {}
            with self._slide() as slide:
                for place in range(start, stop):
                    try:
                        fitted(
                            self._pixels(slide, cells[place], window_x[place], window_y[place]), out[place], self._fit
                        )
                    except DamagedTileError as error:
                        damaged[first + place] = str(error)
            return damaged

        return [pool.submit(read, *part) for part in _parts(len(out))]

    def _pixels(self, slide: Slide, cell: tuple[int, int], window_x: float, window_y: float) -> Pixels:
        geometry = self._plan.geometry
        if self._plan.copies:
            tile = slide.copy_tile(geometry.level, *cell, pixels=True)
            if tile is not None and tile.pixels is not None:
                return tile.pixels
        return read_patch(slide, geometry, window_x, window_y)

    @contextlib.contextmanager
    def _slide(self) -> Iterator[Slide]:
        """An open slide for one thread: one that is idle, or another; neither readers nor their caches are shared."""
        try:
            slide = self._idle.get_nowait()
        except queue.Empty:
            slide = open_slide(Path(self._job.path), self._job.options.reader)
        try:
            yield slide
        finally:
            self._idle.put(slide)

    def failure(self, damaged: dict[int, str]) -> str:
        """See OpenSlide."""
        planned, most = self._plan.num_patches, self._job.options.max_bad_fraction
        if len(damaged) / planned <= most and len(damaged) < planned:
            return ""
        return f"{bad_reason(damaged, planned)}: more than patches.max_bad_fraction={most:g} of the slide"

    def close(self) -> None:
        """See OpenSlide."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


def _described(plan: SlidePlan) -> pa.Table:
    """A plan's rows with the types that index.parquet has."""
    rows, geometry, count = plan.rows, plan.geometry, plan.num_patches
    region = pa.array(rows["region"], pa.int64(), mask=rows["region"] < 0)
    return pa.table(
        {
            "sample_id": rows["sample_id"],
            "row": rows["row"],
            "col": rows["col"],
            "level": np.full(count, geometry.level, np.uint8),
            "read_px": np.full(count, geometry.read_px, np.int32),
            "mpp": pa.array([geometry.mpp] * count, pa.float64()),
            "tissue_fraction": rows["tissue_fraction"],
            "flags": rows["flags"],
            "region": region,
        }
    ).select(COLUMNS)


def _parts(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _PATCHES_PER_TASK):
        yield start, min(start + _PATCHES_PER_TASK, count)


def sort_rows(dataset: Dataset, path: Path) -> dict[str, tuple[int, int]]:
    """Write a dataset's rows, sorted by slide, row and col, to `path`; returns slide_id -> (first, number of rows).

    Columns: number (of the row in index.parquet), slide_id, x0, y0 and COLUMNS.
    """
    import polars as pl

    from sharding.atomic import atomic_path

    index = pl.scan_parquet(dataset.file("index.parquet")).with_row_index("number")
    wanted = index.select("number", "slide_id", "x0", "y0", *COLUMNS)
    with atomic_path(path) as temporary:
        wanted.sort("slide_id", "row", "col").sink_parquet(temporary, row_group_size=1 << 15)
    counts = index.group_by("slide_id").len().sort("slide_id").collect()
    found, first = {}, 0
    for slide_id, count in counts.iter_rows():
        found[slide_id] = (first, count)
        first += count
    return found
