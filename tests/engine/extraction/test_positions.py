"""Position-coded slides: the colour of every patch says where it lies, and so does every embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from engine import shard
from engine.extraction import worker
from engine.extraction.encoders import Encoder
from engine.stores import open_store

PATCH_PX = 128


class _MeanColour(Encoder):
    """Embeds a patch as the mean of each channel, 0 to 255."""

    def __init__(self, spec: Any, device: str) -> None:
        super().__init__(spec, device)
        self.dim = 3

    def patches(self, images: Any) -> Any:
        return images.float().mean(dim=(1, 2))


@pytest.fixture
def mean_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Encoder", _MeanColour)


@pytest.fixture(scope="module", params=[("jpeg", 0.5), ("deflate", 0.5), ("deflate", 0.25), ("deflate", 0.4)])
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A slide and level-0 pixels per patch pixel: red is 8 per column of 128 px at 0.5 um/px, blue 8 per row."""
    compression, mpp = request.param
    scale = 0.5 / mpp
    side = round(16 * PATCH_PX * scale)
    line = (np.arange(side) / (PATCH_PX * scale)).astype(np.uint8) * 8 + 60
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = line[None, :], 20, line[:, None]
    path = tmp_path_factory.mktemp("coded") / "coded.tif"
    resolution = (10000 / mpp, 10000 / mpp)
    options: dict[str, Any] = {"compressionargs": {"level": 95}} if compression == "jpeg" else {}
    tifffile.imwrite(
        path, pixels, tile=(128, 128), photometric="rgb", compression=compression, resolution=resolution,
        resolutionunit="CENTIMETER", **options,
    )  # fmt: skip
    return path, scale


@pytest.mark.usefixtures("mean_colour")
@pytest.mark.parametrize("source", ["slides", "group", "slide"])
def test_every_embedding_lies_on_its_tissue(
    source: str, coded: tuple[Path, float], make_extract: Any, run_here: Any, tmp_path: Path
) -> None:
    path, scale = coded
    keys = {"context_px": PATCH_PX, "min_tissue": 0.1}
    if source == "slides":
        settings = [f"patches.{key}={value}" for key, value in keys.items()]
        recipe = make_extract(tmp_path / "store", *settings, "batch_size=7", slides=path)
    else:
        from engine.recipes import ShardRecipe

        out = tmp_path / "dataset"
        sharding: Any = {**keys, "permute": source, "patches_per_shard": 32, "workers": 1}
        shard.run(ShardRecipe(slides=str(path), out=out, **sharding), local=True)
        recipe = make_extract(tmp_path / "store", "batch_size=7", dataset=out)
    run_here(recipe)
    (slide,) = open_store(tmp_path / "store").values()
    assert len(slide) > 100
    cells = (slide.embedding.astype(np.float64)[:, [0, 2]] - 60) / 8
    assert np.abs(cells - np.round(cells)).max() < 0.3
    rows = slide.rows
    assert np.round(cells).astype(int).tolist() == [list(place) for place in rows.select("col", "row").rows()]
    assert np.abs(slide.xy0 - np.round(cells) * PATCH_PX * scale).max() <= 1
