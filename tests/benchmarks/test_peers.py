"""Every contender does the same work: the same patches of the slide, as JPEG in a tar."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from benchmarks import peers
from benchmarks.harness import Run
from benchmarks.ours import Ours, Patch
from benchmarks.slides import SlideSet

QUALITY = 95  # so that the pictures can be told from their neighbours
WORKS: list[tuple[SlideSet, dict[str, Any]]] = [
    ("chroma_420", {}),
    ("chroma_444", {"routes": "decode"}),
    ("tile_240", {}),
    ("large", {}),
]


def _pictures(folder: Path) -> list[np.ndarray]:
    found = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name.endswith(".jpg")
                found.append(np.asarray(Image.open(io.BytesIO(file.read()))))
    return found


def _expected(patch: Patch) -> np.ndarray:
    with tifffile.TiffFile(patch.path) as tiff:
        level0 = tiff.pages[0].asarray()
    window = level0[patch.y0 : patch.y0 + patch.read_px, patch.x0 : patch.x0 + patch.read_px].astype(float)
    size = patch.read_px // patch.scale
    return np.asarray(window.reshape(size, patch.scale, size, patch.scale, 3).mean((1, 3)))


@pytest.mark.parametrize(("name", "keys"), WORKS)
@pytest.mark.parametrize("peer", [peers.openslide_pil, peers.cucim_simplejpeg])
def test_a_peer_stores_the_pixels_of_the_patches_it_is_given(
    peer: Callable[[list[Patch], int], Run],
    name: SlideSet,
    keys: dict[str, Any],
    slides: dict[SlideSet, list[Path]],
    tmp_path: Path,
) -> None:
    patches = Ours.prepare(slides[name], **keys).patches()[::5][:4]
    assert len(patches) > 1
    assert peer(patches, QUALITY)(tmp_path) == len(patches)
    pictures = _pictures(tmp_path)
    assert len(pictures) == len(patches)
    for picture, patch in zip(pictures, patches, strict=True):
        assert picture.shape == (256, 256, 3)
        assert np.abs(picture - _expected(patch)).mean() < 2


@pytest.mark.parametrize(("name", "keys"), WORKS)
def test_ours_stores_the_patches_that_peers_are_given(
    name: SlideSet, keys: dict[str, Any], slides: dict[SlideSet, list[Path]], tmp_path: Path
) -> None:
    ours = Ours.prepare(slides[name], quality=QUALITY, **keys)
    patches = ours.patches()
    assert ours.run(tmp_path) == len(patches)
    pictures = _pictures(tmp_path)
    assert len(pictures) == len(patches)
    # Ours are stored in another order: each of a few patches is among them.
    for patch in patches[:: max(1, len(patches) // 3)]:
        expected = _expected(patch)
        assert min(np.abs(picture - expected).mean() for picture in pictures) < 2


def test_the_floor_moves_the_bytes_of_the_patches_tiles(slides: dict[SlideSet, list[Path]], tmp_path: Path) -> None:
    patches = Ours.prepare(slides["chroma_444"]).patches()
    assert peers.sendfile(patches)(tmp_path) == len(patches)
    with tifffile.TiffFile(slides["chroma_444"][0]) as tiff:
        page = tiff.pages[0]
        tiles = [
            (index // (page.imagewidth // 256) * 256, index % (page.imagewidth // 256) * 256, data)
            for data, index in tiff.filehandle.read_segments(page.dataoffsets, page.databytecounts)
        ]
    wanted = {(patch.y0, patch.x0) for patch in patches}
    assert (tmp_path / "shard.bin").read_bytes() == b"".join(data for y, x, data in tiles if (y, x) in wanted)


def test_the_floor_refuses_patches_that_are_no_tiles(slides: dict[SlideSet, list[Path]]) -> None:
    with pytest.raises(AssertionError):
        peers.sendfile(Ours.prepare(slides["tile_240"]).patches())


def test_ours_refuses_to_measure_a_slide_that_is_not_whole(slides: dict[SlideSet, list[Path]], tmp_path: Path) -> None:
    ours = Ours.prepare(slides["chroma_420"], max_bad_fraction=1.0)
    data = slides["chroma_420"][0].read_bytes()
    broken = tmp_path / "broken.svs"
    broken.write_bytes(data)
    patch = ours.patches()[3]
    offset, length = peers._TileTable(broken).range(patch)
    broken.write_bytes(data[:offset] + bytes(length) + data[offset + length :])
    with pytest.raises(RuntimeError, match="nothing was measured"):
        Ours.prepare([broken], max_bad_fraction=1.0).run(tmp_path / "out")
