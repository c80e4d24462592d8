"""`engine doctor`: what is wrong on this machine, found by doing the work in small.

It paints a slide, reads it with each reader, shards it, and loads a batch of it with each loader; versions and limits
are checked beside that. Every check ends in PASS, WARN or FAIL, the latter two with what to do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from engine.console import say

_PACKAGES = (
    "pathology-engine",
    "torch",
    "torchvision",
    "timm",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "cucim-cu12",
    "cucim-cu13",
    "openslide-python",
    "simplejpeg",
    "ray",
    "webdataset",
    "zarr",
    "pyarrow",
    "polars",
    "numpy",
)
_MIN_RAY = (2, 54)  # the first without CVE-2026-27482
_MIN_FREE_BYTES = 5 << 30
_MIN_OPEN_FILES = 1024


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fix` says what to do where `status` is not PASS."""

    name: str
    status: Literal["PASS", "WARN", "FAIL"]
    detail: str
    fix: str = ""


def run() -> dict[str, Any]:
    """{"ok": bool, "checks": [{name, status, detail, fix}], "versions": {...}}; ok is False where a check failed."""
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        say(f"{check.status}  {check.name}: {check.detail}" + (f"  -> {check.fix}" if check.fix else ""))

    for one in (_python, _cuda, _ray, _disk, _open_files):
        note(_guarded(one))
    with tempfile.TemporaryDirectory(prefix="engine-doctor-") as folder:
        for check in _in_small(Path(folder)):
            note(check)
    return {
        "ok": all(check.status != "FAIL" for check in checks),
        "checks": [asdict(check) for check in checks],
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever breaks is the finding
        name = check.__name__.strip("_").replace("_", " ")
        return Check(name, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}", "see the message")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    text = f"{platform.python_version()} on {platform.platform()}, {sys.prefix}"
    return Check("python", "PASS" if sys.version_info >= (3, 11) else "FAIL", text)


def _cuda() -> Check:
    """torch, DALI and cuCIM must all have been built for a CUDA version that the driver supports."""
    import torch

    built = torch.version.cuda
    needed = {"torch": int(built.split(".")[0])} if built else {}
    for name in _PACKAGES:
        found = re.match(r"(nvidia-dali|cucim)-cu(?:da)?(\d\d)", name)
        if found and _version(name):
            needed[name] = int(found.group(2))
    parts = ", ".join(f"{name} for CUDA {major}" for name, major in needed.items())
    driver = _driver_cuda()
    if driver is None:
        return Check("cuda", "PASS", f"no NVIDIA driver, so everything runs on the CPU ({parts})")
    text = f"driver for CUDA {driver[0]}.{driver[1]}, {parts}"
    newer = [name for name, major in needed.items() if major > driver[0]]
    if newer:
        return Check("cuda", "FAIL", text, f"update the driver, or install builds of {', '.join(newer)} for its CUDA")
    if built is None:
        return Check("cuda", "FAIL", text, "this torch is a CPU build: install the pinned one (constraints.txt)")
    if not torch.cuda.is_available():
        return Check("cuda", "FAIL", f"{text}; torch sees no GPU", "see nvidia-smi and CUDA_VISIBLE_DEVICES")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("cuda", "PASS", f"{', '.join(names)}; {text}")


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the installed driver supports, or None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _ray() -> Check:
    found = _version("ray")
    if found is None:
        return Check("ray", "WARN", "not installed", "pip install ray, or run with --local")
    if tuple(int(part) for part in found.split(".")[:2]) < _MIN_RAY:
        wanted = ".".join(map(str, _MIN_RAY))
        return Check("ray", "FAIL", f"{found} has a known hole in its dashboard", f"install {wanted} or newer")
    return Check("ray", "PASS", found)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.0f} GB free in {Path.cwd()}"
    return Check("disk", "PASS", text) if free >= _MIN_FREE_BYTES else Check("disk", "WARN", text, "free some space")


