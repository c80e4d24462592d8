"""`python -m benchmarks.learning --work FOLDER`: what a short training run teaches, on painted slides with known truth.

Slides of two tissues, stroma and tumour, are painted and stored as patches. Each method trains on some slides, without
labels, from seeds that also decide the labels below. Then:

* probe: logistic regression on features of patches, a few labelled ones of the training slides; it is judged on slides
  that neither the method nor the regression has seen. The same for the network as it was before training. Colour and
  brightness are no help: the patches of the probe are grey, their brightness and contrast drawn anew for each.
* masked prediction: the cosine of ViTTM-HMR's predictions with its targets at hidden positions of held-out patches,
  less that of the best constants, for the model as repaired and as published, under the same masks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from engine import shard, synth
from engine.config import apply_overrides, read_recipe
from engine.data import Augment, CropView, open_loader
from engine.data.draws import uniforms
from engine.objectives import make_objective
from engine.recipes import ShardRecipe, TrainRecipe
from engine.train import run as train
from engine.train_recipe import build_train_recipe
from models import load_weights
from models.objectives.hmr import constant_cosine, masked_targets, masked_tokens, negative_cosine
from sharding.synth.paint import CLASSES, TRUTH_DOWNSAMPLE

PATCH_PX, STRIDE_PX, CROP_PX = 96, 96, 64
HELD_OUT = 3  # of each set's slides, the last ones
PURE = 0.9  # a patch is labelled where this share of it is one tissue
HMR, ORIGINAL, DINO = "vittm_hmr", "vittm_hmr original", "hipt_patch DINO"


@dataclass(frozen=True, slots=True)
class Patches:
    """Labelled patches: images float32 [n, 3, CROP_PX, CROP_PX], tumour bool [n], rows int64 [n] of the index."""

    images: Tensor
    tumour: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Slides:
    """Painted slides and the dataset of them; `held_out` are for judging."""

    folder: Path
    dataset: Path
    training: tuple[str, ...]
    held_out: tuple[str, ...]


def paint(work: Path, *, slides: int, size: int) -> Slides:
    """Paint and shard, where it is not done yet."""
    folder, dataset = work / "slides", work / "dataset"
    synth.run(folder, slides=slides, size=size, seed=0)
    if not (dataset / "dataset.json").exists():
        shard.run(ShardRecipe(slides=str(folder), out=dataset, context_px=PATCH_PX, stride_px=STRIDE_PX), local=True)
    names = [f"synth-{index:04d}" for index in range(slides)]
    return Slides(folder, dataset, tuple(names[:-HELD_OUT]), tuple(names[-HELD_OUT:]))


def only(slides: Sequence[str]) -> str:
    """The SQL condition for patches of these slides."""
    return f"slide_id IN ({', '.join(repr(name) for name in slides)})"


def tumour_shares(slides: Slides) -> npt.NDArray[np.float64]:
    """Share of tumour in each row's patch, by the truth; NaN where some of it is neither tissue: float64 [rows]."""
    rows = pl.read_parquet(slides.dataset / "index.parquet", columns=["slide_id", "x0", "y0", "read_px"])
    masks = {
        name: np.asarray(Image.open(slides.folder / "truth" / f"{name}_class.png"))
        for name in rows["slide_id"].unique()
    }
    shares = []
    for name, x0, y0, read_px in rows.iter_rows():
        first_x, first_y, end_x, end_y = (
            max(0, value) // TRUTH_DOWNSAMPLE for value in (x0, y0, x0 + read_px, y0 + read_px)
        )
        part = masks[name][first_y:end_y, first_x:end_x]
        tumour, stroma = (float(np.mean(part == CLASSES[kind])) for kind in ("tumour", "stroma"))
        shares.append(tumour if tumour + stroma >= PURE else np.nan)
    return np.array(shares)


def labelled(slides: Slides, names: Sequence[str]) -> Patches:
    """The patches of these slides that are nearly all tumour or all stroma, as the probe sees them."""
    shares = tumour_shares(slides)
    view = CropView(CROP_PX, centre=True, flips=False, augment=Augment(grey=1.0))
    index = pl.read_parquet(slides.dataset / "index.parquet", columns=["slide_id"])
    count = int(index["slide_id"].is_in(names).sum())
    with open_loader(
        slides.dataset, batch_size_per_rank=count, views=[view], where=only(names), device="cpu", prefetch=1
    ) as loader:
        batch = next(loader)
    share = shares[batch.rows.numpy()]
    pure = (share >= PURE) | (share <= 1 - PURE)
    return Patches(equalised(batch.images[0][torch.from_numpy(pure)]), share[pure] >= PURE)


def equalised(images: Tensor) -> Tensor:
    """Grey images [n, 3, H, W] with every value replaced by its rank, from -sqrt(3) to sqrt(3): equal histograms."""
    grey = images[:, 0].flatten(1)
    ranks = grey.argsort(dim=1, stable=True).argsort(dim=1) / (grey.shape[1] - 1)
    return ((2 * ranks - 1) * 3**0.5).view_as(images[:, :1]).expand_as(images)


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor) -> npt.NDArray[np.float32]:
    """Features float32 [n, D] of images [n, 3, H, W]."""
    encoder.eval()
    embed: Any = encoder.features if hasattr(encoder, "features") else encoder
    return np.concatenate([embed(part).numpy() for part in images.split(256)])


def probe(
    known: npt.NDArray[np.float32],
    known_tumour: npt.NDArray[np.bool_],
    judged: npt.NDArray[np.float32],
    judged_tumour: npt.NDArray[np.bool_],
    *,
    labels: int,
    seed: int,
) -> tuple[float, float]:
    """(balanced accuracy, AUROC) on `judged` of a regression on `labels` of the known, half of each class."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate(
        [rng.choice(np.flatnonzero(known_tumour == kind), labels // 2, replace=False) for kind in (False, True)]
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(known[chosen], known_tumour[chosen])
    found = model.predict_proba(judged)[:, 1]
    return float(balanced_accuracy_score(judged_tumour, found > 0.5)), float(roc_auc_score(judged_tumour, found))
