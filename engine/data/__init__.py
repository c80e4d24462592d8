"""Datasets to batches. Importing this package imports neither torch nor DALI; using a name imports what it needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data.augment import Augment as Augment
    from engine.data.batches import PatchBatch as PatchBatch
    from engine.data.ect import Ect as Ect
    from engine.data.loader import PatchLoader as PatchLoader
    from engine.data.opening import open_loader as open_loader
    from engine.data.order import SampleStream as SampleStream
    from engine.data.reading import BadSampleError as BadSampleError
    from engine.data.views import CropView as CropView
    from engine.data.views import dino_views as dino_views

_MODULE_OF = {
    "Augment": "augment",
    "BadSampleError": "reading",
    "CropView": "views",
    "Ect": "ect",
    "PatchBatch": "batches",
    "PatchLoader": "loader",
    "SampleStream": "order",
    "dino_views": "views",
    "open_loader": "opening",
}

__all__ = [
    "Augment",
    "BadSampleError",
    "CropView",
    "Ect",
    "PatchBatch",
    "PatchLoader",
    "SampleStream",
    "dino_views",
    "open_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
