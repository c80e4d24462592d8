"""Probes against scikit-learn fitted by hand, and what the choice of their number may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from engine.evaluation.folds import Fold
from engine.evaluation.knn import knn_classify
from engine.evaluation.probe import Probe, fit_and_predict

FOLD = Fold("x", np.arange(0, 60), np.arange(60, 90), np.arange(90, 130))


def _drawn(seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Features [130, 6] of very different sizes, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=130)
    x = rng.normal(size=(130, 6))
    x[:, :classes] += 1.5 * np.eye(classes)[labels]
    return (x * np.array([1, 50, 0.02, 1, 1, 300]) + 5).astype(np.float32), labels


def _scaled(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = StandardScaler().fit(x[known]).transform(x)
    return scaled


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_logistic_regression_is_scikit_learns_on_standardised_features(refit: bool, balanced: bool) -> None:
    x, y = _drawn()
    found = fit_and_predict(Probe(options=(0.5,), refit=refit, balanced=balanced), x, y, FOLD, 3)
    known = np.arange(90) if refit else FOLD.train
    scaled = _scaled(x, known)
    model = LogisticRegression(C=0.5, max_iter=2000, class_weight="balanced" if balanced else None)
    expected = model.fit(scaled[known], y[known]).predict_proba(scaled[FOLD.test])
    assert found.probabilities == pytest.approx(expected, abs=1e-6)
    assert (found.chosen, found.scale, found.validation, found.converged) == (0.5, "standard", None, True)


def test_of_several_penalties_the_one_best_on_the_validation_is_taken() -> None:
    x, y = _drawn()
    options = (1e-6, 0.01, 1.0)
    found = fit_and_predict(Probe(options=options), x, y, FOLD, 3)
    scaled = _scaled(x, FOLD.train)
    scores = []
    for option in options:
        model = LogisticRegression(C=option).fit(scaled[FOLD.train], y[FOLD.train])
        predicted = model.predict(scaled[FOLD.val])
        recall = np.mean([(predicted[y[FOLD.val] == c] == c).mean() for c in range(3)])
        scores.append((recall, -log_loss(y[FOLD.val], model.predict_proba(scaled[FOLD.val]))))
    assert found.chosen == options[scores.index(max(scores))] != options[0]
    assert found.validation == pytest.approx(max(scores)[0])
    refitted = fit_and_predict(Probe(options=(found.chosen,)), x, y, FOLD, 3)
    assert np.array_equal(found.probabilities, refitted.probabilities)


def test_of_penalties_that_err_alike_the_surer_one_is_taken() -> None:
    x, y = _drawn()
    x[:, :3] += 1e4 * np.eye(3, dtype=np.float32)[y]
    found = fit_and_predict(Probe(options=(1e-4, 1.0, 1e-3)), x, y, FOLD, 3)
    assert (found.chosen, found.validation) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["logistic", "adam", "knn"])
def test_neither_labels_nor_features_of_the_test_reach_the_fit(kind: str) -> None:
    x, y = _drawn()
    options = {"logistic": (0.1, 1.0), "adam": (), "knn": (3.0, 9.0)}[kind]
    probe = Probe(kind, "standard", options)  # type: ignore[arg-type]
    first = fit_and_predict(probe, x, y, FOLD, 3)
    other_x, other_y = x.copy(), y.copy()
    other_y[FOLD.test] = 0
    other_x[FOLD.test[1:]] *= 1000
    second = fit_and_predict(probe, other_x, other_y, FOLD, 3)
    assert first.chosen == second.chosen
    assert first.probabilities[0] == pytest.approx(second.probabilities[0], abs=1e-6)


def test_weighted_votes_are_those_of_knn_and_each_k_can_be_had() -> None:
    x, y = _drawn()
    probe = Probe("knn", "none", (3.0, 20.0), refit=False)
    found = fit_and_predict(probe, x, y, FOLD, 3, every_option=True)
    assert list(found.by_option) == [3.0, 20.0]
    for k, probabilities in found.by_option.items():
        assert np.array_equal(probabilities, knn_classify(x[FOLD.train], y[FOLD.train], x[FOLD.test], int(k), 0.07, 3))
    assert np.array_equal(found.probabilities, found.by_option[found.chosen])  # type: ignore[index]


def test_uniform_votes_are_scikit_learns_defaults() -> None:
    """HIPT's slide level: KNeighborsClassifier() on features as they are."""
    x, y = _drawn()
    found = fit_and_predict(Probe("knn", "none", (5.0,), refit=False, votes="uniform"), x, y, FOLD, 3)
    expected = KNeighborsClassifier().fit(x[FOLD.train], y[FOLD.train]).predict_proba(x[FOLD.test])
    assert np.array_equal(found.probabilities, expected)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 60\].*found 61"):
        fit_and_predict(Probe("knn", options=(61.0,), refit=False, votes="uniform"), x, y, FOLD, 3)


