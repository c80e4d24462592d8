"""Embeddings on disk: `open_store(path)["slide"].embedding`. Importing this package does not import zarr."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engine.stores.layout import StoreDamagedError

if TYPE_CHECKING:
    from engine.stores.verify import verify_store as verify_store
    from engine.stores.zarr_store import SlideEmbeddings as SlideEmbeddings
    from engine.stores.zarr_store import Store as Store
    from engine.stores.zarr_store import begin_store as begin_store
    from engine.stores.zarr_store import finish_store as finish_store
    from engine.stores.zarr_store import finished_slides as finished_slides
    from engine.stores.zarr_store import open_store as open_store
    from engine.stores.zarr_store import write_slide as write_slide

_MODULE_OF = {
    "SlideEmbeddings": "zarr_store",
    "Store": "zarr_store",
    "begin_store": "zarr_store",
    "finish_store": "zarr_store",
    "finished_slides": "zarr_store",
    "open_store": "zarr_store",
    "verify_store": "verify",
    "write_slide": "zarr_store",
}

__all__ = [
    "SlideEmbeddings",
    "Store",
    "StoreDamagedError",
    "begin_store",
    "finish_store",
    "finished_slides",
    "open_store",
    "verify_store",
    "write_slide",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
