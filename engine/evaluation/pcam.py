"""PatchCamelyon (arXiv 1806.03962) through an encoder: the probe of vittm-hmr, and the same on the full splits.

vittm-hmr takes the first 5000 training and the first 1000 test images in the order of the files and no validation,
resizes them from 96 to 256 px, normalises by mean and standard deviation 0.5, and trains a linear layer for 5 epochs.
The files are `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`; `..._meta.csv` beside them names each
image's slide (column wsi).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from engine.console import progress
from engine.evaluation.encoder import Encoder
from engine.evaluation.folds import PARTS, Fold
from engine.evaluation.samples import Samples, read_table

_STEM = "camelyonpatch_level_2_split_"
_NAMES = {"train": "train", "val": "valid", "test": "test"}
SIDE_PX, MPP = 96, 0.972
ORIGINAL: dict[str, Any] = {
    "train_images": 5000,
    "val_images": 0,
    "test_images": 1000,
    "resize_px": 256,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "probe": "adam",
    "scale": "none",
}


def differences(found: Mapping[str, Any]) -> list[str]:
    """What differs from vittm-hmr's protocol, `key: found (vittm-hmr: its own)`; for keys of `ORIGINAL`."""
    return [f"{key}: {found[key]} (vittm-hmr: {own})" for key, own in ORIGINAL.items() if found[key] != own]


def read_pcam(
    folder: Path, encoder: Encoder, counts: Mapping[str, int | None], *, resize_px: int, batch_size: int
) -> tuple[Samples, Fold]:
    """Features of the first images of each part, and the fold they make.

    Args:
        counts: of train, val and test; None is all of them, 0 of val leaves it out.

    Groups are slides where every part has its meta.csv, else each image is its own.
    Raises:
        ValueError: files that are missing or are no PatchCamelyon, or hold fewer images than asked for.
    """
    import h5py

    xs, ys, tables, rows, first = [], [], [], {}, 0
    for part in PARTS:
        if counts[part] == 0:
            rows[part] = np.empty(0, np.int64)
            continue
        paths = {kind: folder / f"{_STEM}{_NAMES[part]}_{kind}.h5" for kind in ("x", "y")}
        for path in paths.values():
            if not path.is_file():
                raise ValueError(f"pcam={folder}: there is no {path.name}; unpack PatchCamelyon's files there")
        with h5py.File(paths["x"], "r") as images, h5py.File(paths["y"], "r") as truth:
            count = _checked(images, truth, paths, part, counts[part])
            ys.append(np.asarray(truth["y"][:count]).reshape(count).astype(np.int64))
            xs.append(_embedded(images["x"], count, encoder, resize_px, batch_size, f"embed {part}"))
        tables.append(_table(folder / f"{_STEM}{_NAMES[part]}_meta.csv", part, count))
        rows[part] = np.arange(first, first + count)
        first += count
    known = all("slide_id" in table.columns for table in tables)
    table = pl.concat([each if known else each.drop("slide_id", strict=False) for each in tables])
    names = table["slide_id"] if known else table["image"]
    group_names, groups = np.unique(names.to_numpy(), return_inverse=True)
    samples = Samples(
        np.concatenate(xs),
        np.concatenate(ys),
        ["normal", "tumour"],
        groups.astype(np.int64),
        group_names.tolist(),
        table,
        "slide_id" if known else "image",
    )
    return samples, Fold("pcam", rows["train"], rows["val"], rows["test"])


def _checked(images: Any, truth: Any, paths: Mapping[str, Path], part: str, wanted: int | None) -> int:
    """How many images are taken."""
    for kind, file in (("x", images), ("y", truth)):
        if kind not in file:
            raise ValueError(f"{paths[kind]} has no dataset {kind!r}: expected PatchCamelyon's")
    shape = images["x"].shape
    if shape[1:] != (SIDE_PX, SIDE_PX, 3) or images["x"].dtype != np.uint8 or truth["y"].size != shape[0]:
        raise ValueError(
            f"{paths['x']}: found {images['x'].dtype} {list(shape)} and {truth['y'].size} labels; expected uint8 "
            f"[N, {SIDE_PX}, {SIDE_PX}, 3] and N labels"
        )
    if wanted is not None and wanted > shape[0]:
        raise ValueError(f"{part}_images={wanted}: {paths['x'].name} holds {shape[0]}")
    return int(shape[0] if wanted is None else wanted)


def _table(meta: Path, part: str, count: int) -> pl.DataFrame:
    table = pl.DataFrame({"image": [f"{part}-{number}" for number in range(count)]})
    if not meta.is_file():
        return table
    known = read_table(meta, "pcam")
    if "wsi" not in known.columns or known.height < count:
        raise ValueError(f"{meta}: expected a column wsi and {count} rows or more")
    return table.with_columns(known["wsi"][:count].alias("slide_id"))


def _embedded(
    images: Any, count: int, encoder: Encoder, resize_px: int, batch_size: int, title: str
) -> npt.NDArray[np.float32]:
    """float32 [count, D] of uint8 images [N, 96, 96, 3]."""
    import torch

    mean, std = (torch.tensor(values, device=encoder.device).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    found = []
    with progress(title, count, "images") as advance:
        for first in range(0, count, batch_size):
            pixels = torch.from_numpy(images[first : min(first + batch_size, count)]).to(encoder.device)
            batch = pixels.permute(0, 3, 1, 2).float() / 255
            if resize_px != SIDE_PX:
                batch = torch.nn.functional.interpolate(batch, (resize_px, resize_px), mode="bilinear", antialias=True)
            found.append(encoder.embed((batch - mean) / std).cpu().numpy())
            advance(len(pixels), "")
    return np.concatenate(found)
