"""Metrics and their intervals against scikit-learn on resamples that are written out case by case."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from engine.evaluation import intervals
from engine.evaluation.intervals import METRICS, Predicted, measure


def _drawn(seed: int, n: int, classes: int, groups: int, *, decimals: int = 1) -> Predicted:
    rng = np.random.default_rng(seed)
    probabilities = np.round(rng.random((n, classes)), decimals) + 0.05
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])
    return Predicted(labels, probabilities / probabilities.sum(axis=1, keepdims=True), rng.integers(groups, size=n))


def _names(classes: int) -> list[str]:
    return [f"class {number}" for number in range(classes)]


def _expected(cases: Predicted, rows: np.ndarray) -> dict[str, float]:
    """The metrics of some rows, by scikit-learn; NaN where a class of all the cases is missing among them."""
    labels, probabilities = cases.labels[rows], cases.probabilities[rows]
    predicted = probabilities.argmax(axis=1)
    known = np.arange(probabilities.shape[1])
    found = {
        "accuracy": theirs.accuracy_score(labels, predicted),
        "log_loss": theirs.log_loss(labels, probabilities, labels=known),
    }
    if set(labels) != set(cases.labels):
        return found | dict.fromkeys(("balanced_accuracy", "f1", "auroc"), math.nan)
    every = sorted({*cases.labels.tolist(), *cases.probabilities.argmax(axis=1).tolist()})
    auroc = math.nan
    if len(set(labels)) == len(known):
        scores = probabilities[:, 1] if len(known) == 2 else probabilities
        auroc = theirs.roc_auc_score(labels, scores, multi_class="ovr", labels=None if len(known) == 2 else known)
    return {
        **found,
        "balanced_accuracy": theirs.recall_score(labels, predicted, labels=sorted(set(labels)), average="macro"),
        "f1": theirs.f1_score(labels, predicted, labels=every, average="macro", zero_division=0),
        "auroc": auroc,
    }


def _resampled_rows(groups: np.ndarray, resamples: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    names = np.unique(groups)
    return [
        np.concatenate([np.flatnonzero(groups == names[i]) for i in rng.integers(len(names), size=len(names))])
        for _ in range(resamples)
    ]


@pytest.mark.parametrize(("classes", "groups"), [(2, 30), (2, 6), (3, 12), (5, 40)])
def test_values_and_intervals_are_those_of_resamples_written_out(classes: int, groups: int) -> None:
    cases = _drawn(classes, 60, classes, groups)
    found, each = measure([cases], _names(classes), resamples=80, seed=3, level=0.9)
    assert each == [found]
    drawn = [_expected(cases, rows) for rows in _resampled_rows(cases.groups, 80, 3)]
    for name in METRICS:
        values = np.array([draw[name] for draw in drawn])
        usable = values[np.isfinite(values)]
        assert found[name]["value"] == pytest.approx(_expected(cases, np.arange(60))[name])
        assert (found[name]["resamples"], found[name]["degenerate"]) == (len(usable), 80 - len(usable))
        assert (found[name]["low"], found[name]["high"]) == pytest.approx(tuple(np.quantile(usable, [0.05, 0.95])))
    predicted = cases.probabilities.argmax(axis=1)
    assert found["confusion"]["value"] == theirs.confusion_matrix(cases.labels, predicted).tolist()


@pytest.mark.parametrize("chunk_bytes", [1, 5000])
def test_how_many_resamples_are_held_at_a_time_changes_nothing(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = [_drawn(seed, 40, 3, 10) for seed in range(2)]
    expected = measure(folds, _names(3), resamples=50)
    monkeypatch.setattr(intervals, "_CHUNK_BYTES", chunk_bytes)
    again = measure(folds, _names(3), resamples=50)
    for found, before in zip([again[0], *again[1]], [expected[0], *expected[1]], strict=True):
        for name in METRICS:
            assert found[name] == pytest.approx(before[name], rel=1e-12)


def test_the_seed_decides_the_intervals_and_nothing_else() -> None:
    cases = _drawn(0, 60, 2, 20, decimals=3)
    first, again, other = (measure([cases], _names(2), resamples=100, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first["auroc"]["value"] == other["auroc"]["value"]
    assert first["auroc"]["low"] != other["auroc"]["low"]


def test_groups_and_not_cases_are_resampled() -> None:
    """Ten copies of a case say no more than one: the interval stays as wide."""
    cases = _drawn(1, 40, 2, 40, decimals=3)
    alone = Predicted(cases.labels, cases.probabilities, np.arange(40))
    copied = Predicted(np.repeat(cases.labels, 10), np.repeat(cases.probabilities, 10, axis=0), np.arange(400) // 10)
    naive = Predicted(copied.labels, copied.probabilities, np.arange(400))
    one, ten, wrong = (measure([each], _names(2), resamples=200)[0]["accuracy"] for each in (alone, copied, naive))
    assert ten == pytest.approx(one)
    assert wrong["high"] - wrong["low"] < 0.6 * (one["high"] - one["low"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 9), st.integers(1, 3))
def test_entries_are_json_in_range_and_count_every_resample(seed: int, classes: int, groups: int, folds: int) -> None:
    cases = [_drawn(seed + number, 12, classes, groups) for number in range(folds)]
    found, each = measure(cases, _names(classes), resamples=20, seed=seed)
    json.dumps([found, each], allow_nan=False)
    for entry in (entry for values in (found, *each) for entry in values.values()):
        assert entry["resamples"] + entry["degenerate"] == 20
    for name in ("accuracy", "balanced_accuracy", "auroc", "f1"):
        entry = found[name]
        assert 0 <= entry["value"] <= 1
        assert entry["low"] is None or 0 <= entry["low"] <= entry["high"] <= 1


def test_metrics_do_not_depend_on_the_order_of_cases_or_folds() -> None:
    cases = _drawn(4, 50, 3, 12)
    order = np.random.default_rng(0).permutation(50)
    shuffled = Predicted(cases.labels[order], cases.probabilities[order], cases.groups[order])
    first, second = (measure([each], _names(3), resamples=30)[0] for each in (cases, shuffled))
    for name in METRICS:
        assert first[name] == pytest.approx(second[name])


def test_several_folds_are_averaged_and_their_groups_drawn_together() -> None:
    folds = [_drawn(seed, 40, 2, 15, decimals=3) for seed in range(3)]
    found, each = measure(folds, _names(2), resamples=60, seed=5)
    values = [fold["auroc"]["value"] for fold in each]
    assert found["auroc"]["value"] == pytest.approx(np.mean(values))
    assert found["auroc"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["auroc"]["folds"] == 3
    total = np.sum([fold["confusion"]["value"] for fold in each], axis=0)
    assert found["confusion"]["value"] == total.tolist()
    rng = np.random.default_rng(5)
    names = np.unique(np.concatenate([fold.groups for fold in folds]))
    means = []
    for _ in range(60):
        drawn = names[rng.integers(len(names), size=len(names))]
        rows = [np.concatenate([np.flatnonzero(fold.groups == name) for name in drawn]) for fold in folds]
        means.append(np.mean([_expected(fold, part)["accuracy"] for fold, part in zip(folds, rows, strict=True)]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == pytest.approx((low, high))


def test_a_class_that_is_not_tested_leaves_the_auroc_null_with_the_reason() -> None:
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    cases = Predicted(np.array([0, 1, 1, 0]), probabilities, np.arange(4))
    found, _ = measure([cases], ["normal", "benign", "tumour"], resamples=50)
    assert found["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
        "resamples": 0,
        "degenerate": 50,
        "reason": "no tested case is of class 'tumour'",
    }
    assert found["balanced_accuracy"]["value"] == 0.5  # of the two classes that are tested
    assert found["f1"]["value"] == pytest.approx(np.mean([2 / 4, 2 / 3, 0]))  # tumour is predicted, wrongly


def test_of_folds_that_lack_a_class_the_others_are_averaged_and_the_reason_told() -> None:
    whole = _drawn(0, 30, 2, 30)
    single = Predicted(np.zeros(5, np.int64), whole.probabilities[:5], np.arange(30, 35))
    found, each = measure([whole, single], ["no", "yes"], resamples=40)
    assert found["auroc"]["value"] == each[0]["auroc"]["value"]
    assert (found["auroc"]["folds"], found["auroc"]["std"]) == (1, None)
    assert found["auroc"]["reason"] == "fold 1: no tested case is of class 'yes'"
    assert found["accuracy"]["folds"] == 2


def test_resamples_that_lack_a_class_are_counted() -> None:
    cases = Predicted(np.array([0, 0, 0, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6]]), np.arange(4))
    found, _ = measure([cases], ["no", "yes"], resamples=400)
    lacking = sum(len(set(cases.labels[rows])) < 2 for rows in _resampled_rows(cases.groups, 400, 0))
    assert found["auroc"]["degenerate"] == found["balanced_accuracy"]["degenerate"] == lacking > 0
    assert found["accuracy"]["degenerate"] == 0


def test_certain_and_wrong_probabilities_give_a_finite_log_loss() -> None:
    cases = Predicted(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]), np.arange(2))
    found, _ = measure([cases], ["no", "yes"], resamples=10)
    assert found["log_loss"]["value"] == pytest.approx(theirs.log_loss([0, 1], [[1.0, 0.0], [1.0, 0.0]], labels=[0, 1]))


@pytest.mark.parametrize(
    ("folds", "sentence"),
    [
        ([], "no cases to measure"),
        ([Predicted(np.empty(0, np.int64), np.empty((0, 2)), np.empty(0, np.int64))], "no cases to measure"),
        (
            [Predicted(np.zeros(2, np.int64), np.ones((2, 3)), np.zeros(2, np.int64))],
            r"probabilities \[n, 2\].*\(2, 3\)",
        ),
        ([Predicted(np.zeros(2, np.int64), np.ones((2, 2)), np.zeros(3, np.int64))], r"\(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(folds: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure(folds, ["no", "yes"])
