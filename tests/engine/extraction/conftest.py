"""Extraction runs on small datasets, and the plain loop that they are compared with."""

from __future__ import annotations

import io
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from engine import extract, shard
from engine.cluster import Finished
from engine.config import apply_overrides, read_recipe
from engine.extract_recipe import ExtractRecipe, build_extract_recipe
from engine.recipes import ShardRecipe
from engine.stores import open_store
from models import build_model

TINY = {"variant": "tiny", "depth": 2}


def _recipe(out: Path, *settings: str, recipe: str = "extract/tiny", **places: Any) -> ExtractRecipe:
    given = [f"{key}={value}" for key, value in {"out": out, "workers": 1, "cores_per_worker": 1, **places}.items()]
    return build_extract_recipe(apply_overrides(read_recipe("extract", recipe), [*given, *settings]))


def _in_this_process(make: Any, jobs: deque[Any], **_: Any) -> Iterator[Finished[Any, Any]]:
    function = make(0)
    while jobs:
        job = jobs.popleft()
        yield Finished(job, function(job))


def _run_here(recipe: ExtractRecipe) -> dict[str, Any]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "fan_out_to_workers", _in_this_process)
        try:
            return extract.run(recipe)
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_here() -> Callable[[ExtractRecipe], dict[str, Any]]:
    """extract.run with the worker in this process: no process has to import torch."""
    return _run_here


@pytest.fixture(scope="session")
def make_extract() -> Callable[..., ExtractRecipe]:
    """make_extract(out, "key=value", ..., dataset=... or slides=..., recipe="extract/tiny")"""
    return _recipe


@pytest.fixture(scope="session")
def extracted(sharded: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `sharded` by extract/tiny. Read it, never write to it."""
    out = tmp_path_factory.mktemp("extracted") / "store"
    _run_here(_recipe(out, dataset=sharded[0]))
    return out


@pytest.fixture(scope="session")
def regions_of(tmp_path_factory: pytest.TempPathFactory, slides: Path) -> Path:
    """A dataset of `slides` in regions of 3 x 3 patches: the slides, 8 x 8, end inside some."""
    out = tmp_path_factory.mktemp("regions") / "dataset"
    keys: dict[str, Any] = {"context_px": 256, "region_patches": 3, "min_tissue": 0.1, "workers": 1}
    shard.run(ShardRecipe(slides=str(slides), out=out, permute="slide", **keys), local=True)
    return out


def stored_patches(dataset: Path) -> dict[str, dict[tuple[int, int], np.ndarray]]:
    """slide_id -> (row, col) -> pixels uint8 [256, 256, 3], by tarfile and PIL."""
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    payloads: dict[str, bytes] = {}
    for path in (dataset / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                payloads[member.name.removesuffix(".jpg")] = file.read()
    for row in pq.read_table(dataset / "index.parquet").to_pylist():
        pixels = np.asarray(Image.open(io.BytesIO(payloads[row["key"]])).convert("RGB"))
        found.setdefault(row["slide_id"], {})[row["row"], row["col"]] = pixels
    return found


def plain_model(name: str = "hipt_patch", seed: int = 0, **config: Any) -> Any:
    """The model as extract draws it from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(name, **(config or TINY)).eval()


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """float32 [1, 3, H, W] with mean 0.5 and standard deviation 0.5."""
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5


def is_rounded(stored: np.ndarray, exact: np.ndarray) -> None:
    """Assert that `stored` is `exact` but for float16's rounding, and the order of sums in float32."""
    assert stored.dtype == np.float16
    assert stored.shape == exact.shape
    difference = np.abs(stored.astype(np.float64) - exact)
    assert (difference <= np.spacing(np.abs(exact).astype(np.float16)) * 0.51 + 2e-5).all(), difference.max()


def check_against_plain_loop(store: Path, dataset: Path) -> None:
    """Every embedding of extract/tiny is that of its patch, one at a time, and lies at its place."""
    patches, model = stored_patches(dataset), plain_model()
    opened = open_store(store)
    assert set(opened) == set(patches)
    index = pq.read_table(dataset / "index.parquet").to_pylist()
    corner = {(row["slide_id"], row["row"], row["col"]): (row["x0"], row["y0"]) for row in index}
    with torch.inference_mode():
        for slide_id, slide in opened.items():
            rows = slide.rows.to_dicts()
            places = [(row["row"], row["col"]) for row in rows]
            assert places == sorted(patches[slide_id])
            assert [tuple(xy) for xy in slide.xy0.tolist()] == [corner[slide_id, *place] for place in places]
            exact = np.concatenate([model(normalised(patches[slide_id][place])).numpy() for place in places])
            is_rounded(slide.embedding, exact)


@pytest.fixture(scope="session")
def against_plain_loop() -> Callable[[Path, Path], None]:
    return check_against_plain_loop


@pytest.fixture(scope="session")
def plain() -> Any:
    """The pieces of the plain loop: stored_patches, plain_model, normalised, is_rounded."""

    class Plain:
        stored_patches = staticmethod(stored_patches)
        model = staticmethod(plain_model)
        normalised = staticmethod(normalised)
        is_rounded = staticmethod(is_rounded)

    return Plain
