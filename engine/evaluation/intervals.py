"""Metrics of class probabilities with bootstrap intervals, over one or several folds.

What is resampled are groups (patients, say), not cases: cases of a group depend on each other. A resample draws as many
groups as there are, with replacement, over all folds at once, so that a group that several folds test counts alike in
each. It is a weight per group, and every metric is computed from weights: that is the same as repeating the
group's cases, without repeating them. Intervals are percentiles of the resamples' values. Time grows with cases times
resamples times classes (the AUROC).

Shapes: n cases, G groups, C classes, r resamples at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.evaluation.metrics import case_losses

Array = npt.NDArray[np.float64]
METRICS = ("accuracy", "balanced_accuracy", "auroc", "f1", "log_loss")

_CHUNK_BYTES = 1 << 26  # weights of cases held at a time


@dataclass(frozen=True, slots=True)
class Predicted:
    """The tested cases of a fold.

    Attributes:
        labels: int64 [n], classes in [0, C).
        probabilities: float64 [n, C], rows of sum 1; the predicted class is the largest, the lowest of equals.
        groups: int64 [n], the number of each case's group, the same in every fold.
    """

    labels: npt.NDArray[np.int64]
    probabilities: Array
    groups: npt.NDArray[np.int64]


def measure(
    folds: Sequence[Predicted],
    classes: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of all folds together, and those of each fold.

    accuracy; balanced_accuracy (mean recall) and f1 (macro) over the classes of the tested cases, and for f1 also those
    predicted; auroc (of class 1 where there are two, else the mean of each class against the rest); log_loss (mean,
    natural, probabilities clipped to [2^-52, 1 - 2^-52]); confusion (cases of each true class, row, and predicted one).
    Over several folds `value`, and each resample's, is the mean of the folds that have one, and `std` the sample
    standard deviation over the folds; confusion is their sum.

    Returns:
        {name: {value, low, high, resamples, degenerate}} twice; with several folds also {std, folds, left_out} in the
        first: how many folds have a value, and the share of their resamples that have none. `resamples` counts those
        with a value, `degenerate` the others, which lack a class (or all cases) that the metric needs; they are left
        out of low and high, which are too near each other where they are many. What has no value is None, and
        `reason` says why.

    Raises:
        ValueError: no fold, a fold without cases, or shapes that do not fit.
    """
    for fold in folds:
        if fold.probabilities.shape != (len(fold.labels), len(classes)) or len(fold.groups) != len(fold.labels):
            raise ValueError(
                f"a fold must have labels [n], groups [n] and probabilities [n, {len(classes)}]: found "
                f"{fold.labels.shape}, {fold.groups.shape} and {fold.probabilities.shape}"
            )
    if not folds or not all(len(fold.labels) for fold in folds):
        raise ValueError("there are no cases to measure: expected folds that test at least one case each")
    used, every = np.unique(np.concatenate([fold.groups for fold in folds]), return_inverse=True)
    starts = np.cumsum([0, *(len(fold.labels) for fold in folds)])
    prepared = [
        _Fold(fold, every[first:last], len(used))
        for fold, first, last in zip(folds, starts[:-1], starts[1:], strict=True)
    ]
    points = [fold.values(np.ones((1, len(used)))) for fold in prepared]
    drawn = _resampled(prepared, len(used), resamples, seed)
    tails = ((1 - level) / 2, (1 + level) / 2)
    each = [
        {name: _entry(point[name][0], draws[name], tails, fold.why(name, classes)) for name in point}
        for fold, point, draws in zip(prepared, points, drawn, strict=True)
    ]
    if len(folds) == 1:
        return each[0], each
    together = {}
    for name in METRICS:
        known = [number for number, point in enumerate(points) if np.isfinite(point[name][0])]
        values = np.array([points[number][name][0] for number in known])
        draws = _mean_known(np.stack([draws[name] for draws in drawn]))
        reasons = [f"fold {i}: {why}" for i, fold in enumerate(prepared) if (why := fold.why(name, classes))]
        value = float(values.mean()) if known else np.nan
        std = float(values.std(ddof=1)) if len(known) > 1 else None
        partial = sum(int(np.isnan(drawn[number][name]).sum()) for number in known)
        together[name] = _entry(value, draws, tails, "; ".join(reasons))
        together[name] |= {"std": std, "folds": len(known), "left_out": partial / (resamples * max(1, len(known)))}
    total, draws = (np.sum([values["confusion"] for values in each_of], axis=0) for each_of in (points, drawn))
    together["confusion"] = _entry(total[0], draws, tails, "") | {"folds": len(folds)}
    return together, each


