"""kNN over embeddings: the published numbers, and a slow formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.evaluation import knn
from engine.evaluation.knn import knn_classify
from engine.evaluation.metrics import accuracy, roc_auc


@pytest.mark.parametrize("k", [5, 20])
def test_accuracy_and_auc_match_the_published_code(published: Any, k: int) -> None:
    rng = published.formulas("fill_hipt").rng
    centres = rng("knncentbin").standard_normal((2, 16))
    train_y, test_y = np.arange(90) % 2, np.arange(37) % 2
    train_x = 0.35 * centres[train_y] + rng("knntrbin").standard_normal((90, 16))
    test_x = 0.35 * centres[test_y] + rng("knntebin").standard_normal((37, 16))
    found = knn_classify(train_x.astype(np.float32), train_y, test_x.astype(np.float32), k, 0.07, 2)
    expected = published.arrays("metrics")[f"knn.bin.k{k}.acc_auc"]
    assert 100 * accuracy(test_y, found.argmax(axis=1)) == pytest.approx(expected[0], abs=1e-4)
    assert roc_auc(test_y, found) == pytest.approx(expected[1], abs=1e-4)


def slow(train_x: np.ndarray, train_y: np.ndarray, query: np.ndarray, k: int, temperature: float) -> list[float]:
    cosines = [float(x @ query) / (math.hypot(*x) * math.hypot(*query)) for x in train_x]
    nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
    votes = [0.0, 0.0, 0.0, 0.0]
    for i in nearest:
        votes[train_y[i]] += math.exp(cosines[i] / temperature)
    return [vote / sum(votes) for vote in votes]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (50, 1.0)])
@pytest.mark.parametrize("chunk_bytes", [1 << 28, 600])
def test_probabilities_are_the_weighted_votes_of_the_nearest(
    k: int, temperature: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    train_x, train_y, test_x = rng.normal(size=(50, 6)), rng.integers(3, size=50), 5 * rng.normal(size=(11, 6))
    found = knn_classify(train_x, train_y, test_x, k, temperature, 4)
    assert found == pytest.approx(np.array([slow(train_x, train_y, x, k, temperature) for x in test_x]), abs=1e-5)


def test_a_low_temperature_overflows_nothing() -> None:
    found = knn_classify(np.eye(3), [0, 1, 2], np.eye(3), 3, 1e-3, 3)
    assert found == pytest.approx(np.eye(3))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 4}, r"k must lie in \[1, 3\].*found 4"),
        ({"k": 0}, "found 0"),
        ({"train_y": [0, 1, 2]}, r"classes must lie in \[0, 1\]: found 0 to 2"),
        ({"train_y": [0, 1]}, r"found \(3, 2\), \(2,\), \(1, 2\)"),
        ({"test_x": [[1.0, 0.0, 0.0]]}, r"must fit: found"),
        ({"test_x": [1.0, 0.0]}, r"test_x must be a matrix.*found shape \(2,\)"),
        ({"train_x": [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]}, "train_x has 1 rows that are zero.*row 1"),
        ({"test_x": [[math.nan, 0.0]]}, "test_x has 1 rows that are zero or not finite"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    fitting: dict[str, Any] = {"train_x": [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], "train_y": [0, 1, 1]}
    fitting |= {"test_x": [[1.0, 1.0]], "k": 2, "temperature": 0.07, "n_classes": 2}
    knn_classify(**fitting)
    with pytest.raises(ValueError, match=sentence):
        knn_classify(**{**fitting, **change})
