"""Metrics of predictions, and how sure of them one can be.

Written here in numpy, because what they must agree with is defined here: Harrell's C with the pairs, ties and counts
that published survival results use, and AUCs that say NaN for a class that is absent.

Shapes: n cases, C classes. Probabilities are [n, C]; scores of a binary label may be [n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Array = npt.NDArray[np.float64]


class Concordance(float):
    """Harrell's C, a number; it carries the pairs behind it, and unpacks into itself and the four counts.

    Its value is (concordant + tied_risk / 2) / (concordant + discordant + tied_risk).

    Attributes:
        concordant, discordant: comparable pairs whose risks are in the right and in the wrong order.
        tied_risk: comparable pairs whose risks differ by 1e-8 at most.
        tied_time: comparable pairs at the same time (an event, and a case censored then).
    """

    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int

    def __new__(cls, concordant: int, discordant: int, tied_risk: int, tied_time: int) -> Self:
        self = super().__new__(cls, (concordant + 0.5 * tied_risk) / (concordant + discordant + tied_risk))
        self.concordant, self.discordant = concordant, discordant
        self.tied_risk, self.tied_time = tied_risk, tied_time
        return self

    @property
    def cindex(self) -> float:
        """The number alone."""
        return float(self)

    def __getnewargs__(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        return self.concordant, self.discordant, self.tied_risk, self.tied_time

    def __iter__(self) -> Iterator[float]:
        return iter((self.cindex, *self.__getnewargs__()))

    def __getitem__(self, index: int) -> float:
        return (self.cindex, *self.__getnewargs__())[index]


def concordance_index(
    time: npt.ArrayLike, event: npt.ArrayLike, risk: npt.ArrayLike, *, tied_tol: float = 1e-8
) -> Concordance:
    """Harrell's concordance index: how often the case with the earlier event has the higher risk.

    A pair is comparable where one case has an event and the other is known to have gone on longer: a later time, or
    the same time but censored. Two events at the same time are not comparable. O(n) memory, O(n * events) time.

    Args:
        time: [n].
        event: [n], 1 or True where the event was seen, 0 where the case is censored.
        risk: [n], higher where the event is expected earlier.
        tied_tol: risks that differ by no more are tied.

    Raises:
        ValueError: shapes that differ, values that are not finite, or no comparable pair.
    """
    times, risks = np.asarray(time, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    events = np.asarray(event).astype(bool)
    if not times.shape == risks.shape == events.shape or times.ndim != 1:
        raise ValueError(
            f"time, event and risk must be of one length: found {times.shape}, {events.shape}, {risks.shape}"
        )
    if not (np.isfinite(times).all() and np.isfinite(risks).all()):
        raise ValueError("time and risk must be finite numbers")
    concordant = discordant = tied_risk = tied_time = 0
    for case in np.flatnonzero(events):
        same_time = (times == times[case]) & ~events
        ahead = risks[case] - risks[(times > times[case]) | same_time]
        tied = int((np.abs(ahead) <= tied_tol).sum())
        right = int((ahead > tied_tol).sum())
        concordant += right
        tied_risk += tied
        discordant += len(ahead) - right - tied
        tied_time += int(same_time.sum())
    if not concordant + discordant + tied_risk:
        raise ValueError(
            f"no pair can be compared: found {int(events.sum())} events among {len(times)} cases, "
            "and expected one with another case that goes on longer"
        )
    return Concordance(concordant, discordant, tied_risk, tied_time)


def roc_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    Args:
        labels: [n], classes.
        scores: [n], of class 1; or [n, 2], of which column 1 counts; or [n, C]: the mean of the AUCs of each class
            against the rest.

    Returns:
        NaN where a class, or its rest, has no case.

    Raises:
        ValueError: shapes that do not fit.
    """
    classes, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if values.ndim not in (1, 2) or len(values) != len(classes):
        raise ValueError(f"scores must be [n] or [n, C] for labels [n]: found {values.shape} for {classes.shape}")
    if values.ndim == 1:
        return _binary_auc(classes == 1, values)
    if values.shape[1] == 2:
        return _binary_auc(classes == 1, values[:, 1])
    return float(np.mean([_binary_auc(classes == label, column) for label, column in enumerate(values.T)]))


def _binary_auc(positive: npt.NDArray[np.bool_], scores: Array) -> float:
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    above = rankdata(scores)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def confusion_matrix(labels: npt.ArrayLike, predictions: npt.ArrayLike, n_classes: int) -> npt.NDArray[np.int64]:
    """int64 [C, C]: cases of true class (row) and predicted class (column)."""
    pairs = np.asarray(labels).astype(np.int64) * n_classes + np.asarray(predictions).astype(np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def accuracy(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Share of cases whose predicted class is the true one."""
    return float((np.asarray(labels) == np.asarray(predictions)).mean())


def balanced_accuracy(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Mean over the true classes of the share of each that is predicted rightly."""
    classes, predicted = np.asarray(labels), np.asarray(predictions)
    return float(np.mean([(predicted[classes == label] == label).mean() for label in np.unique(classes)]))


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean of -log of the probability [n, C] of the true class [n], clipped to [2^-52, 1 - 2^-52]."""
    return float(case_losses(labels, probabilities).mean())


def case_losses(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> Array:
    """Of each case what `log_loss` averages, float64 [n]."""
    likely = np.take_along_axis(np.asarray(probabilities, np.float64), np.asarray(labels)[:, None], axis=1)[:, 0]
    epsilon = np.finfo(np.float64).eps
    losses: Array = -np.log(np.clip(likely, epsilon, 1 - epsilon))
    return losses


def quadratic_kappa(labels: npt.ArrayLike, predictions: npt.ArrayLike, n_classes: int) -> float:
    """Cohen's kappa of ordered classes, disagreement weighted by its square.

    NaN where chance cannot disagree: both hold a single class, and the same one.
    """
    found = confusion_matrix(labels, predictions, n_classes)
    by_chance = np.outer(found.sum(axis=1), found.sum(axis=0)) / found.sum()
    grade = np.arange(n_classes)
    weight = (grade[:, None] - grade[None]) ** 2
    expected = float((weight * by_chance).sum())
    return 1 - float((weight * found).sum()) / expected if expected else float("nan")


class Interval(NamedTuple):
    """A metric with its bootstrap interval.

    value: on all cases. low, high: percentiles over the resamples. resamples: how many of them had a value.
    """

    value: float
    low: float
    high: float
    resamples: int


def bootstrap(
    metric: Callable[..., float], *columns: npt.ArrayLike, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """`metric(*columns)` with a percentile interval over cases drawn with replacement.

    Resamples on which the metric is NaN (an AUC without one of the classes) are left out, and not counted.

    Args:
        columns: arrays of n rows each; a case is a row of all of them. Cases that depend on each other (slides of a
            patient) make the interval too narrow: give one row per patient.
        level: share of the resamples between `low` and `high`.

    Raises:
        ValueError: columns of different length.
    """
    arrays = [np.asarray(column) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"columns must have one length: found {[len(array) for array in arrays]}")
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    values = np.array([metric(*(array[rows] for array in arrays)) for rows in rng.integers(n, size=(resamples, n))])
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if len(values) else (np.nan, np.nan)
    return Interval(float(metric(*arrays)), float(low), float(high), len(values))
