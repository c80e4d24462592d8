"""`python -m benchmarks.learning --work FOLDER`: what a short training run teaches, on painted slides with known truth.

Slides of two tissues, stroma and tumour, are painted and stored as patches. Each method trains on some slides, without
labels, from seeds that also decide weights, masks and the labels below. Then:

* probe: logistic regression on features of patches, a few labelled ones of the training slides; it is judged on slides
  of other patients, which neither the method nor the regression has seen. The same for the network before its training.
  Colour, brightness and contrast are no help: patches are grey, and their histograms are equal.
* masked prediction: the cosine of ViTTM-HMR's predictions with its targets at hidden positions of held-out patches,
  less that of the best constants, for the model as repaired and as published, under the same masks. Each is held
  against its own targets.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from engine.objectives import make_objective
from engine.recipes import ShardRecipe, TrainRecipe
from engine.train import run as train
from engine.train_recipe import build_train_recipe
from models import load_weights
from models.objectives.hmr import constant_cosine, masked_targets, masked_tokens, negative_cosine
from models.vittm_hmr import ViTTMHMR
from sharding.synth.paint import CLASSES, TRUTH_DOWNSAMPLE

SLIDES, SIZE_PX = 11, 3072
HELD_OUT = 4  # of the slides, the last ones, which are of three patients
MPP, PATCH_PX, STRIDE_PX, CROP_PX = 1.0, 96, 64, 64
PURE = 0.9  # a patch is labelled where this share of it is one tissue
LABELS, DRAWS = 50, 10  # a probe's labels, and how often they are drawn
HMR, HMR_ALL, ORIGINAL, DINO = "vittm_hmr", "vittm_hmr loss_on=all", "vittm_hmr original", "hipt_patch DINO"
_SMALL = (f"crop_px={CROP_PX}", "model.dim=64", "model.depth=2", "optim.warmup_steps=20", "optim.lr=2e-3")
_HMR = (
    *_SMALL,
    *("model.memory_patch=8", "model.process_patch=16", "batch_size=32", "mask_ratio=0.5"),
    "augment={grey: 1.0, jitter: 1.0}",
)
_DINO = (
    *_SMALL,
    *("model.heads=2", "model.pos_grid=4", "batch_size=64", "optim.schedule=constant", "optim.weight_decay_end=0.04"),
    *("optim.clip_norm=0.3", "dino.small_px=32", "dino.num_small=2", "dino.out_dim=128", "dino.drop_path=0"),
    *("dino.teacher_temp=0.02", "dino.warmup_teacher_temp=0.02", "dino.center_momentum=0.5"),
)
# Recipe, what differs from it, and steps.
METHODS: dict[str, tuple[str, tuple[str, ...], int]] = {
    HMR: ("train/vittm_hmr_tiny", _HMR, 200),
    HMR_ALL: ("train/vittm_hmr_tiny", (*_HMR, "model.loss_on=all"), 200),
    ORIGINAL: ("train/vittm_hmr_tiny", (*_HMR, "model.preset=original"), 200),
    DINO: ("train/hipt_patch_dino_tiny", _DINO, 300),
}


class Patches(NamedTuple):
    """Labelled patches as the probe sees them: images float32 [n, 3, CROP_PX, CROP_PX], tumour bool [n]."""

    images: Tensor
    tumour: npt.NDArray[np.bool_]


class Masked(NamedTuple):
    """Cosines at hidden positions: of the predictions, and of the best constant for a batch and for each image."""

    cosine: float
    constant: float
    image_constant: float


@dataclass(frozen=True, slots=True)
class Slides:
    """Painted slides and the dataset of them; `held_out` are for judging."""

    folder: Path
    dataset: Path
    training: tuple[str, ...]
    held_out: tuple[str, ...]


def paint(work: Path, *, slides: int = SLIDES, size_px: int = SIZE_PX, seed: int = 0) -> Slides:
    """Paint and shard below `work`, where it is not done yet."""
    folder, dataset = work / "slides", work / "dataset"
    synth.run(folder, slides=slides, size=size_px, seed=seed)
    if not (dataset / "dataset.json").exists():
        recipe = ShardRecipe(slides=str(folder), out=dataset, mpp=MPP, context_px=PATCH_PX, stride_px=STRIDE_PX)
        shard.run(recipe, local=True)
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
    """The patches of these slides that are nearly all tumour or all stroma: grey, with equal histograms."""
    view = CropView(CROP_PX, centre=True, flips=False, augment=Augment(grey=1.0))
    images, rows = read(slides, names, view)
    share = tumour_shares(slides)[rows]
    pure = (share >= PURE) | (share <= 1 - PURE)
    return Patches(equalised(images[torch.from_numpy(pure)]), share[pure] >= PURE)


def read(slides: Slides, names: Sequence[str], view: CropView) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """All patches of these slides, float32 [n, 3, CROP_PX, CROP_PX], and their rows in the index, int64 [n]."""
    index = pl.read_parquet(slides.dataset / "index.parquet", columns=["slide_id"])
    count = int(index["slide_id"].is_in(names).sum())
    with open_loader(
        slides.dataset, batch_size_per_rank=count, views=[view], where=only(names), device="cpu", prefetch=1
    ) as loader:
        batch = next(loader)
        return batch.images[0].clone(), batch.rows.numpy().copy()


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


def recipe_of(method: str, slides: Slides, run: Path, *, seed: int, steps: int | None = None) -> TrainRecipe:
    """The method's recipe on the training slides."""
    name, overrides, usual = METHODS[method]
    given = (f"dataset={slides.dataset}", f"run={run}", f"seed={seed}", f"where={only(slides.training)}")
    quiet = ("log_every=20", "checkpoint_every=1000000", "processes=1")
    values = apply_overrides(read_recipe("train", name), [*overrides, *given, *quiet, f"steps={steps or usual}"])
    return build_train_recipe(values)


