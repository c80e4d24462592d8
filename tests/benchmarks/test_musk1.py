"""The MUSK1 protocol: every bag is tested once, by a model that has not seen it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import musk1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 bags of 1 to 5 instances; a bag is positive where one of them has a large third feature."""
    rng = np.random.default_rng(0)
    lines = []
    for bag in range(40):
        features = rng.normal(size=(1 + bag % 5, 6)) * 100
        if bag % 2:
            features[0, 2] = 900
        lines += [",".join(map(str, [bag % 2, bag, *row])) for row in features]
    file = tmp_path / "bags.csv"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the command runs: steps as small as these only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bags_are_read_whole(data: Path) -> None:
    bags = musk1.read_bags(data)
    assert [len(bag) for bag in bags.instances[:6]] == [1, 2, 3, 4, 5, 1]
    assert bags.labels.tolist() == [0.0, 1.0] * 20
    data.write_text("1,7,0.5\n0,7,0.25\n")
    with pytest.raises(ValueError, match="rows of bag 7 have different labels"):
        musk1.read_bags(data)


def test_folds_test_every_bag_once_and_train_on_the_others() -> None:
    pairs = list(musk1.folds(92, seed=3))
    assert len(pairs) == 10
    assert sorted(np.concatenate([test for _, test in pairs]).tolist()) == list(range(92))
    assert all(sorted([*train, *test]) == list(range(92)) for train, test in pairs)
    assert not np.array_equal(pairs[0][1], next(musk1.folds(92, seed=4))[1])


def test_features_are_standardised_by_the_training_bags_alone(data: Path) -> None:
    bags = musk1.read_bags(data)
    train = np.arange(30)
    found = torch.cat(musk1.standardised(bags, train)[:30])
    assert torch.allclose(found.mean(dim=0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(found.std(dim=0), torch.ones(6), atol=1e-5)
    before = musk1.standardised(bags, train)[0]
    bags.instances[35] += 1e6
    assert torch.equal(musk1.standardised(bags, train)[0], before)


@pytest.mark.usefixtures("one_thread")
def test_the_network_learns_which_bags_hold_the_instance(data: Path) -> None:
    bags = musk1.read_bags(data)
    train, test = np.arange(30), np.arange(30, 40)
    found = musk1.fold_accuracy(bags, train, test, gated=True, epochs=15, seed=0)
    assert found >= 0.8
    assert found == musk1.fold_accuracy(bags, train, test, gated=True, epochs=15, seed=0)


@pytest.mark.slow
def test_the_command_prints_both_models_beside_the_paper(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    musk1.main(["--data", str(data), "--epochs", "1", "--runs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["attention", "gated attention"]
    assert lines[2].endswith("| 0.892 ± 0.040 |")
