"""What people use today for the same work, each in its best form that was found, and the floor below all of them.

A peer gets the patches that ours stores and writes them into a tar, as JPEG 4:4:4 of the same quality. It keeps no
index, no checksum and no commit, and proves no tile.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from PIL import Image

from benchmarks.harness import Run
from benchmarks.ours import Patch
from sharding.writer import tar_header

_BLOCK = 512


def openslide_pil(patches: Sequence[Patch], quality: int) -> Run:
    """OpenSlide's read_region, PIL's encoder, Python's tarfile."""
    # By way of the module that alone imports it.
    from sharding.readers.openslide_reader import openslide

    def run(out: Path) -> int:
        slides: dict[Path, Any] = {}
        with tarfile.open(out / "shard.tar", "w") as tar:
            for number, patch in enumerate(patches):
                if patch.path not in slides:
                    slides[patch.path] = openslide.OpenSlide(str(patch.path))
                side = (patch.read_px, patch.read_px)
                image = slides[patch.path].read_region((patch.x0, patch.y0), 0, side).convert("RGB")
                if patch.scale > 1:
                    image = image.reduce(patch.scale)
                payload = io.BytesIO()
                image.save(payload, "JPEG", quality=quality, subsampling=0)
                member = tarfile.TarInfo(f"{number:016x}.jpg")
                member.size = payload.tell()
                payload.seek(0)
                tar.addfile(member, payload)
        for slide in slides.values():
            slide.close()
        return len(patches)

    return run


def cucim_simplejpeg(patches: Sequence[Patch], quality: int) -> Run:
    """cuCIM's read_region, simplejpeg's encoder, headers of our own (tarfile is slower).

    One read at a time and no cache: on one core its batches were no faster, and its cache stayed empty. PIL's `reduce`
    takes the mean of 2x2 pixels faster than numpy does.
    """
    from sharding.readers.cucim_reader import CuImage

    def run(out: Path) -> int:
        slides: dict[Path, Any] = {}
        with open(out / "shard.tar", "wb") as file:
            for number, patch in enumerate(patches):
                if patch.path not in slides:
                    slides[patch.path] = CuImage(str(patch.path))
                side = (patch.read_px, patch.read_px)
                pixels = np.asarray(slides[patch.path].read_region((patch.x0, patch.y0), side))
                if patch.scale > 1:
                    pixels = np.asarray(Image.fromarray(pixels).reduce(patch.scale))
                payload = simplejpeg.encode_jpeg(pixels, quality, "RGB", "444")
                file.write(tar_header(f"{number:016x}", len(payload)))
                file.write(payload)
                file.write(b"\0" * (-len(payload) % _BLOCK))
            file.write(b"\0" * (2 * _BLOCK))
        for slide in slides.values():
            slide.close()
        return len(patches)

    return run


def sendfile(patches: Sequence[Patch]) -> Run:
    """The floor of copying: the kernel moves the patches' TIFF tiles from the slides into a file, and nothing more."""
    tables = {path: _TileTable(path) for path in {patch.path for patch in patches}}
    ranges = [(patch.path, *tables[patch.path].range(patch)) for patch in patches]

    def run(out: Path) -> int:
        slides = {path: os.open(path, os.O_RDONLY) for path in tables}
        with open(out / "shard.bin", "wb") as file:
            for path, offset, length in ranges:
                sent = os.sendfile(file.fileno(), slides[path], offset, length)
                if sent != length:
                    raise RuntimeError(f"sendfile moved {sent} of {length} bytes of {path}")
        for descriptor in slides.values():
            os.close(descriptor)
        return len(ranges)

    return run


class _TileTable:
    """Where the TIFF tiles of level 0 lie in the file."""

    def __init__(self, path: Path) -> None:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            self._side = page.tilewidth
            self._columns = -(-page.imagewidth // page.tilewidth)
            self._offsets, self._lengths = page.dataoffsets, page.databytecounts

    def range(self, patch: Patch) -> tuple[int, int]:
        """(offset, length) in bytes of the tile that is the patch."""
        assert patch.read_px == self._side
        assert patch.x0 % self._side == patch.y0 % self._side == 0
        index = patch.y0 // self._side * self._columns + patch.x0 // self._side
        return self._offsets[index], self._lengths[index]
