from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.weighted import WEIGHTED_VERSION, WeightedStream, class_shares


@st.composite
def weighted(draw: st.DrawFn) -> tuple[WeightedStream, np.ndarray, np.ndarray]:
    """A stream, the class of each of its rows (in no order), and the shares."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    shares = np.array(draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes))), np.int64)
    shares[draw(st.integers(0, len(sizes) - 1))] += 1
    classes = np.random.default_rng(sum(sizes)).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.uint32)
    return WeightedStream(classes, shares, draw(st.integers(0, 2**64 - 1))), classes, shares


@settings(deadline=None, max_examples=500)
@given(case=weighted(), first_round=st.integers(0, 10**12), rounds=st.integers(1, 6))
def test_each_round_holds_each_class_by_its_share(
    case: tuple[WeightedStream, np.ndarray, np.ndarray], first_round: int, rounds: int
) -> None:
    stream, classes, shares = case
    length = int(shares.sum())
    rows = stream.rows(first_round * length, rounds * length)
    assert rows.dtype == np.int64
    for chunk in classes[rows].reshape(rounds, length):
        assert np.array_equal(np.bincount(chunk, minlength=len(shares)), shares)


@settings(deadline=None, max_examples=300)
@given(case=weighted())
def test_no_member_comes_twice_before_all_others_of_its_class(
    case: tuple[WeightedStream, np.ndarray, np.ndarray],
) -> None:
    stream, classes, shares = case
    sizes = np.bincount(classes)
    wanted = int(np.argmax(shares))
    # After as many rounds as the class has members, `share` whole passes are over.
    rows = stream.rows(0, int(shares.sum() * sizes[wanted]))
    counts = np.bincount(rows, minlength=len(classes))
    assert set(counts[classes == wanted]) == {shares[wanted]}
    for number, share in enumerate(shares):
        turns = share * int(sizes[wanted])
        # The turns of a round are out of order, so whole rounds are compared: at most one pass is unfinished.
        assert counts[classes == number].min() >= turns // sizes[number]
        assert counts[classes == number].max() <= -(-turns // sizes[number])


@settings(deadline=None, max_examples=300)
@given(case=weighted(), first=st.integers(0, 10**12), count=st.integers(0, 300), cut=st.floats(0, 1))
def test_any_portion_equals_its_parts(
    case: tuple[WeightedStream, np.ndarray, np.ndarray], first: int, count: int, cut: float
) -> None:
    stream = case[0]
    rows, part = stream.rows(first, count), int(cut * count)
    assert np.array_equal(rows, np.concatenate([stream.rows(first, part), stream.rows(first + part, count - part)]))


def test_passes_rounds_and_seeds_differ() -> None:
    classes = np.repeat([0, 1], [500, 500])
    stream = WeightedStream(classes, np.array([1, 1]), 1)
    first, second = stream.rows(0, 1000), stream.rows(1000, 1000)
    assert (first == second).mean() < 0.02
    assert (first == WeightedStream(classes, np.array([1, 1]), 2).rows(0, 1000)).mean() < 0.02
    assert 0.4 < (classes[first[::2]] == 0).mean() < 0.6  # which class opens a round is drawn as well
    # Members of two classes of one size come in unrelated orders.
    orders = [first[classes[first] == number] - 500 * number for number in (0, 1)]
    assert (orders[0] == orders[1]).mean() < 0.02


def test_shares_are_the_ratio_of_the_weights() -> None:
    assert class_shares(["a", "b", "c"], None).tolist() == [1, 1, 1]
    assert class_shares(["a", "b", "c"], {"c": 0, "a": 4, "b": 6.0}).tolist() == [2, 3, 0]
    shares = class_shares(["a", "b", "c", "d"], {"a": 0.7, "b": 0.2999, "c": 0.0001, "d": 0.0})
    assert np.allclose(shares / shares.sum(), [0.7, 0.2999, 0.0001, 0], atol=2e-5)
    assert shares[3] == 0
    assert class_shares(["a", "b"], {"a": 1.0, "b": 1e-9 + 1e-12})[1] == 1  # rare is not never


def test_wrong_weights_are_refused_by_name() -> None:
    wrong: dict[str, dict[str, float]] = {
        "did you mean 'tumour'": {"tumor": 1, "tumour": 1, "stroma": 1},
        "no weight for 'stroma'": {"tumour": 1},
        "weight of 'stroma' is -1": {"tumour": 1, "stroma": -1},
        "weight of 'stroma' is nan": {"tumour": 1, "stroma": float("nan")},
        "all weights are 0": {"tumour": 0, "stroma": 0},
    }
    for match, weights in wrong.items():
        with pytest.raises(ValueError, match=match):
            class_shares(["tumour", "stroma"], weights)
    for shares in ([1], [1, -1], [0, 0], [1, 1, 1]):
        with pytest.raises(ValueError, match="shares"):
            WeightedStream(np.array([0, 0, 1]), np.array(shares), 1)
    with pytest.raises(ValueError, match="positions"):
        WeightedStream(np.array([0]), np.array([1]), 1).rows(-1, 1)


def test_the_order_of_this_version_never_changes() -> None:
    # A change here is a new WEIGHTED_VERSION: checkpoints of the old one would go on with other samples.
    assert WEIGHTED_VERSION == "weighted-1"
    stream = WeightedStream(np.repeat([0, 1, 2], [50, 7, 3]), np.array([1, 2, 1]), 42, by="class")
    assert stream.rows(998, 8).tolist() == [53, 51, 55, 17, 52, 58, 35, 59]
    assert stream.rows(10**12, 4).tolist() == [54, 1, 58, 55]
    assert stream.order == {
        "version": "weighted-1",
        "by": "class",
        "weights": None,
        "classes": "a1dec344bc8e980d60a7598557a3eb6d",
    }