def _mean_known(values: Array) -> Array:
    """[F, r] to [r]: the mean of the folds that have a value in a resample, NaN where none has."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)
    return mean


class _Fold:
    """What is needed of a fold's cases to compute its metrics for any weights of the groups."""

    def __init__(self, cases: Predicted, groups: npt.NDArray[np.int64], num_groups: int) -> None:
        n, self.num_classes = cases.probabilities.shape
        labels, predicted = cases.labels, cases.probabilities.argmax(axis=1)
        cells = self.num_classes**2
        place = groups * cells + labels * self.num_classes + predicted
        self.confusion = np.bincount(place, minlength=num_groups * cells).reshape(num_groups, cells).astype(np.float64)
        self.loss = np.bincount(groups, case_losses(labels, cases.probabilities), num_groups)
        self.present = np.flatnonzero(np.bincount(labels, minlength=self.num_classes))
        self.averaged = np.unique([*self.present, *predicted])
        scored = (1,) if self.num_classes == 2 else tuple(range(self.num_classes))
        self.curves = [_Curve(labels == label, cases.probabilities[:, label], groups) for label in scored]
        self.num_cases = n

    def why(self, name: str, classes: Sequence[str]) -> str:
        """Why the metric has no value in this fold; empty where it has one."""
        if name != "auroc" or len(self.present) == self.num_classes:
            return ""
        absent = ", ".join(repr(classes[label]) for label in range(self.num_classes) if label not in self.present)
        return f"no tested case is of class {absent}"

    def values(self, weights: Array) -> dict[str, npt.NDArray[Any]]:
        """{metric: [r], confusion: [r, C, C]} for weights [r, G]; NaN where a metric has no value."""
        size = self.num_classes
        confusion = (weights @ self.confusion).reshape(-1, size, size)
        cases, hits = confusion.sum(axis=2), np.diagonal(confusion, axis1=1, axis2=2)
        total = confusion.sum(axis=(1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = (hits / cases)[:, self.present]
            # A class that is predicted and never true has an F1 of 0, drawn or not.
            f1 = 2 * hits / np.maximum(cases + confusion.sum(axis=1), 1)
            f1[:, self.present] = np.where(np.isnan(recall), np.nan, f1[:, self.present])
            accuracy, loss = hits.sum(axis=1) / total, weights @ self.loss / total
        if len(self.present) == size:
            auroc = np.mean([curve.area(weights) for curve in self.curves], axis=0)
        else:
            auroc = np.full(len(weights), np.nan)
        return {
            "accuracy": accuracy,
            "balanced_accuracy": recall.mean(axis=1),
            "auroc": auroc,
            "f1": f1[:, self.averaged].mean(axis=1),
            "log_loss": loss,
            "confusion": confusion.astype(np.int64),
        }


class _Curve:
    """The cases in the order of their scores, for areas under ROC curves."""

    def __init__(self, positive: npt.NDArray[np.bool_], scores: Array, groups: npt.NDArray[np.int64]) -> None:
        order = np.argsort(scores, kind="stable")
        self.groups, self.positive = groups[order], positive[order]
        ranked = scores[order]
        self.starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of each run of equals

    def area(self, weights: Array) -> Array:
        """[r], for weights [r, G]: the share of weighted pairs in the right order, ties counting half."""
        drawn = weights[:, self.groups]
        above = np.add.reduceat(drawn * self.positive, self.starts, axis=1)
        below = np.add.reduceat(drawn * ~self.positive, self.starts, axis=1)
        lower = np.cumsum(below, axis=1) - below / 2
        pairs = above.sum(axis=1) * below.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return (above * lower).sum(axis=1) / pairs


def _resampled(folds: Sequence[_Fold], num_groups: int, resamples: int, seed: int) -> list[dict[str, npt.NDArray[Any]]]:
    """For each fold {metric: [resamples, ...]}; what is drawn does not depend on how many are held at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_BYTES // (8 * max(num_groups, *(fold.num_cases for fold in folds))))
    parts: list[list[dict[str, npt.NDArray[Any]]]] = [[] for _ in folds]
    for first in range(0, resamples, rows):
        weights = np.stack(
            [
                np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
                for _ in range(min(rows, resamples - first))
            ]
        ).astype(np.float64)
        for fold, part in zip(folds, parts, strict=True):
            part.append(fold.values(weights))
    return [{name: np.concatenate([values[name] for values in part]) for name in part[0]} for part in parts]


def _entry(value: Any, draws: npt.NDArray[Any], tails: tuple[float, float], reason: str) -> dict[str, Any]:
    """As JSON holds it: numbers, lists of them, or None."""
    usable = draws[np.isfinite(draws)] if draws.ndim == 1 else draws
    low, high = np.quantile(usable, tails, axis=0) if len(usable) else (None, None)
    entry: Mapping[str, Any] = {"value": value, "low": low, "high": high}
    return {
        **{key: _plain(number) for key, number in entry.items()},
        "resamples": len(usable),
        "degenerate": len(draws) - len(usable),
        **({"reason": reason} if reason else {}),
    }


def _plain(number: Any) -> Any:
    if number is None or (np.ndim(number) == 0 and not np.isfinite(number)):
        return None
    return np.asarray(number).tolist()