def encoders(recipe: TrainRecipe) -> tuple[nn.Module, nn.Module]:
    """The network with the weights that training starts from, and trained; of DINO, the teacher's."""

    def fresh() -> nn.Module:
        model = make_objective(recipe).model
        return model.teacher.backbone if recipe.objective == "dino" else model  # type: ignore[union-attr,return-value]

    found = train(recipe, resume=True)
    trained = fresh()
    load_weights(trained, Path(found["checkpoint"]) / "model.safetensors")
    return fresh(), trained


def probe(
    known: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]],
    judged: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]],
    *,
    seed: int,
) -> tuple[float, float]:
    """Balanced accuracy and AUROC on `judged` of regressions on LABELS of the known, half of each class.

    Both are features [n, D] and their truth; the result is the mean over DRAWS draws of labels.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        classes = [np.flatnonzero(known[1] == kind) for kind in (False, True)]
        chosen = np.concatenate([rng.choice(rows, LABELS // 2, replace=False) for rows in classes])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(known[0][chosen], known[1][chosen])
        score = model.predict_proba(judged[0])[:, 1]
        found.append((balanced_accuracy_score(judged[1], score > 0.5), roc_auc_score(judged[1], score)))
    accuracy, auroc = np.mean(found, axis=0)
    return float(accuracy), float(auroc)


def probe_encoder(encoder: nn.Module, known: Patches, judged: Patches, *, seed: int) -> tuple[float, float]:
    """`probe` on an encoder's features."""
    return probe(
        (features(encoder, known.images), known.tumour), (features(encoder, judged.images), judged.tumour), seed=seed
    )


@torch.no_grad()
def predict_masked(model: ViTTMHMR, images: Tensor, *, mask_ratio: float, batch_size: int, seed: int) -> Masked:
    """Masked prediction of images [n, 3, CROP_PX, CROP_PX] in batches as in training, by masks that `seed` decides."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in images.split(batch_size):
        noise = torch.rand(len(part), model.config.num_noise, generator=generator)
        out = model(part, mask_ratio=mask_ratio, noise=noise)
        hidden = masked_targets(masked_tokens(noise, mask_ratio), model.config.ratio)
        target = out["target"]
        cosines = (
            -negative_cosine(out["prediction"], target, hidden),
            constant_cosine(target, hidden),
            constant_cosine(target, hidden, per="image"),
        )
        found.append([float(cosine) for cosine in cosines])
    return Masked(*np.average(found, axis=0, weights=[len(part) for part in images.split(batch_size)]).tolist())


def measure(
    work: Path, seeds: Sequence[int], *, slides_seed: int = 0
) -> tuple[dict[str, list[Any]], dict[str, list[Masked]]]:
    """Per line of the two tables, one result for each seed: (balanced accuracy, AUROC), and `Masked`."""
    slides = paint(work, seed=slides_seed)
    known, judged = labelled(slides, slides.training), labelled(slides, slides.held_out)
    probes: dict[str, list[Any]] = {}
    masked: dict[str, list[Masked]] = {}
    for seed in seeds:
        for method in METHODS:
            run = work / "runs" / f"{re.sub(r'[^a-z_]+', '-', method.lower())}-{seed}"
            recipe = recipe_of(method, slides, run, seed=seed)
            views = read(slides, slides.held_out, recipe.crop_views()[0])[0] if method != DINO else None
            for state, encoder in zip(("untrained", "trained"), encoders(recipe), strict=True):
                line = f"{method}, {state}"
                probes.setdefault(line, []).append(probe_encoder(encoder, known, judged, seed=seed))
                if isinstance(encoder, ViTTMHMR) and views is not None:
                    result = predict_masked(
                        encoder, views, mask_ratio=recipe.mask_ratio, batch_size=recipe.batch_size, seed=seed
                    )
                    masked.setdefault(line, []).append(result)
    return probes, masked


def _spread(values: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def tables(probes: dict[str, list[Any]], masked: dict[str, list[Masked]]) -> str:
    """Markdown: mean, smallest and largest over the seeds; a gain is that of training, seed by seed."""
    lines = ["| probe of | balanced accuracy | AUROC |", "|---|---|---|"]
    for line, runs in probes.items():
        accuracies, aurocs = zip(*runs, strict=True)
        lines.append(f"| {line} | {_spread(accuracies)} | {_spread(aurocs)} |")
    lines += ["", "| gain by training | balanced accuracy | AUROC |", "|---|---|---|"]
    for line, after in probes.items():
        method = line.removesuffix(", trained")
        if method == line:
            continue
        gains = np.array(after) - np.array(probes[f"{method}, untrained"])
        lines.append(f"| {method} | {_spread(gains[:, 0])} | {_spread(gains[:, 1])} |")
    lines += [
        "",
        "| masked prediction | cosine | constant | constant per image | above the constant | above the image's |",
        "|---|---|---|---|---|---|",
    ]
    for line, found in masked.items():
        columns = [[each.cosine for each in found], [each.constant for each in found]]
        columns += [[each.image_constant for each in found], [each.cosine - each.constant for each in found]]
        columns += [[each.cosine - each.image_constant for each in found]]
        lines.append(f"| {line} | {' | '.join(_spread(column) for column in columns)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for slides and runs; what is there is used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--slides-seed", type=int, default=0, help="what is painted; default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the tables; they are printed too")
    options = parser.parse_args(arguments)
    text = tables(*measure(options.work, options.seeds, slides_seed=options.slides_seed)) + "\n"
    sys.stdout.write(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
