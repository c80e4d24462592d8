"""Classifiers on frozen features, and the choice of their number and of the scaling on a validation split."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.evaluation.folds import Fold
from engine.evaluation.knn import knn_classify
from engine.evaluation.metrics import balanced_accuracy, log_loss

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Scale = Literal["none", "standard", "lda"]
SCALES: tuple[Scale, ...] = ("standard", "none", "lda")  # in the order in which equals are taken

_MAX_ITERATIONS = 2000


@dataclass(frozen=True, slots=True)
class Probe:
    """What is fitted to the training features of a fold.

    Attributes:
        kind: logistic: multinomial logistic regression with an L2 penalty (scikit-learn, L-BFGS, float32); adam: the
            same without a penalty, trained as vittm-hmr does (5 epochs of batches of 128, learning rate 1e-3); knn.
        scale: standard: each feature with mean 0 and standard deviation 1; lda: coordinates along the at most C - 1
            directions that separate the classes, with unit spread within them (linear discriminant analysis);
            both are learnt from what the probe is fitted to; auto: the validation chooses among the three.
        options: C of logistic (the inverse of the penalty) or k of knn, from which the validation chooses the one of
            largest balanced accuracy, of equals that of smallest log loss, then the first; empty for adam. With
            scale auto, each is tried with each scaling.
        refit: fit again, to training and validation, what was chosen.
        balanced: logistic weights each class by n / (C * its samples).
        votes: of knn: weighted is `knn_classify` (cosine); uniform is one vote of each Euclidean neighbour.
    """

    kind: Literal["logistic", "adam", "knn"] = "logistic"
    scale: Scale | Literal["auto"] = "standard"
    options: tuple[float, ...] = (1.0,)
    refit: bool = True
    balanced: bool = False
    votes: Literal["weighted", "uniform"] = "weighted"
    temperature: float = 0.07
    seed: int = 0

    @property
    def chooses(self) -> bool:
        """Whether a validation is needed."""
        return len(self.candidates) > 1

    @property
    def candidates(self) -> list[tuple[Scale, float | None]]:
        """The scalings and options from which the validation chooses."""
        scales = SCALES if self.scale == "auto" else (self.scale,)
        return list(itertools.product(scales, self.options or (None,)))


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a probe says of the tested samples of a fold.

    Attributes:
        probabilities: float64 [n_test, C].
        chosen: the option that was taken, None where there is none.
        scale: the scaling that was taken.
        validation: its balanced accuracy on the validation, None where nothing was chosen.
        converged: whether every fit of it did.
        by_option: the probabilities of each option with that scaling, where all were asked for.
    """

    probabilities: npt.NDArray[np.float64]
    chosen: float | None
    scale: Scale
    validation: float | None
    converged: bool
    by_option: dict[float, npt.NDArray[np.float64]]


def fit_and_predict(
    probe: Probe, x: Features, labels: Labels, fold: Fold, num_classes: int, *, every_option: bool = False
) -> Fitted:
    """Fit the probe to a fold of x [n, D] and labels [n], and predict its test samples.

    Raises:
        ValueError: a training part with a single class, or fewer samples than k.
    """
    converged = True

    def predict(scale: Scale, option: float | None, train: Labels, test: Labels) -> npt.NDArray[np.float64]:
        nonlocal converged
        found, well = _predict(probe, scale, option, x[train], labels[train], x[test], num_classes)
        converged &= well
        return found

    scale, chosen = probe.candidates[0]
    validation = None
    if probe.chooses:
        truth = labels[fold.val]
        found = [predict(*candidate, fold.train, fold.val) for candidate in probe.candidates]
        scores = [(balanced_accuracy(truth, each.argmax(axis=1)), -log_loss(truth, each)) for each in found]
        best = max(range(len(scores)), key=scores.__getitem__)
        (scale, chosen), validation = probe.candidates[best], scores[best][0]
    known = np.union1d(fold.train, fold.val) if probe.refit else fold.train
    by_option = {option: predict(scale, option, known, fold.test) for option in probe.options if every_option}
    probabilities = by_option[chosen] if chosen in by_option else predict(scale, chosen, known, fold.test)
    return Fitted(probabilities, chosen, scale, validation, converged, by_option)


def _predict(
    probe: Probe,
    scale: Scale,
    option: float | None,
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    num_classes: int,
) -> tuple[npt.NDArray[np.float64], bool]:
    """Probabilities [n_test, num_classes] (0 for a class that is not among train_y), and whether the fit converged."""
    if (probe.kind != "knn" or scale == "lda") and len(np.unique(train_y)) < 2:
        what = "the scaling lda" if probe.kind == "knn" else "a linear probe"
        raise ValueError(f"{what} needs two classes to train on: found {len(np.unique(train_y))}; see the splits")
    train, test = _scaled(scale, train_x, train_y, test_x)
    if probe.kind == "adam":
        return _adam(train, train_y, test, num_classes, probe.seed), True
    if probe.kind == "knn":
        assert option is not None
        if probe.votes == "weighted":
            return knn_classify(train, train_y, test, int(option), probe.temperature, num_classes), True
        return _uniform_votes(train, train_y, test, int(option), num_classes), True
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=option, max_iter=_MAX_ITERATIONS, class_weight="balanced" if probe.balanced else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train, train_y)
    return _spread(model, model.predict_proba(test), num_classes), not any(
        issubclass(each.category, ConvergenceWarning) for each in caught
    )


def _spread(model: Any, found: npt.NDArray[Any], num_classes: int) -> npt.NDArray[np.float64]:
    """Columns of the classes that the model knows, among all of them; rows sum to 1."""
    probabilities = np.zeros((len(found), num_classes))
    probabilities[:, model.classes_] = found
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def _scaled(scale: Scale, train_x: Features, train_y: Labels, test_x: Features) -> tuple[Features, Features]:
    if scale == "none":
        return train_x, test_x
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.preprocessing import StandardScaler

    standard = StandardScaler().fit(train_x)
    train, test = standard.transform(train_x), standard.transform(test_x)
    if scale == "lda":
        directions = LinearDiscriminantAnalysis().fit(train.astype(np.float64), train_y)
        train, test = (directions.transform(part.astype(np.float64)).astype(np.float32) for part in (train, test))
    return train, test


def _uniform_votes(
    train: Features, train_y: Labels, test: Features, k: int, num_classes: int
) -> npt.NDArray[np.float64]:
    from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= k <= len(train):
        raise ValueError(f"k must lie in [1, {len(train)}], the number of training rows: found {k}")
    model = KNeighborsClassifier(k).fit(train, train_y)
    return _spread(model, model.predict_proba(test), num_classes)


def _adam(train: Features, train_y: Labels, test: Features, num_classes: int, seed: int) -> npt.NDArray[np.float64]:
    """The probe of vittm-hmr: a linear layer, Adam, cross entropy, shuffled batches."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(train), torch.from_numpy(train_y)
    bound = x.shape[1] ** -0.5  # torch's own for a linear layer, drawn here so that the seed alone decides
    weight, bias = (
        ((2 * torch.rand(shape, generator=generator) - 1) * bound).requires_grad_()
        for shape in ((num_classes, x.shape[1]), (num_classes,))
    )
    optimizer = torch.optim.Adam([weight, bias], lr=1e-3)
    for _ in range(5):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            logits = torch.nn.functional.linear(x[rows], weight, bias)
            torch.nn.functional.cross_entropy(logits, y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        found = torch.nn.functional.linear(torch.from_numpy(test), weight, bias).double().softmax(dim=1)
    probabilities: npt.NDArray[np.float64] = found.numpy()
    return probabilities
