"""Classification of patches by a column of the dataset: the paper's ViTTM with two heads, or a head on an encoder."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import UsageError
from engine.data.batches import PatchBatch
from engine.data.selection import Selection, open_datasets, select
from engine.objectives.base import Objective, make_encoder, width_of
from engine.recipes import TrainRecipe
from models.classifier import Classifier
from models.objectives.classify import classification_loss
from models.objectives.two_heads import two_head_loss


def labels_of(recipe: TrainRecipe) -> Selection:
    """The class of every selected row. Raises ValueError where the column is missing, or rows have no value in it."""
    datasets = open_datasets(recipe.datasets, cache=recipe.cache, cache_bytes=recipe.cache_bytes)
    found = select(datasets, where=recipe.where, by=recipe.supervised.label)
    if len(found.labels) < 2:
        raise ValueError(
            f"supervised.label={recipe.supervised.label} has one value, {found.labels[0]!r}: nothing to tell apart"
        )
    n_classes = recipe.model.get("n_classes", len(found.labels))
    if n_classes != len(found.labels):
        raise ValueError(
            f"model.n_classes={n_classes}, and supervised.label={recipe.supervised.label} has {len(found.labels)} "
            f"values: {', '.join(found.labels[:10])}; give model.n_classes={len(found.labels)}, or another column"
        )
    return found


class SupervisedObjective(Objective):
    """Cross-entropy against the labels of rows; accuracy beside the share of the largest class in the batch."""

    def __init__(self, recipe: TrainRecipe) -> None:
        super().__init__(recipe)
        try:
            found = labels_of(recipe)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.classes = found.labels
        assert found.classes is not None, "`by` was given"
        self._rows, self._class_of = found.rows, found.classes
        encoder = make_encoder(recipe)
        self.prepare(encoder)
        self._two_heads = recipe.model["name"] == "vittm"
        if self._two_heads:
            self.model = encoder
        else:
            self.prefix = "encoder."
            self.model = Classifier(encoder, width_of(encoder), len(self.classes))
        self.freeze(self.model)

    def loss(
        self, parallel: nn.Module, batch: PatchBatch, positions: npt.NDArray[np.int64], step: int, *, last: bool
    ) -> dict[str, Tensor]:
        """See `Objective.loss`."""
        images, keys = batch.images[0], self.recipe.supervised
        labels = self._labels(batch.rows).to(images.device)
        outputs = parallel(images)
        if not self._two_heads:
            logits = outputs["logits"]
            if keys.loss == "ce":
                loss = classification_loss(
                    logits, labels, label_smoothing=keys.label_smoothing, focal_gamma=keys.focal_gamma
                )
            else:
                shares_BC = F.one_hot(labels, logits.shape[1]).float()
                loss = F.binary_cross_entropy_with_logits(logits.float(), shares_BC, reduction="sum") / len(labels)
            values = {"loss": loss, "features": outputs["features"]}
        else:
            logits = outputs["process_logits"]
            values = two_head_loss(outputs, self._smoothed(labels, logits.shape[1]), keys.loss)
        with torch.no_grad():
            values["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
            values["largest_class"] = torch.bincount(labels).max() / len(labels)
        return values

    def state_dict(self) -> dict[str, Any]:
        """The classes, and the BLAKE2b of every row's: no digest of a dataset covers the columns of slides.parquet."""
        digest = hashlib.blake2b(self._class_of.astype("<u4").tobytes(), digest_size=16)
        return {"classes": list(self.classes), "of_rows": digest.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Objective.load_state_dict`."""
        if state != self.state_dict():
            raise ValueError(
                f"cannot resume: the values of supervised.label={self.recipe.supervised.label} are no longer those "
                "that the run has learnt from; put the dataset's tables back, or start a new run"
            )

    def _labels(self, rows: Tensor) -> Tensor:
        """Classes, int64[B], of row numbers int64[B]."""
        numbers = rows.cpu().numpy()
        places = numbers if self._rows is None else np.searchsorted(self._rows, numbers)
        return torch.from_numpy(self._class_of[places].astype(np.int64))

    def _smoothed(self, labels: Tensor, n_classes: int) -> Tensor:
        smoothing = self.recipe.supervised.label_smoothing
        if not smoothing:
            return labels
        return F.one_hot(labels, n_classes) * (1 - smoothing) + smoothing / n_classes
