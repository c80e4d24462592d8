"""Losses of slides and patients against slow, plain formulas and the published numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.objectives.classify import balanced_class_weights, classification_loss, smooth_svm_losses
from models.objectives.ordinal import coral_loss, cumulative_bits, ordinal_bce_loss, predict_ordinal
from models.objectives.regression import predict_class, regression_loss
from models.objectives.survival import (
    bin_of,
    discretize_times,
    hazards,
    nll_survival_loss,
    risk,
    survival,
    time_bin_edges,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(row: Tensor) -> list[float]:
    powers = [math.exp(x) for x in row.tolist()]
    return [power / sum(powers) for power in powers]


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(8, 4)


LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])

# Survival ------------------------------------------------------------------------------------------------------------


def slow_nll(logits: Tensor, bins: Tensor, censored: Tensor, alpha: float) -> float:
    total = 0.0
    for row, y, c in zip(logits.tolist(), bins.tolist(), censored.tolist(), strict=True):
        h = [sigmoid(x) for x in row]
        s = [1.0]
        for hazard in h:
            s.append(s[-1] * (1 - hazard))
        u = -(1 - c) * (math.log(max(s[y], 1e-7)) + math.log(max(h[y], 1e-7)))
        k = -c * math.log(max(s[y + 1], 1e-7))
        total += (1 - alpha) * (u + k) + alpha * u
    return total / len(logits)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_survival_loss_is_the_likelihood_written_out(logits: Tensor, alpha: float, scale: float) -> None:
    censored = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = nll_survival_loss(scale * logits, LABELS, censored, alpha)
    assert found.item() == pytest.approx(slow_nll(scale * logits, LABELS, censored, alpha), rel=1e-5)
    assert nll_survival_loss(scale * logits, LABELS, censored.bool(), alpha).item() == found.item()
    assert nll_survival_loss(scale * logits, LABELS[:, None].int(), censored[:, None], alpha).item() == found.item()


def test_survival_of_unequal_numbers_of_patients_is_refused(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="equally many patients: found 8, 7 and 8"):
        nll_survival_loss(logits, LABELS[1:], LABELS > 1)


def test_survival_matches_the_published_code(published: Any) -> None:
    expected = published.arrays("hipt_slide")
    logits = torch.from_numpy(published.formulas("fill_hipt").normal("survlogits", (8, 4)))
    bins, censored = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    losses = [nll_survival_loss(logits, bins, censored, alpha).item() for alpha in (0.0, 0.15, 0.4, 1.0)]
    assert losses == pytest.approx(expected["surv.loss_alphas_0_0.15_0.4_1"].tolist(), abs=1e-6)
    for found, name in ((hazards, "hazards"), (survival, "survival"), (risk, "risk")):
        assert np.abs(found(logits).numpy() - expected[f"surv.{name}"]).max() < 1e-6


def test_certain_hazards_keep_the_loss_and_its_gradient_finite() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = nll_survival_loss(logits, torch.tensor([1, 0]), torch.tensor([0, 1]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_an_earlier_expected_event_is_a_higher_risk() -> None:
    early, late = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[-3.0, 0.0, 3.0]])
    assert risk(early) > risk(late)


def test_bins_match_the_published_code(published: Any) -> None:
    formulas = published.formulas("fill_hipt")
    time = np.round(formulas.rng("evtime").uniform(1, 60, 30))
    censored = formulas.rng("cens").uniform(size=30) > 0.6
    expected = published.arrays("metrics")["survbin.disc_label"]
    assert discretize_times(time, censored, 4).tolist() == expected.tolist()


def test_bins_are_quantiles_of_events_that_hold_every_time() -> None:
    time = [1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 0.5]
    censored = [0, 0, 0, 0, 0, 1, 1]
    edges = time_bin_edges(time, censored, 2)
    assert edges.tolist() == pytest.approx([0.5 - 1e-6, 3.0, 100 + 1e-6], abs=1e-9)
    assert discretize_times(time, censored, 2).tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert bin_of([-3.0, 2.999, 3.0, 1e9], edges).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("time", "censored", "sentence"),
    [
        ([1.0, math.nan], [0, 0], "finite number: found 1 others"),
        ([1.0, 2.0], [1, 1], "every case is censored"),
        ([1.0, 1.0, 2.0], [0, 0, 0], "3 events at 2 different times make no 4 bins"),
    ],
)
def test_times_that_make_no_bins_are_refused(time: Any, censored: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        discretize_times(time, censored, 4)


# Classification ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)])
def test_cross_entropy_with_weights_smoothing_and_focus(
    logits: Tensor, gamma: float, smoothing: float, weights: Tensor | None
) -> None:
    labels = torch.tensor([0, 1, 2, 3, 3, 1, 1, 0])
    w = [1.0] * 4 if weights is None else weights.tolist()
    total = share = 0.0
    for row, y in zip(logits, labels.tolist(), strict=True):
        p = softmax(row)
        target = [smoothing / 4 + (1 - smoothing) * (c == y) for c in range(4)]
        total += (1 - p[y]) ** gamma * -sum(w[c] * target[c] * math.log(p[c]) for c in range(4))
        share += w[y]
    found = classification_loss(logits, labels, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma)
    assert found.item() == pytest.approx(total / share, rel=1e-5)


def test_balanced_weights_give_each_class_the_same_total() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    weights = balanced_class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([6 / 9, 6 / 3, 6 / 6])
    with pytest.raises(ValueError, match=r"found counts \[3, 1, 2, 0\]"):
        balanced_class_weights(labels, 4)
    with pytest.raises(ValueError, match=r"found counts \[3, 1, 2\]"):
        balanced_class_weights(labels, 2)


@pytest.mark.parametrize(("margin", "temperature"), [(1.0, 1.0), (2.0, 0.5)])
def test_smooth_svm_is_a_soft_margin(logits: Tensor, margin: float, temperature: float) -> None:
    found = smooth_svm_losses(logits, LABELS, margin=margin, temperature=temperature)
    for loss, row, y in zip(found.tolist(), logits.tolist(), LABELS.tolist(), strict=True):
        powers = [math.exp((row[j] - row[y] + margin * (j != y)) / temperature) for j in range(4)]
        assert loss == pytest.approx(temperature * math.log(sum(powers)), rel=1e-5)
    hinge = smooth_svm_losses(logits, LABELS, temperature=1e-3)
    hard = [
        max(row[j] - row[y] + (j != y) for j in range(4))
        for row, y in zip(logits.tolist(), LABELS.tolist(), strict=True)
    ]
    assert hinge.tolist() == pytest.approx(hard, abs=3e-3)


# Ordinal and regression ----------------------------------------------------------------------------------------------


def test_a_label_is_the_number_of_thresholds_below_it() -> None:
    assert cumulative_bits(torch.tensor([0, 1, 3]), 3).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_ordinal_losses_are_sums_over_the_thresholds(logits: Tensor) -> None:
    total = 0.0
    for row, label in zip(logits[:, :3].tolist(), LABELS.tolist(), strict=True):
        total -= sum(math.log(sigmoid(x) if label > k else 1 - sigmoid(x)) for k, x in enumerate(row))
    assert ordinal_bce_loss(logits[:, :3], LABELS).item() == pytest.approx(total / 24, rel=1e-5)
    assert coral_loss(logits[:, :3], LABELS).item() == pytest.approx(total / 8, rel=1e-5)


def test_ordinal_matches_the_published_code(published: Any) -> None:
    logits = torch.from_numpy(published.formulas("fill_hipt").normal("ordlogits", (6, 3)))
    found = ordinal_bce_loss(logits, torch.tensor([0, 1, 2, 3, 1, 3]))
    assert found.item() == pytest.approx(published.arrays("hipt_slide")["ord.bce"].item(), abs=1e-6)


def test_ordinal_prediction_counts_leading_thresholds_only() -> None:
    logits = torch.tensor([[-1.0, 2.0, 2.0], [1.0, -1.0, 2.0], [1.0, 1.0, 1.0]])
    assert predict_ordinal(logits).tolist() == [0, 1, 3]


def test_regression_is_the_squared_error_and_rounds_into_the_classes() -> None:
    assert regression_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([0, 2])).item() == pytest.approx(2.5)
    found = predict_class(torch.tensor([[-2.0], [0.4], [1.6], [9.0]]), 4)
    assert found.tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(logits: Tensor, dtype: torch.dtype) -> None:
    rough = logits.to(dtype)
    losses = [
        classification_loss(rough, LABELS),
        smooth_svm_losses(rough, LABELS).mean(),
        ordinal_bce_loss(rough[:, :3], LABELS),
        coral_loss(rough[:, :3], LABELS),
        regression_loss(rough[:, 0], LABELS),
        nll_survival_loss(rough, LABELS, LABELS > 1),
    ]
    assert {loss.dtype for loss in losses} == {torch.float32}
