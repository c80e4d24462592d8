"""Weighted k-nearest neighbours over frozen embeddings, as DINO (arXiv 2104.14294) and HIPT evaluate them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CHUNK_BYTES = 1 << 28  # similarities held at a time


def knn_classify(
    train_x: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_x: npt.ArrayLike,
    k: int = 20,
    temperature: float = 0.07,
    n_classes: int = 2,
) -> npt.NDArray[np.float64]:
    """Probabilities, float64 [n_test, n_classes]: shares of the classes in the sum of exp(cosine/temperature).

    The sum runs over the k training rows of largest cosine. `argmax(1)` is the predicted class, the lowest of equals.

    Args:
        train_x: [n_train, D], normalised here to unit length.
        train_y: [n_train], classes in [0, n_classes).
        test_x: [n_test, D], likewise.

    Raises:
        ValueError: shapes or classes that do not fit, or k outside [1, n_train].
    """
    train, test = _unit_rows(train_x, "train_x"), _unit_rows(test_x, "test_x")
    labels = np.asarray(train_y).astype(np.int64)
    if labels.shape != (len(train),) or train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train_x [n, D], train_y [n] and test_x [m, D] must fit: found {train.shape}, {labels.shape}, {test.shape}"
        )
    if not 1 <= k <= len(train):
        raise ValueError(f"k must lie in [1, {len(train)}], the number of training rows: found {k}")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"classes must lie in [0, {n_classes - 1}]: found {labels.min()} to {labels.max()}")
    chunk = max(1, _CHUNK_BYTES // (4 * len(train)))
    probabilities = np.empty((len(test), n_classes))
    for first in range(0, len(test), chunk):
        similarity = test[first : first + chunk] @ train.T
        nearest = np.argpartition(similarity, -k, axis=1)[:, -k:]
        closeness = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        weight = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / temperature)
        for label in range(n_classes):
            probabilities[first : first + chunk, label] = (weight * (labels[nearest] == label)).sum(axis=1)
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def _unit_rows(x: npt.ArrayLike, name: str) -> npt.NDArray[np.float32]:
    rows = np.asarray(x, dtype=np.float32)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be a matrix, one embedding per row: found shape {rows.shape}")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        raise ValueError(f"{name} has {len(bad)} rows that are zero or not finite, the first of them row {bad[0]}")
    return rows / lengths
