"""`engine synth`: paint a set of slides with known truth into a folder."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sharding.synth import SlideSpec, paint_slide
from sharding.synth.cohort import LABEL_COLUMNS, label_rows
from sharding.synth.spec import PAINT_VERSION, Photometric, Subsampling

# A process takes about a second to start, in which another one paints this much.
_PROCESS_WORTH_PX = 32_000_000
_MAX_SLIDES = 10_000

# Pixels done by this process and its siblings; set once in each child by `_adopt_counter`.
_counter: Any = None


def run(
    out: Path,
    *,
    slides: int = 4,
    size: int = 4096,
    seed: int = 0,
    mpp: float | None = 0.5,
    tile: int = 256,
    subsampling: str = "4:2:0",
    photometric: str = "ycbcr",
    quality: int = 80,
    pen: bool = False,
    hole: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Paint `slides` slides of `size` x `size` px below `out`; the files are the same for any number of `workers`.

    Writes `SLIDE.svs`, `truth/`, `synth.json` (the arguments) and last `labels.csv` (a slide list with labels). A
    folder that the same arguments finished is left as it is; one they began is completed. Raises ValueError for bad
    arguments and for a folder that holds anything else.

    Returns:
        {out, slides, painted, already_there, labels, pixels, bytes, seconds, workers}; `painted` counts this run's.
    """
    started = perf_counter()
    if not 1 <= slides <= _MAX_SLIDES:
        raise ValueError(f"slides is {slides}; expected 1 to {_MAX_SLIDES}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1, or None to choose")
    specs = [
        SlideSpec(
            seed=seed,
            index=index,
            width_px=size,
            height_px=size,
            mpp=mpp,
            tile_px=tile,
            # SlideSpec checks both.
            subsampling=cast(Subsampling, subsampling),
            photometric=cast(Photometric, photometric),
            quality=quality,
            pen=pen,
            hole=hole,
        )
        for index in range(slides)
    ]
    arguments = {
        "paint_version": PAINT_VERSION,
        "slides": slides,
        "size": size,
        "seed": seed,
        "mpp": mpp,
        "tile": tile,
        "subsampling": subsampling,
        "photometric": photometric,
        "quality": quality,
        "pen": pen,
        "hole": hole,
    }
    console = Console(stderr=True)
    _claim(out, arguments)
    todo = [spec for spec in specs if _finished_truth(out, spec) is None]
    if workers is None:
        workers = min(os.cpu_count() or 1, slides * size * size // _PROCESS_WORTH_PX)
    workers = max(1, min(workers, len(todo)))
    if todo:
        with _progress_bar(console, len(todo) * size * size) as advance:
            _paint_all(todo, out, workers, advance)
    labels = out / "labels.csv"
    if todo or not labels.exists():
        truths = [_finished_truth(out, spec) for spec in specs]
        _write_labels(labels, label_rows(seed, [truth for truth in truths if truth is not None]))
    else:
        console.print(f"{out} is finished already: {slides} slides painted with the same arguments; nothing to do")
    return {
        "out": str(out),
        "slides": slides,
        "painted": len(todo),
        "already_there": slides - len(todo),
        "labels": str(labels),
        "pixels": slides * size * size,
        "bytes": sum((out / f"{spec.slide_id}.svs").stat().st_size for spec in specs),
        "seconds": round(perf_counter() - started, 3),
        "workers": workers,
    }


def _claim(out: Path, arguments: dict[str, Any]) -> None:
    """Make `out` ours by writing synth.json first, or check that it is ours already."""
    note = out / "synth.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; engine synth needs a folder to write slides into")
    if note.exists():
        found = json.loads(note.read_text())
        if found != arguments:
            differing = sorted(k for k in found.keys() | arguments.keys() if found.get(k) != arguments.get(k))
            said = ", ".join(f"{k} {found.get(k)!r} there, {arguments.get(k)!r} asked" for k in differing)
            raise ValueError(f"{out} holds slides painted with other arguments ({said}); choose another folder")
        return
    if out.exists() and (others := sorted(p.name for p in out.iterdir() if not p.name.startswith(".tmp-"))):
        raise ValueError(f"{out} is not empty ({others[0]} ...) and has no synth.json; choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_atomically(note, json.dumps(arguments, indent=2) + "\n")


def _finished_truth(out: Path, spec: SlideSpec) -> dict[str, Any] | None:
    """The slide's truth if the slide is complete: its JSON appears after everything else."""
    path = out / "truth" / f"{spec.slide_id}.json"
    if not (path.exists() and (out / f"{spec.slide_id}.svs").exists()):
        return None
    truth: dict[str, Any] = json.loads(path.read_text())
    return truth


def _paint_all(specs: list[SlideSpec], out: Path, workers: int, advance: Callable[[int], None]) -> None:
    if workers == 1:
        for spec in specs:
            paint_slide(spec, out, progress=advance)
        return
    # spawn: a forked child would inherit the threads and GPU contexts of whoever calls this.
    context = multiprocessing.get_context("spawn")
    counter, shown = context.Value("q", 0), 0
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_adopt_counter, initargs=(counter,)) as pool:
        pending: set[Future[None]] = {pool.submit(_paint_counted, spec, out) for spec in specs}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2)
                for future in done:
                    future.result()
                advance(counter.value - shown)
                shown = counter.value
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _adopt_counter(counter: Any) -> None:
    global _counter  # noqa: PLW0603  # a pool's initialiser has no other way to hand something over
    _counter = counter


def _paint_counted(spec: SlideSpec, out: Path) -> None:
    def count(pixels: int) -> None:
        with _counter.get_lock():
            _counter.value += pixels

    paint_slide(spec, out, progress=count)


@contextmanager
def _progress_bar(console: Console, total_px: int) -> Iterator[Callable[[int], None]]:
    """A rich bar on stderr, silent where stderr is not a terminal; gives the callback that takes pixels done."""
    columns = (TextColumn("painting"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} Mpx"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("paint", total=total_px / 1e6)
        yield lambda pixels: bar.advance(task, pixels / 1e6)


def _write_labels(path: Path, rows: list[dict[str, Any]]) -> None:
    tmp = path.with_name(f".tmp-{path.name}")
    with tmp.open("w", newline="") as file:
        writer = csv.DictWriter(file, LABEL_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _sync_and_rename(tmp, path)


def _write_atomically(path: Path, text: str) -> None:
    tmp = path.with_name(f".tmp-{path.name}")
    tmp.write_text(text)
    _sync_and_rename(tmp, path)


def _sync_and_rename(tmp: Path, path: Path) -> None:
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    tmp.replace(path)
