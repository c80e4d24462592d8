"""Streams of batches as contenders: the patches that all of them load, and the clock of a loader in full swing.

Loaders work ahead. So each round opens a stream anew, takes more batches than it can have in store, then times the
next ones, and closes it: nothing that was made while others were measured is counted, and nothing runs on beside them.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Round, Setting, cpu_seconds
from benchmarks.slides import sharded

# Opens an endless stream of batches: tensors [batch_size, 3, S, S] as a view says, uint8 or normalised float32. What
# decodes and does no more yields whatever its decoder returns.
Feed = Callable[[], AbstractContextManager[Iterator[Any]]]


@dataclass(frozen=True, slots=True)
class Patches:
    """What is loaded: a dataset, the size of a batch, and a folder for copies in formats of the peers."""

    dataset: Path
    patch_px: int
    batch_size: int
    copies: Path

    @property
    def shards(self) -> list[str]:
        return sorted(str(path) for path in (self.dataset / "shards").glob("*.tar"))

    def payloads(self) -> Iterator[bytes]:
        """Every JPEG stream, shard by shard."""
        for path in self.shards:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield file.read()

    def copied(self, name: str, write: Callable[[Path], None]) -> Path:
        """The folder of a copy, written where it is not there yet."""
        folder = self.copies / name
        if not (folder / "done").exists():
            folder.mkdir(parents=True)
            write(folder / "data")
            (folder / "done").touch()
        return folder / "data"


def painted_patches(setting: Setting) -> Patches:
    """Patches of 320 px as `shard/context320` stores them, made where they are not there yet."""
    place = setting.work / ("loader-quick" if setting.quick else "loader")
    return Patches(sharded(setting, "context320"), 320, 16 if setting.quick else 256, place)


def time_feed(feed: Feed, *, warm: int, timed: int) -> Round:
    """Take `warm` batches (1 or more) uncounted, then measure `timed` ones."""
    with feed() as batches:
        for batch in islice(batches, warm):
            _wait_for(batch)
        units = 0
        started, cpu_started = time.perf_counter(), cpu_seconds()
        for batch in islice(batches, timed):
            units += len(batch)
        _wait_for(batch)
        seconds, cpu_s = time.perf_counter() - started, cpu_seconds() - cpu_started
    return Round(units, seconds, cpu_s=cpu_s)


def _wait_for(batch: Any) -> None:
    if isinstance(batch, torch.Tensor) and batch.is_cuda:
        torch.cuda.synchronize(batch.device)