def test_discriminants_have_unit_spread_within_the_classes() -> None:
    x, y = _drawn()
    found = fit_and_predict(Probe("knn", "lda", (5.0,), refit=False, votes="uniform"), x, y, FOLD, 3)
    scaled = _scaled(x, FOLD.train).astype(np.float64)
    along = LinearDiscriminantAnalysis().fit(scaled[FOLD.train], y[FOLD.train]).transform(scaled)
    expected = KNeighborsClassifier().fit(along[FOLD.train], y[FOLD.train]).predict_proba(along[FOLD.test])
    assert found.probabilities == pytest.approx(expected)
    within = np.concatenate([along[:60][y[:60] == c] - along[:60][y[:60] == c].mean(axis=0) for c in range(3)])
    assert (within**2).sum(axis=0) / 60 == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("votes", ["weighted", "uniform"])
def test_scaling_and_k_are_chosen_together_by_the_validation_alone(votes: Literal["weighted", "uniform"]) -> None:
    x, y = _drawn()
    options = (3.0, 20.0)
    found = fit_and_predict(Probe("knn", "auto", options, votes=votes), x, y, FOLD, 3)
    alone = {
        (scale, k): fit_and_predict(Probe("knn", scale, (k,), refit=False, votes=votes), x, y, held, 3).probabilities
        for held in [replace(FOLD, test=FOLD.val)]
        for scale in ("none", "standard", "lda")
        for k in options
    }
    scores = {
        one: np.mean([(p.argmax(axis=1)[y[FOLD.val] == c] == c).mean() for c in range(3)]) for one, p in alone.items()
    }
    assert found.chosen is not None
    assert found.validation == pytest.approx(max(scores.values())) == scores[found.scale, found.chosen]
    assert len(set(scores.values())) > 1
    again = fit_and_predict(Probe("knn", found.scale, (found.chosen,), votes=votes), x, y, FOLD, 3)
    assert np.array_equal(found.probabilities, again.probabilities)
    y[FOLD.test] = 0
    assert fit_and_predict(Probe("knn", "auto", options, votes=votes), x, y, FOLD, 3).scale == found.scale


@pytest.mark.parametrize("scale", ["lda", "auto"])
def test_discriminants_of_one_class_are_refused(scale: Literal["lda", "auto"]) -> None:
    x, y = _drawn()
    y[np.concatenate([FOLD.train, FOLD.val])] = 1
    with pytest.raises(ValueError, match="the scaling lda needs two classes to train on: found 1"):
        fit_and_predict(Probe("knn", scale, (3.0,)), x, y, FOLD, 3)


def test_the_probe_of_vittm_hmr_learns_and_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=4000)
    x = rng.normal(size=(4000, 16)).astype(np.float32)
    x[:, 0] += 3 * y
    fold = Fold("x", np.arange(3000), np.empty(0, np.int64), np.arange(3000, 4000))
    probe = Probe("adam", "none", ())
    first, again, other = (fit_and_predict(replace(probe, seed=seed), x, y, fold, 2) for seed in (0, 0, 1))
    assert np.array_equal(first.probabilities, again.probabilities)
    assert not np.array_equal(first.probabilities, other.probabilities)
    assert (first.probabilities.argmax(axis=1) == y[fold.test]).mean() > 0.8
    assert first.probabilities.sum(axis=1) == pytest.approx(np.ones(1000))


def test_a_class_that_training_lacks_has_no_probability() -> None:
    x, y = _drawn()
    y[:90] = y[:90] % 2
    y[90:] = 2
    for probe in (Probe(), Probe("knn", "none", (5.0,)), Probe("knn", "none", (5.0,), votes="uniform")):
        found = fit_and_predict(probe, x, y, FOLD, 3).probabilities
        assert found.shape == (40, 3)
        assert not found[:, 2].any()
        assert found.sum(axis=1) == pytest.approx(np.ones(40))
    y[:90] = 0
    with pytest.raises(ValueError, match="two classes to train on: found 1"):
        fit_and_predict(Probe(), x, y, FOLD, 3)


def test_a_fit_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.evaluation.probe._MAX_ITERATIONS", 1)
    x, y = _drawn()
    assert not fit_and_predict(Probe(), x, y, FOLD, 3).converged


def test_a_feature_that_never_varies_does_no_harm() -> None:
    x, y = _drawn()
    x[:, 3] = 7
    for scale in ("standard", "lda"):
        found = fit_and_predict(Probe(scale=scale), x, y, FOLD, 3)
        assert np.isfinite(found.probabilities).all()
