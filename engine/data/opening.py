"""Opening a loader: checks the request before anything starts, and chooses order, backend and device once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batches import Decoder, EncodedBatch, PatchBatch
from engine.data.loader import PatchLoader, checked_seen
from engine.data.locality import Blocks, BlockStream
from engine.data.order import SampleStream, Stream, SubsetStream, rank_positions, substitute_position
from engine.data.reading import BadSampleError, Replacement, Sample, SampleReader
from engine.data.regions import BadSamples, check_views, patches_per_sample, region_classes, region_rows
from engine.data.selection import Selection, identity, open_datasets, select
from engine.data.store import DEFAULT_CACHE_BYTES, StoreOptions
from engine.data.views import CropView, shown_share
from engine.data.weighted import Balance, WeightedStream, class_shares
from engine.runtime import usable_cores
from sharding.index import Dataset

_log = logging.getLogger(__name__)

Backend = Literal["auto", "dali", "torch"]

_SUBSTITUTES_TRIED = 8
_NEARLY_WHOLE = 0.7  # of a patch, see `shown_share`


class StreamLoader(PatchLoader):
    """A PatchLoader in any order over any rows, which can replace bad samples."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        reader: SampleReader,
        decoder: Decoder,
        *,
        stream: Stream,
        regions: npt.NDArray[np.int64] | None,
        rows_identity: str | dict[str, Any],
        bad_samples: BadSamples,
        batch_size_per_rank: int,
        views: Sequence[CropView],
        seen: int,
        rank: int,
        world_size: int,
        read_ahead: int,
    ) -> None:
        super().__init__(
            datasets[0],
            reader,
            decoder,
            stream=stream,
            regions=regions,
            batch_size_per_rank=batch_size_per_rank,
            views=views,
            seen=seen,
            rank=rank,
            world_size=world_size,
            read_ahead=read_ahead,
        )
        self._rows_identity = rows_identity
        spacings = {dataset.meta["recipe"].get("mpp") for dataset in datasets}
        self._mpp = spacings.pop() if len(spacings) == 1 else None
        self._bad_samples = bad_samples
        # By position and row; first those of batches that are prefetched.
        self._planned_replacements: dict[tuple[int, int], Replacement] = {}
        self._replacements: dict[tuple[int, int], Replacement] = {}

    @property
    def mpp(self) -> float | None:
        """The spacing of all patches in um/px; None where they have their slides' own, or datasets differ."""
        return self._mpp

    @property
    def replacements(self) -> list[Replacement]:
        """The bad samples among those delivered by this rank since the loader was opened, in order."""
        return [self._replacements[key] for key in sorted(self._replacements) if key[0] < self._seen]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides which samples come next, as plain numbers, strings, lists and dicts."""
        return super().state_dict() | {"dataset": self._rows_identity}

    def __next__(self) -> PatchBatch:
        """Return the next batch. After an error the loader stands where it stood: at the samples delivered."""
        while True:
            try:
                batch = super().__next__()
            except BadSampleError as error:
                if self._bad_samples == "fail":
                    raise
                # Found by the decoder. The batch is planned anew from `seen`, now without this sample.
                self._reader.condemn(error)
                continue
            for key in [key for key in list(self._planned_replacements) if key[0] < self._seen]:
                replacement = self._planned_replacements.pop(key)
                if self._replacements.get(key) != replacement:
                    self._replacements[key] = replacement
                    _log.warning("%s: %s", replacement.outcome, replacement.fault)
            return batch

    def _restart(self) -> None:
        super()._restart()
        self._planned_replacements.clear()

    def _repaired(self, batch: EncodedBatch) -> EncodedBatch:
        if all(sample.fault is None for sample in batch.samples):
            return batch
        rows, samples = batch.rows.copy(), list(batch.samples)
        present = None if batch.present is None else batch.present.copy()
        for place, sample in enumerate(samples):
            if sample.fault is None:
                continue
            position = int(batch.positions[place])
            if present is None:
                rows[place], samples[place] = self._substitute(position, sample.fault)
                self._note(position, sample.fault, int(rows[place]))
                continue
            region, inside = divmod(place, present.shape[1])
            if present[region, inside]:
                present[region, inside] = False
                self._note(position, sample.fault, None)
            # As for patches that are missing, one that is there stands in: decoders want full batches.
            neighbours = range(place - inside, place - inside + present.shape[1])
            good = next((other for other in neighbours if samples[other].fault is None), None)
            if good is None:
                rows[place], samples[place] = self._substitute(position, sample.fault)
            else:
                rows[place], samples[place] = rows[good], samples[good]
        return replace(batch, rows=rows, samples=samples, present=present)

    def _note(self, position: int, fault: BadSampleError, substitute: int | None) -> None:
        self._planned_replacements[position, fault.row] = Replacement(position, fault.row, substitute, fault)

    def _substitute(self, position: int, fault: BadSampleError) -> tuple[int, Sample]:
        """Return the row and the sample that are delivered at a position whose own sample is bad."""
        for attempt in range(_SUBSTITUTES_TRIED):
            at = self._stream.rows(substitute_position(self._stream.seed, position, attempt), 1)[0]
            row = int(at if self._regions is None else self._regions[at].max())
            sample = self._reader.read_one(row)
            if sample.fault is None:
                return row, sample
        raise RuntimeError(f"{_SUBSTITUTES_TRIED} substitutes of a bad sample are bad as well: {fault}") from fault


def open_loader(
    dataset: Dataset | Path | str | Sequence[Dataset | Path | str],
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
    prefetch: int = 2,
    where: str | None = None,
    balance: Balance | None = None,
    locality: Blocks | None = None,
    bad_samples: BadSamples = "fail",
    store_options: StoreOptions | None = None,
    cache: Path | str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> StreamLoader:
    """Open an endless, shuffled stream of batches, at `seen` samples (of all ranks) after its beginning.

    dataset: one dataset, or several that are loaded as one; rows are then numbered through. A dataset in an object
    store is given by its URL (s3://BUCKET/PREFIX); store_options, cache (a folder on a local disk) and cache_bytes
    (of samples that it keeps) say how it is read, see `open_remote_dataset`. where: an SQL condition
    over the columns of index.parquet and slides.parquet, see `selection.select`. balance: classes by their weights, not
    each row once per epoch. locality: neighbouring rows near each other. bad_samples: "replace" delivers another row
    in place of one that cannot be read or decoded, see `StreamLoader.replacements`; "fail" raises BadSampleError.
    Of a region (views of `region`) nothing is put in place of a bad patch: it is absent, as one that was never stored,
    and reported. A store that cannot be reached raises StoreError in either case.

    backend: "dali", "torch", or "auto", which takes DALI where it can be imported and has something to gain: on the
    CPU, where DALI neither resizes nor changes colours, not if all views do and show nearly whole patches. device:
    where images are delivered; "auto" is the current CUDA device where there is one, else the CPU. threads: for
    decoding; by default the cores this process may use, at most 16. prefetch: batches that are decoded ahead, and one
    more on a CPU; one more is read. Neither changes what is delivered. Raises ValueError for what cannot work (a crop
    larger than the patches, a rank that does not exist) and ImportError for a named backend that is missing, both
    before any thread starts.
    """
    given = [dataset] if isinstance(dataset, Dataset | Path | str) else dataset
    datasets = open_datasets(given, store_options=store_options, cache=cache, cache_bytes=cache_bytes)
    seen = checked_seen(seen)
    rank_positions(0, batch_size_per_rank, rank, world_size)
    if prefetch < 1:
        raise ValueError(f"prefetch is {prefetch}; at least 1 batch is decoded ahead")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least 1 decodes")
    if bad_samples not in ("fail", "replace"):
        raise ValueError(f"bad_samples is {bad_samples!r}; it has to be 'fail' or 'replace'")
    check_views(datasets, views, locality=locality, bad_samples=bad_samples)
    selection = select(datasets, where=where, by=balance.by if balance else None)
    regions = region_rows(datasets, views, selection.rows)
    stream = _make_stream(datasets, regions, seed, selection, balance, locality)
    reader = SampleReader(datasets, keep_faults=bad_samples == "replace")
    decoder = _make_decoder(
        backend,
        views=views,
        batch_size=batch_size_per_rank * patches_per_sample(datasets, views),
        threads=threads or min(16, usable_cores()),
        prefetch=prefetch,
        device=_resolve_device(device),
        reader=reader,
    )
    names = ", ".join(each.name for each in datasets)
    _log.info("loading %d samples of %s with %s on %s", stream.num_rows, names, decoder.backend, decoder.device)
    return StreamLoader(
        datasets,
        reader,
        decoder,
        stream=stream,
        regions=regions,
        rows_identity=identity(datasets, where, selection),
        bad_samples=bad_samples,
        batch_size_per_rank=batch_size_per_rank,
        views=views,
        seen=seen,
        rank=rank,
        world_size=world_size,
        read_ahead=prefetch + 1,
    )


def _make_stream(
    datasets: Sequence[Dataset],
    regions: npt.NDArray[np.int64] | None,
    seed: int,
    selection: Selection,
    balance: Balance | None,
    locality: Blocks | None,
) -> Stream:
    """Return the order of regions where these are the samples, else that of rows."""
    if regions is not None:
        num_samples, subset = len(regions), None
    else:
        subset = selection.rows
        num_samples = sum(each.num_rows for each in datasets) if subset is None else len(subset)
    stream: Stream
    if balance is not None:
        if locality is not None:
            raise ValueError("balance and locality exclude each other: members of a class are not neighbours")
        assert selection.classes is not None, "`by` was given"
        classes = selection.classes if regions is None else region_classes(regions, selection, balance.by)
        shares = class_shares(selection.labels, balance.weights)
        stream = WeightedStream(classes, shares, seed, by=balance.by, weights=balance.weights)
    elif locality is not None:
        stream = BlockStream(num_samples, seed, locality)
    else:
        stream = SampleStream(num_samples, seed)
    return stream if subset is None else SubsetStream(stream, subset)


def _make_decoder(
    backend: Backend,
    *,
    views: Sequence[CropView],
    batch_size: int,
    threads: int,
    prefetch: int,
    device: torch.device,
    reader: SampleReader,
) -> Decoder:
    if backend not in ("auto", "dali", "torch"):
        raise ValueError(f"backend is {backend!r}; it has to be 'auto', 'dali' or 'torch'")
    # Where DALI would only decode, and that nearly whole patches, it costs more than it saves: a tenth for DINO views.
    only_decodes = device.type == "cpu" and not any(view.is_plain for view in views)
    if backend == "auto" and only_decodes and shown_share(views, reader.patch_px) > _NEARLY_WHOLE:
        backend = "torch"
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
                views,
                batch_size=batch_size,
                threads=threads,
                prefetch=prefetch,
                device=device,
                bad_sample=reader.bad_sample,
            )
    from engine.data.torch_loader import TorchDecoder

    return TorchDecoder(views, threads=threads, prefetch=prefetch, device=device, bad_sample=reader.bad_sample)


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
