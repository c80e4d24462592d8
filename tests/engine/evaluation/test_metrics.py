"""Metrics against their definitions, pair by pair, and the published numbers."""

from __future__ import annotations

import csv
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    bootstrap,
    concordance_index,
    confusion_matrix,
    log_loss,
    quadratic_kappa,
    roc_auc,
)


def slow_concordance(time: Any, event: Any, risk: Any) -> tuple[float, int, int, int, int]:
    concordant = discordant = tied_risk = tied_time = 0
    for i in range(len(time)):
        for j in range(len(time)):
            at_once = time[i] == time[j] and not event[j]
            if i == j or not event[i] or not (time[i] < time[j] or at_once):
                continue
            tied_time += at_once
            if abs(risk[i] - risk[j]) <= 1e-8:
                tied_risk += 1
            elif risk[i] > risk[j]:
                concordant += 1
            else:
                discordant += 1
    pairs = concordant + discordant + tied_risk
    return (concordant + tied_risk / 2) / pairs, concordant, discordant, tied_risk, tied_time


@pytest.mark.parametrize("seed", range(5))
def test_concordance_counts_pairs_of_an_event_and_a_longer_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time, event, risk = rng.integers(1, 12, 40), rng.integers(2, size=40), rng.integers(6, size=40) / 3
    found = concordance_index(time, event, risk)
    assert tuple(found) == pytest.approx(slow_concordance(time, event, risk))
    assert found.tied_time > 0
    assert found.tied_risk > 0
    assert found == found.cindex == found[0]
    assert pickle.loads(pickle.dumps(found)).tied_time == found.tied_time


def test_concordance_matches_the_published_code(published: Any) -> None:
    rng = published.formulas("fill_hipt").rng
    time = np.round(rng("evtime").uniform(1, 60, 30))
    censored = rng("cens").uniform(size=30) > 0.6
    found = concordance_index(time, ~censored, np.round(rng("risk").standard_normal(30), 1))
    assert tuple(found) == pytest.approx(published.arrays("metrics")["cindex.censored_tied1e-8"].tolist(), abs=1e-9)


def test_concordance_is_a_number_that_can_be_bootstrapped() -> None:
    rng = np.random.default_rng(0)
    time, risk = rng.uniform(1, 9, 60), rng.normal(size=60)
    event = np.ones(60)
    draws = np.random.default_rng(1).integers(60, size=(50, 60))
    values = [concordance_index(time[rows], event, risk[rows]) for rows in draws]
    found = bootstrap(concordance_index, time, event, risk, resamples=50, seed=1)
    assert (found.value, found.resamples) == (concordance_index(time, event, risk), 50)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_concordance_by_hand() -> None:
    assert tuple(concordance_index([1, 2, 3], [1, 1, 0], [3, 2, 1])) == (1.0, 3, 0, 0, 0)
    assert tuple(concordance_index([1, 2, 3], [1, 1, 0], [1, 2, 3])) == (0.0, 0, 3, 0, 0)
    assert tuple(concordance_index([1, 1], [1, 0], [2, 1])) == (1.0, 1, 0, 0, 1)  # censored at the same time: longer
    assert tuple(concordance_index([1, 1, 2], [1, 1, 0], [5, 5 + 1e-9, 5])) == (0.5, 0, 0, 2, 0)  # no pair of events


@pytest.mark.parametrize(
    ("time", "event", "risk", "sentence"),
    [
        ([1, 2], [0, 0], [1, 2], "found 0 events among 2 cases"),
        ([1, 1], [1, 1], [1, 2], "found 2 events among 2 cases"),
        ([1, 2], [1, 1], [1, 2, 3], r"of one length: found \(2,\), \(2,\), \(3,\)"),
        ([1, math.inf], [1, 1], [1, 2], "finite"),
        ([1, 2], [1, 1], [1, math.nan], "finite"),
    ],
)
def test_concordance_without_a_meaning_is_refused(time: Any, event: Any, risk: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        concordance_index(time, event, risk)


def slow_auc(positive: Any, scores: Any) -> float:
    pairs = [
        (s > t) + (s == t) / 2
        for s, p in zip(scores, positive, strict=True)
        if p
        for t, q in zip(scores, positive, strict=True)
        if not q
    ]
    return sum(pairs) / len(pairs)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=60), rng.integers(10, size=60) / 10
    assert roc_auc(labels, scores) == pytest.approx(slow_auc(labels == 1, scores))
    assert roc_auc(labels, np.stack([1 - scores, scores], axis=1)) == pytest.approx(slow_auc(labels == 1, scores))
    many = rng.random((60, 3))
    grades = rng.integers(3, size=60)
    each = [slow_auc(grades == c, many[:, c]) for c in range(3)]
    assert roc_auc(grades, many) == pytest.approx(np.mean(each))


