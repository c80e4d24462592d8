"""`python -m benchmarks.musk1 --data musk1.csv`: attention MIL on MUSK1 against Ilse et al. 2018 (arXiv 1802.04712).

What is done: 5 runs of 10-fold cross-validation over the 92 bags, accuracy of the bags held out. Network: 256, 128, 64
wide with ReLU and dropout 0.5, attention 64 wide, one logistic output. Adam, learning rate 5e-4, weight decay 5e-3,
100 epochs of one bag per step. The features are standardised by the instances of the training folds alone, and the
weights after the last epoch are used: no bag that is tested had a say in its model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import build_model

RUNS, FOLDS, EPOCHS = 5, 10, 100
PUBLISHED = {"attention": (0.892, 0.040), "gated attention": (0.900, 0.050)}


@dataclass(frozen=True, slots=True)
class Bags:
    """Instances of each bag, float32 [N_i, M], and the bags' labels, float32 [n] of 0 and 1."""

    instances: list[Tensor]
    labels: Tensor


def read_bags(path: Path) -> Bags:
    """Read rows of label, bag, features.

    Raises:
        ValueError: a bag whose rows have different labels.
    """
    table = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
    instances, labels = [], []
    for bag in np.unique(table[:, 1]):
        rows = table[table[:, 1] == bag]
        if len(np.unique(rows[:, 0])) != 1:
            raise ValueError(f"{path}: the rows of bag {bag:g} have different labels; expected label, bag, features")
        instances.append(torch.from_numpy(rows[:, 2:]))
        labels.append(rows[0, 0])
    return Bags(instances, torch.tensor(np.array(labels)))


def standardised(bags: Bags, train: npt.NDArray[np.int64]) -> list[Tensor]:
    """All bags, each feature with mean 0 and standard deviation 1 over the instances of the bags `train`."""
    known = torch.cat([bags.instances[i] for i in train])
    mean, std = known.mean(dim=0), known.std(dim=0)
    return [(bag - mean) / std.where(std > 0, 1.0) for bag in bags.instances]


def folds(count: int, seed: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """FOLDS pairs (train, test) of indices below `count`; every index is tested once."""
    parts = np.array_split(np.random.default_rng(seed).permutation(count), FOLDS)
    for held_out, test in enumerate(parts):
        yield np.concatenate([part for number, part in enumerate(parts) if number != held_out]), test


def fold_accuracy(
    bags: Bags, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64], *, gated: bool, epochs: int, seed: int
) -> float:
    """Train on the bags `train`; the share of the bags `test` that is then classified rightly."""
    torch.manual_seed(seed)
    instances = standardised(bags, train)
    width = instances[0].shape[1]
    model = build_model(
        "abmil", in_dim=width, n_classes=1, gated=gated, embed_dims=(256, 128, 64), attention_dim=64, dropout=0.5
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=5e-3)
    for _ in range(epochs):
        for i in torch.from_numpy(train)[torch.randperm(len(train))].tolist():
            logit = model(instances[i])[0, 0]
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(logit, bags.labels[i]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        found = [float(model(instances[i])[0, 0]) > 0 for i in test]
    return float(np.mean([hit == bool(bags.labels[i]) for hit, i in zip(found, test, strict=True)]))


def run_accuracies(job: tuple[bool, int], *, data: Path, epochs: int) -> list[float]:
    """The accuracy of each fold of one run; `job` is (gated, number of the run)."""
    torch.set_num_threads(1)
    gated, run = job
    bags = read_bags(data)
    return [
        fold_accuracy(bags, train, test, gated=gated, epochs=epochs, seed=run * FOLDS + fold)
        for fold, (train, test) in enumerate(folds(len(bags.instances), run))
    ]


def table(accuracies: dict[str, list[list[float]]]) -> str:
    """Markdown of model -> runs -> accuracies of the folds, beside what was published."""
    lines = [
        "| model | accuracy | std of a fold | standard error | runs | published |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in accuracies.items():
        every = np.array(runs)
        each = " ".join(f"{mean:.3f}" for mean in every.mean(axis=1))
        error = every.std(ddof=1) / np.sqrt(every.size)
        published = "{:.3f} ± {:.3f}".format(*PUBLISHED[name])
        lines.append(f"| {name} | {every.mean():.3f} | {every.std(ddof=1):.3f} | {error:.3f} | {each} | {published} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.musk1", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="musk1.csv: label, bag, 166 features per row")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=RUNS, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; the result does not depend on it")
    options = parser.parse_args(arguments)
    jobs = [(gated, run) for gated in (False, True) for run in range(options.runs)]
    work = partial(run_accuracies, data=options.data, epochs=options.epochs)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(work, jobs))
    names = list(PUBLISHED)
    sys.stdout.write(table({names[0]: results[: options.runs], names[1]: results[options.runs :]}) + "\n")


if __name__ == "__main__":
    main()
