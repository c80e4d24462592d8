"""Opening a loader: checks the request before anything starts, and chooses backend and device once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from engine.data.batches import Decoder
from engine.data.loader import PatchLoader, checked_seen
from engine.data.order import SampleStream, rank_positions
from engine.data.reading import SampleReader
from engine.data.regions import patches_per_sample
from engine.data.views import CropView
from engine.runtime import usable_cores
from sharding.index import Dataset, open_dataset

_log = logging.getLogger(__name__)

Backend = Literal["auto", "dali", "torch"]


def open_loader(
    dataset: Dataset | Path | str,
    *,
    batch_size_per_rank: int,
    views: Sequence[CropView],
    backend: Backend = "auto",
    seed: int = 0,
    seen: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "auto",
    threads: int | None = None,
) -> PatchLoader:
    """Open a dataset's endless, shuffled stream of batches, at `seen` samples (of all ranks) after its beginning.

    backend: "dali", "torch", or "auto", which takes DALI where it can be imported. device: where images are delivered;
    "auto" is the current CUDA device where there is one, else the CPU. threads: for decoding; by default the cores
    this process may use, at most 16. Raises ValueError for what cannot work (a crop larger than the patches, a rank
    that does not exist) and ImportError for a named backend that is missing, both before any thread starts.
    """
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    checked_seen(seen)
    rank_positions(0, batch_size_per_rank, rank, world_size)
    if not views:
        raise ValueError("views is empty: a loader delivers at least one view of each sample")
    if dataset.num_rows == 0:
        raise ValueError(f"{dataset.path} holds no samples")
    SampleStream(dataset.num_rows, seed)  # refuses a bad seed
    reader = SampleReader(dataset)
    for view in views:
        view.check_fits(reader.patch_px, reader.patch_px)
    decoder = _make_decoder(
        backend,
        views=views,
        batch_size=batch_size_per_rank * patches_per_sample(dataset, views),
        threads=threads or min(16, usable_cores()),
        device=_resolve_device(device),
        reader=reader,
    )
    _log.info("loading %s with %s on %s", dataset.path, decoder.backend, decoder.device)
    return PatchLoader(
        dataset,
        reader,
        decoder,
        batch_size_per_rank=batch_size_per_rank,
        views=views,
        seed=seed,
        seen=seen,
        rank=rank,
        world_size=world_size,
    )


def _make_decoder(
    backend: Backend,
    *,
    views: Sequence[CropView],
    batch_size: int,
    threads: int,
    device: torch.device,
    reader: SampleReader,
) -> Decoder:
    if backend not in ("auto", "dali", "torch"):
        raise ValueError(f"backend is {backend!r}; it has to be 'auto', 'dali' or 'torch'")
    if backend != "torch":
        try:
            from engine.data.dali_loader import DaliDecoder
        except ImportError as error:
            if backend == "dali":
                raise ImportError(
                    f"backend='dali' needs nvidia.dali, which does not import here ({error}): "
                    "pip install nvidia-dali-cuda120, or use backend='torch'"
                ) from error
            _log.info("DALI does not import here (%s): decoding with simplejpeg", error)
        else:
            return DaliDecoder(
                views, batch_size=batch_size, threads=threads, device=device, bad_sample=reader.bad_sample
            )
    from engine.data.torch_loader import TorchDecoder

    return TorchDecoder(views, threads=threads, device=device, bad_sample=reader.bad_sample)


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; images are delivered on 'cpu' or 'cuda'")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch finds no usable CUDA device here: use device='cpu'")
        if resolved.index is None:  # name the device now: the caller's current one may change later
            resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved
