"""Datasets to batches. Importing this package imports neither torch nor DALI; using a name imports what it needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data.augment import Augment as Augment
    from engine.data.batches import PatchBatch as PatchBatch
    from engine.data.ect import Ect as Ect
    from engine.data.loader import PatchLoader as PatchLoader
    from engine.data.locality import Blocks as Blocks
    from engine.data.opening import StreamLoader as StreamLoader
    from engine.data.opening import open_loader as open_loader
    from engine.data.order import SampleStream as SampleStream
    from engine.data.reading import BadSampleError as BadSampleError
    from engine.data.reading import Replacement as Replacement
    from engine.data.store import StoreError as StoreError
    from engine.data.store import StoreOptions as StoreOptions
    from engine.data.views import CropView as CropView
    from engine.data.views import dino_views as dino_views
    from engine.data.weighted import Balance as Balance

_MODULE_OF = {
    "Augment": "augment",
    "BadSampleError": "reading",
    "Balance": "weighted",
    "Blocks": "locality",
    "CropView": "views",
    "Ect": "ect",
    "PatchBatch": "batches",
    "PatchLoader": "loader",
    "Replacement": "reading",
    "SampleStream": "order",
    "StoreError": "store",
    "StoreOptions": "store",
    "StreamLoader": "opening",
    "dino_views": "views",
    "open_loader": "opening",
}

__all__ = [
    "Augment",
    "BadSampleError",
    "Balance",
    "Blocks",
    "CropView",
    "Ect",
    "PatchBatch",
    "PatchLoader",
    "Replacement",
    "SampleStream",
    "StoreError",
    "StoreOptions",
    "StreamLoader",
    "dino_views",
    "open_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
