"""`engine bench loader`: stored patches to batches beside the usual ways, per core, and on a GPU where there is one.

The work: patches of 320 px (JPEG, as `shard/context320` stores them), a random window of 224 px, flips along both
axes, batches of 256 in random order; as uint8, or as normalised float32; with extended-context translation; with
colour jitter on top of it. All is in the page cache, and everyone has the same core for all of his threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch

from benchmarks.feeds import Feed, Patches, painted_patches, time_feed
from benchmarks.harness import OURS, CannotRunError, Case, Measure, Setting, against_peers, every_core, measure
from benchmarks.loader_peers import PIL_PEERS, Peer
from engine.data import Augment, CropView, Ect, open_loader

_SIZE_PX = 224
_UINT8 = CropView(_SIZE_PX, output="uint8")
_FLOAT = CropView(_SIZE_PX)
_ECT_FLOAT = CropView(_SIZE_PX, ect=Ect())
_ECT_JITTER = CropView(_SIZE_PX, ect=Ect(), augment=Augment(jitter=1.0))

# Batches (not counted, counted) of a round. Ours holds up to 5 ahead: 3 being read, 2 inside DALI.
_FAST = {"warm": 6, "timed": 6}
_SLOW = {"warm": 1, "timed": 2}  # PIL's ways work nothing ahead
_SLOWEST = {"warm": 1, "timed": 1}
_GPU = {"warm": 20, "timed": 60}
_QUICK = {"warm": 1, "timed": 1}
_HW_DECODER_LOADS = (0.0, 0.65, 1.0)


def ours(
    patches: Patches, view: CropView, *, backend: Literal["dali", "torch"], device: str = "cpu", threads: int = 1
) -> Feed:
    """Our loader."""

    @contextmanager
    def feed() -> Iterator[Iterator[torch.Tensor]]:
        with open_loader(
            patches.dataset,
            batch_size_per_rank=patches.batch_size,
            views=[view],
            backend=backend,
            device=device,
            threads=threads,
        ) as loader:
            yield (batch.images[0] for batch in loader)

    return feed


def peers() -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that are installed, and why others are missing; of both decoders that may be the limit, too."""
    found, missing = dict(PIL_PEERS), {}
    try:
        from benchmarks import dali_peers
    except ImportError as error:
        missing["dali_stock"] = missing["roi_limit"] = str(error)
    else:
        found |= {"dali_stock": dali_peers.dali_stock} | dali_peers.LIMITS
    return found, missing


def _per_core(setting: Setting, view: CropView, *, backend: Literal["dali", "torch"]) -> dict[str, Any]:
    """Our rate on one core beside every peer's; `roi_limit` is the faster of the decoders, named by `limit`."""
    found, missing = peers()
    if backend == "dali" and "dali_stock" in missing:
        raise CannotRunError(f"DALI does not import here: {missing['dali_stock']}")
    patches = painted_patches(setting)
    feeds: dict[str, Feed] = {OURS: ours(patches, view, backend=backend)}
    if view.augment is not None:
        feeds[f"{backend}_ect_float"] = ours(patches, replace(view, augment=None), backend=backend)
    for name, peer in found.items():
        try:
            feeds[name] = peer(patches, view)
        except ImportError as error:
            missing[name] = str(error)
    played = measure({name: _timed(name, feed, setting) for name, feed in feeds.items()}, setting)
    limits = {name: median(one.rate for one in played[name]) for name in played if name.startswith("limit_")}
    rounds = {name: played.pop(name) for name in limits}
    limit = max(limits, key=lambda name: limits[name], default=None)
    if limit is not None:
        played["roi_limit"] = rounds[limit]
    return against_peers(played, "samples/s") | {"limit": limit, "limits": limits, "missing": missing}


def _timed(name: str, feed: Feed, setting: Setting) -> Measure:
    if setting.quick:
        batches = _QUICK
    elif name == "openslide_pil":
        batches = _SLOWEST
    else:
        batches = _SLOW if name in PIL_PEERS else _FAST
    return partial(time_feed, feed, **batches)


def _on_gpu(setting: Setting, view: CropView) -> dict[str, Any]:
    """Our rate on a GPU beside that on all cores without one, and beside decoders of the GPU alone, ROI or full."""
    if not torch.cuda.is_available():
        raise CannotRunError("it needs an NVIDIA GPU, and torch finds none on this machine")
    from benchmarks.dali_peers import gpu_decoder

    patches = painted_patches(setting)
    threads = min(16, len(setting.cores))
    feeds = {
        OURS: ours(patches, view, backend="dali", device="cuda", threads=threads),
        "cpu_all_cores": ours(patches, view, backend="dali", threads=threads),
    }
    for load in _HW_DECODER_LOADS:
        for cut in (True, False):
            name = f"{'roi' if cut else 'full'}_decode_hw_{load:g}"
            feeds[name] = gpu_decoder(patches, view, threads=threads, cut=cut, hw_decoder_load=load)
    batches = _QUICK if setting.quick else _GPU
    with every_core(setting):
        return against_peers(
            measure({name: partial(time_feed, feed, **batches) for name, feed in feeds.items()}, setting), "samples/s"
        )


CASES: dict[str, Case] = {
    "dali_uint8": partial(_per_core, view=_UINT8, backend="dali"),
    "dali_float": partial(_per_core, view=_FLOAT, backend="dali"),
    "dali_ect_float": partial(_per_core, view=_ECT_FLOAT, backend="dali"),
    "dali_ect_jitter": partial(_per_core, view=_ECT_JITTER, backend="dali"),
    "torch_uint8": partial(_per_core, view=_UINT8, backend="torch"),
    "torch_float": partial(_per_core, view=_FLOAT, backend="torch"),
    "dali_gpu_uint8": partial(_on_gpu, view=_UINT8),
    "dali_gpu_float": partial(_on_gpu, view=_FLOAT),
}
