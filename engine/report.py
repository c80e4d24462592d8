"""`engine report`: a dataset on one page that can be read offline and sent around.

The page holds no path, no host and none of the user's further columns. It is a function of the dataset's files alone.
The index is streamed; of a large dataset all slides are counted, and a stated sample of them is listed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from engine.figures import Histogram, as_count, as_duration, as_number, as_share, as_size, binned, histogram
from sharding.atomic import atomic_path
from sharding.dataset import RESERVED_COLUMNS
from sharding.index import (
    FLAG_BLURRED,
    FLAG_OUTSIDE,
    FLAG_PARTIAL_REGION,
    FLAG_WHITE,
    DatasetDamagedError,
    read_meta,
)
from sharding.qc import qc_name

_MAX_LISTED = 5000
_MAX_PICTURES = 1000
_MAX_PICTURES_BYTES = 6_000_000  # pictures that are larger together are reduced
_REDUCED_PX = 288
_REDUCED_QUALITY = 45
_BATCH_ROWS = 1 << 18
_FLAG_NAMES = {
    FLAG_OUTSIDE: "reaches beyond the slide",
    FLAG_WHITE: "white",
    FLAG_BLURRED: "blurred",
    FLAG_PARTIAL_REGION: "in a partial region",
}
_FRACTION_EDGES = np.linspace(0.0, 1.0, 21)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Status = Literal["done", "damaged", "empty", "quarantined"]


@dataclass(slots=True)
class _Slide:
    """A row of the page's table. `tissue` is the share of the slide's area that is stored tissue."""

    slide_id: str
    status: Status
    reason: str
    mpp: float | None
    mpp_source: str
    width_px0: int
    height_px0: int
    levels: int
    damaged: int
    patches: int = 0
    routes: dict[str, int] = field(default_factory=dict)
    tissue: float | None = None
    seconds: float | None = None
    picture: str = ""  # a data URI

    @property
    def failed(self) -> bool:
        return self.status != "done"


@dataclass(slots=True)
class _IndexSums:
    """What is summed over index.parquet; arrays [slides] unless stated. `mpp` is the stored spacing, NaN if unknown."""

    routes: dict[str, IntArray]
    tissue: FloatArray
    mpp: FloatArray
    fractions: IntArray  # [20], patches in bins of their tissue fraction
    flags: dict[int, int]  # bit -> patches


@dataclass(slots=True)
class _Log:
    """log.jsonl, the last line of each slide: slide_id -> seconds and patches. `unreadable` counts broken lines."""

    seconds: dict[str, float]
    patches: dict[str, int]
    unreadable: int = 0

    @property
    def rate(self) -> float | None:
        """Patches per second of one process."""
        total_s = sum(self.seconds.values())
        return sum(self.patches.values()) / total_s if total_s else None


def run(dataset: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the page to `out` (DATASET/report.html where None), atomically: {"report", "slides", "bytes"}.

    Raises ValueError where there is no finished dataset or no folder for the page, DatasetDamagedError where the
    dataset's lists are damaged or contradict each other.
    """
    meta = read_meta(dataset)
    out = dataset / "report.html" if out is None else out
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out={out}: expected a file in a folder that exists.")
    with _intact(dataset / "slides.parquet") as path:
        slides, further = _read_slides(path)
    with _intact(dataset / "index.parquet") as path:
        sums = _read_index(path, [slide.slide_id for slide in slides])
    if (num_rows := sum(int(counts.sum()) for counts in sums.routes.values())) != meta["counts"]["patches"]:
        raise DatasetDamagedError(
            f"{dataset / 'index.parquet'} has {num_rows} rows, dataset.json says {meta['counts']['patches']}; "
            f"see `engine verify {dataset}`"
        )
    log = _read_log(dataset / "log.jsonl")
    _complete(slides, sums, log, meta["recipe"].get("stride_px"))
    listed = _chosen(slides, _MAX_LISTED)
    reduced = _add_pictures(listed, dataset / "qc")

    folder = files("engine") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=PackageLoader("engine"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": as_number, "share": as_share, "size": as_size, "duration": as_duration}
    page = environment.get_template("report.html").stream(
        name=dataset.resolve().name,
        meta=meta,
        slides=slides,
        listed=listed,
        failures=[slide for slide in listed if slide.failed],
        num_failures=sum(slide.failed for slide in slides),
        reduced=reduced,
        num_pictures=sum(bool(slide.picture) for slide in listed),
        routes={name: int(counts.sum()) for name, counts in sums.routes.items()},
        timings=sorted(log.seconds.values()) if log else [],
        flags=[(_FLAG_NAMES.get(bit, f"bit {bit.bit_length() - 1}"), sums.flags[bit]) for bit in sorted(sums.flags)],
        charts=_charts(slides, sums),
        log=log,
        further=further,
        # Markup: these two are ours, and are the only text that is not escaped.
        style=Markup(style),
        script=Markup(script),
        script_hash=_csp_hash(script),
    )
    with atomic_path(out) as temporary:
        page.dump(str(temporary), encoding="utf-8")
        size_bytes = temporary.stat().st_size
    return {"report": str(out), "slides": len(slides), "bytes": size_bytes}


def describe(result: dict[str, Any]) -> str:
    """The result for a person."""
    size = as_size(result["bytes"])
    return f"{result['report']}: {as_count(result['slides'], 'slide')}, {size}; open it in any browser"


# --- what is read


@contextlib.contextmanager
def _intact(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (pa.ArrowException, FileNotFoundError) as error:
        raise DatasetDamagedError(f"{path} is damaged ({error}); see `engine verify {path.parent}`") from None


def _read_slides(path: Path) -> tuple[list[_Slide], list[str]]:
    """The slides in the order of their ids, and the names of the user's further columns."""
    schema = pq.read_schema(path)
    table = pq.read_table(path, columns=[name for name in schema.names if name in RESERVED_COLUMNS])
    slides = []
    for row in table.to_pylist():
        status: Status = row["status"]
        if status == "done" and row["patches_quarantined"]:
            status = "damaged"
        elif status == "done" and not row["patches"]:
            status = "empty"
        slides.append(
            _Slide(
                slide_id=row["slide_id"],
                status=status,
                reason=_without_places(row["reason"], row["path"], row["slide_id"]),
                mpp=row["mpp"],
                mpp_source=row["mpp_source"],
                width_px0=row["width_px0"],
                height_px0=row["height_px0"],
                levels=row["levels"],
                damaged=row["patches_quarantined"],
            )
        )
    return slides, [name for name in schema.names if name not in RESERVED_COLUMNS]


def _without_places(reason: str, path: str, slide_id: str) -> str:
    """`reason` without the slide's path and file name (which may name a patient) and without any other path."""
    if not reason or not path:
        return reason
    file = Path(path)
    rest = r"[^\s:,;'\"()]*"
    # The file, the folder of its name beside it (MRXS), its name; then what is in its folder, and any other path.
    slide = f"{re.escape(path)}|{re.escape(str(file.parent / file.stem))}(?=/)|{re.escape(file.name)}"
    folder = re.escape(f"{file.parent}/") + rest if file.parent != Path(file.root) else "(?!)"
    other = rf"(?<![\w.%)])/(?:[^\s/:,;'\"()]+/)+{rest}"
    return re.sub(f"({slide})|{folder}|{other}", lambda match: slide_id if match[1] else "[path]", reason)


def _read_index(path: Path, slide_ids: Sequence[str]) -> _IndexSums:
    """Stream the columns that are summed; memory does not grow with the number of rows."""
    position = {slide_id: i for i, slide_id in enumerate(slide_ids)}
    count = len(slide_ids)
    sums = _IndexSums({}, np.zeros(count), np.full(count, np.nan), np.zeros(len(_FRACTION_EDGES) - 1, np.int64), {})
    # pre_buffer keeps what it has read until the end: 0.5 GB of 100 M rows.
    with pq.ParquetFile(path, read_dictionary=["slide_id", "route"], pre_buffer=False) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=["slide_id", "mpp", "tissue_fraction", "flags", "route"]):
            slide_id = batch.column("slide_id")
            try:
                positions = np.array([position[name] for name in slide_id.dictionary.to_pylist()], np.int64)
            except KeyError as error:
                raise DatasetDamagedError(
                    f"{path} holds patches of slide {error}, which slides.parquet does not list; "
                    f"see `engine verify {path.parent}`"
                ) from None
            slide = positions[slide_id.indices.to_numpy()]
            fraction = batch.column("tissue_fraction").to_numpy().astype(np.float64)
            sums.tissue += np.bincount(slide, fraction, count)
            sums.fractions += np.histogram(np.clip(fraction, 0, 1), len(sums.fractions), (0.0, 1.0))[0]
            sums.mpp[slide] = batch.column("mpp").to_numpy(zero_copy_only=False)
            route = batch.column("route")
            for number, name in enumerate(route.dictionary.to_pylist()):
                of_route = np.bincount(slide[route.indices.to_numpy() == number], minlength=count)
                sums.routes[name] = sums.routes.get(name, 0) + of_route
            flags = batch.column("flags").to_numpy()
            present = int(np.bitwise_or.reduce(flags, initial=0))
            for bit in (1 << i for i in range(present.bit_length()) if present >> i & 1):
                sums.flags[bit] = sums.flags.get(bit, 0) + int(np.count_nonzero(flags & bit))
    sums.routes = dict(sorted(sums.routes.items()))
    return sums


def _read_log(path: Path) -> _Log | None:
    """None where there is no log. Lines that concern no slide are passed over."""
    if not path.is_file():
        return None
    log = _Log({}, {})
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                if "seconds" in entry and "slide_id" in entry:
                    patches, seconds = int(entry["patches"]), float(entry["seconds"])
                    log.patches[entry["slide_id"]], log.seconds[entry["slide_id"]] = patches, seconds
            except (ValueError, TypeError, KeyError):  # an interrupted writer leaves half a line
                log.unreadable += 1
    return log


def _complete(slides: list[_Slide], sums: _IndexSums, log: _Log | None, stride_px: int | None) -> None:
    """Add to each slide what index and log say of it."""
    for i, slide in enumerate(slides):
        slide.routes = {name: int(counts[i]) for name, counts in sums.routes.items()}
        slide.patches = sum(slide.routes.values())
        slide.seconds = None if log is None else log.seconds.get(slide.slide_id)
        area_px0 = slide.width_px0 * slide.height_px0
        if stride_px is not None and area_px0 and slide.status != "quarantined":
            # Without a spacing level 0 is stored as it is.
            cell_px0 = stride_px * (float(sums.mpp[i]) / slide.mpp if slide.mpp and slide.patches else 1.0)
            slide.tissue = float(sums.tissue[i]) * cell_px0**2 / area_px0


def _chosen(slides: list[_Slide], most: int) -> list[_Slide]:
    """At most `most` slides: those that failed first, then the others, each in order and evenly spaced if too many."""
    failed = _spaced([slide for slide in slides if slide.failed], most)
    return failed + _spaced([slide for slide in slides if not slide.failed], most - len(failed))


def _spaced(slides: list[_Slide], most: int) -> list[_Slide]:
    return slides if len(slides) <= most else [slides[i * len(slides) // most] for i in range(most)]


# --- pictures


def _add_pictures(slides: list[_Slide], folder: Path) -> bool:
    """Inline the pictures that are there: as they are, or reduced (True) where all of them together are too large."""
    paths = {slide.slide_id: folder / qc_name(slide.slide_id) for slide in slides}
    pictured = _chosen([slide for slide in slides if paths[slide.slide_id].is_file()], _MAX_PICTURES)
    reduce = sum(paths[slide.slide_id].stat().st_size for slide in pictured) > _MAX_PICTURES_BYTES
    for slide in pictured:
        path = paths[slide.slide_id]
        data = _reduced(path) if reduce else path.read_bytes()
        slide.picture = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return reduce


def _reduced(path: Path) -> bytes:
    size = (_REDUCED_PX, _REDUCED_PX)
    with Image.open(path, formats=["JPEG"]) as image:
        image.draft("RGB", size)
        image.thumbnail(size, Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_REDUCED_QUALITY, optimize=True)
    return buffer.getvalue()


def _charts(slides: list[_Slide], sums: _IndexSums) -> list[Histogram]:
    done = [slide for slide in slides if slide.status != "quarantined"]
    return [
        histogram("Patches a slide", "slide", *binned([s.patches for s in done])),
        histogram("Spacing of level 0, µm/px", "slide", *binned([s.mpp for s in done if s.mpp is not None])),
        histogram("Tissue, share of the slide", "slide", *binned([s.tissue for s in done if s.tissue is not None])),
        histogram("Tissue, share of the patch", "patch", _FRACTION_EDGES, sums.fractions),
        histogram("Seconds a slide", "slide", *binned([s.seconds for s in slides if s.seconds is not None])),
    ]


def _csp_hash(script: str) -> str:
    """The page runs this script and no other, whatever a slide's id may hold."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