def test_auc_of_an_absent_class_is_nan() -> None:
    assert math.isnan(roc_auc([1, 1], [0.2, 0.3]))
    assert math.isnan(roc_auc([0, 1, 1], np.eye(3)))
    with pytest.raises(ValueError, match=r"found \(3,\) for \(2,\)"):
        roc_auc([0, 1], [0.1, 0.2, 0.3])


def test_accuracies_and_kappa_by_hand() -> None:
    labels, predictions = [0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 0, 2]
    assert confusion_matrix(labels, predictions, 3).tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert accuracy(labels, predictions) == pytest.approx(4 / 6)
    assert balanced_accuracy(labels, predictions) == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    # Squared errors 0+0+1+0+4+0; by chance (rows 3, 1, 2; columns 3, 2, 1): sum of w * row * column / 6.
    by_chance = (3 * 2 * 1 + 3 * 1 * 4 + 1 * 3 * 1 + 1 * 1 * 1 + 2 * 3 * 4 + 2 * 2 * 1) / 6
    assert quadratic_kappa(labels, predictions, 3) == pytest.approx(1 - 5 / by_chance)
    assert quadratic_kappa([0, 1, 2], [0, 1, 2], 3) == 1.0
    assert math.isnan(quadratic_kappa([1, 1], [1, 1], 3))


def test_log_loss_by_hand() -> None:
    found = log_loss([0, 1, 1], [[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    assert found == pytest.approx(-(math.log(0.5) + math.log(0.25) + math.log(2.0**-52)) / 3)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        right = (rng.random(80) < 0.7).astype(int)
        interval = bootstrap(accuracy, np.ones(80), right, level=0.9, resamples=200, seed=seed)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 0.7 <= interval.high
    assert 165 <= covered <= 195


def test_bootstrap_repeats_with_its_seed_and_leaves_undefined_resamples_out() -> None:
    labels, scores = [0, 0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.35]
    first = bootstrap(roc_auc, labels, scores, resamples=300)
    assert first == bootstrap(roc_auc, labels, scores, resamples=300)
    assert first != bootstrap(roc_auc, labels, scores, resamples=300, seed=1)
    assert first.value == pytest.approx(0.6)
    assert 0 < first.resamples < 300
    with pytest.raises(ValueError, match=r"one length: found \[2, 3\]"):
        bootstrap(accuracy, [0, 1], [0, 1, 1])


def test_concordance_of_published_risks_is_the_published_one() -> None:
    folder = Path(__file__).parents[3] / "../shared/data/survival/mcat_results"
    if not folder.is_dir():
        pytest.skip(f"no published risks at {folder}")
    (summary,) = folder.glob("*summary_latest.csv")
    published = {
        int(row["folds"]): float(row["val_cindex"]) for row in csv.DictReader(summary.read_text().splitlines())
    }
    for fold, cindex in published.items():
        (file,) = folder.glob(f"*val_{fold}.pkl")
        cases = list(_unpickled(file).values())
        time, risk = ([float(case[key]) for case in cases] for key in ("survival", "risk"))
        event = [not float(case["censorship"]) for case in cases]
        assert concordance_index(time, event, risk).cindex == pytest.approx(cindex, abs=1e-9)


def _unpickled(file: Path) -> dict[str, Any]:
    class Plain(pickle.Unpickler):
        """Lets numpy's arrays and numbers pass, and nothing else."""

        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("numpy") and name in {"_reconstruct", "ndarray", "dtype", "scalar"}:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name} is no plain number")

    with file.open("rb") as stream:
        loaded: dict[str, Any] = Plain(stream).load()
    return loaded
