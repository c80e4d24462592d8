"""What passes between the parts of the loader: encoded batches in, decoded batches out."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.data.augment import Changes
from engine.data.reading import Sample
from engine.data.views import CropWindows


@dataclass(frozen=True, slots=True)
class PatchBatch:
    """One rank's part of a batch.

    images: per view a tensor [B, 3, size_px, size_px], RGB, of the dtype and the order in memory that the view says, on
    the loader's device. rows: int64[B], row numbers of the index. sample_ids: uint64[B].

    Of regions of n x n patches, images are [B, n * n, 3, size_px, size_px], rows and sample_ids [B, n * n], row by row,
    and present is bool[B, n * n]: where it is False images and sample_ids are 0 and rows -1. Otherwise it is None.
    """

    images: list[torch.Tensor]
    rows: torch.Tensor
    sample_ids: npt.NDArray[np.uint64]
    present: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """One rank's batch before decoding. positions, rows: int64[B]; windows, changes: one entry per view.

    Of regions, the patches of all of them one after the other; a missing one is stood in for by another of its region,
    and present, bool[B, n * n], says so.
    """

    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    samples: list[Sample]
    windows: list[CropWindows]
    changes: list[Changes]
    present: npt.NDArray[np.bool_] | None = None


Decoded = tuple[EncodedBatch, list[torch.Tensor]]
"""A batch and its images, one tensor per view, as in PatchBatch."""


class Decoder(Protocol):
    """What a backend implements."""

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def decode(self, encoded: Iterator[EncodedBatch]) -> Generator[Decoded, None, None]:
        """Yield each batch with its images (as in PatchBatch), in order, until `encoded` ends.

        It may take a bounded number of batches ahead of those it has yielded. Raises BadSampleError for a sample that
        does not decode. Closing the iterator frees what it holds.
        """
        ...

    def close(self) -> None:
        """Stop the decoder's threads."""
        ...