def _open_files() -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} files may be open at once (hard limit {hard})"
    if soft < _MIN_OPEN_FILES:
        return Check("open files", "WARN", text, f"ulimit -n {_MIN_OPEN_FILES}")
    return Check("open files", "PASS", text)


def _in_small(folder: Path) -> list[Check]:
    """Paint, read, shard, verify and load a slide of 1024 px."""
    from engine.synth import run as synth

    try:
        synth(folder / "slides", slides=1, size=1024, workers=1)
    except Exception as error:
        return [Check("synth", "FAIL", f"cannot paint a slide: {error}", "see the message")]
    slide = folder / "slides" / "synth-0000.svs"
    pixels: dict[str, Any] = {}
    checks = [_read(name, slide, pixels) for name in ("cucim", "openslide")]
    if len(pixels) == 2:
        same = bool((pixels["cucim"] == pixels["openslide"]).all())
        if same:
            checks.append(Check("readers agree", "PASS", "cuCIM and OpenSlide return the same pixels"))
        else:
            fix = "name one reader in the recipe (reader=openslide)"
            checks.append(Check("readers agree", "FAIL", "cuCIM and OpenSlide return different pixels", fix))
    checks += _dataset(folder, slide)
    return checks


def _read(name: Literal["cucim", "openslide"], slide: Path, pixels: dict[str, Any]) -> Check:
    from sharding.slide import open_slide

    try:
        with open_slide(slide, name) as opened:
            pixels[name] = opened.read(0, 0, 0, 1024, 1024)
            spacing = opened.spacing()
    except Exception as error:  # the reader's own reason is the finding
        fallback = (
            "OpenSlide reads in its place" if name == "cucim" else "slides other than JPEG-tiled TIFF cannot be read"
        )
        status: Literal["WARN", "FAIL"] = "WARN" if name == "cucim" else "FAIL"
        return Check(f"reader {name}", status, f"{error}; {fallback}", f"install {name} (see the README)")
    assert spacing is not None
    return Check(f"reader {name}", "PASS", f"read a painted slide at {spacing.x_um:g} um/px")


def _dataset(folder: Path, slide: Path) -> list[Check]:
    from engine.recipes import ShardRecipe
    from engine.shard import run as shard
    from sharding.verify import verify_dataset

    recipe = ShardRecipe(slides=str(slide), out=folder / "dataset", min_tissue=0.0, workers=1)
    try:
        shard(recipe, local=True)
        result = verify_dataset(folder / "dataset")
    except Exception as error:
        return [Check("shard", "FAIL", f"{type(error).__name__}: {error}", "see the message")]
    checks = [
        Check("shard", "PASS", f"{result['samples']} patches written and verified")
        if result["ok"]
        else Check("shard", "FAIL", str(result["bad"][0]), "the disk does not return what was written")
    ]
    return [*checks, *(_load(folder / "dataset", name) for name in ("dali", "torch"))]


def _load(dataset: Path, backend: Literal["dali", "torch"]) -> Check:
    from engine.data import CropView, open_loader

    try:
        with open_loader(dataset, batch_size_per_rank=4, views=[CropView(224)], backend=backend) as loader:
            batch = next(loader)
            device = str(loader.device)
    except Exception as error:  # DALI's errors come in kinds of its own
        fix = "install nvidia-dali-cuda120 (Linux), or train with loader=torch"
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Check(f"loader {backend}", "WARN" if backend == "dali" else "FAIL", text, fix)
    return Check(f"loader {backend}", "PASS", f"a batch of {tuple(batch.images[0].shape)} on {device}")


def describe(result: dict[str, Any]) -> str:
    """The verdict for a person; the checks themselves were printed as they were made."""
    bad = [check for check in result["checks"] if check["status"] == "FAIL"]
    warned = [check for check in result["checks"] if check["status"] == "WARN"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    verdict = f"{len(bad)} checks failed" if bad else "this machine is ready"
    return f"{versions}\n{verdict}" + (f", {len(warned)} warnings" if warned else "") + f" ({os.cpu_count()} cores)"
