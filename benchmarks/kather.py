"""`python -m benchmarks.kather --data FILE.mat`: probes on the texture features of Kather et al. 2016.

The features are those published with "Multi-class texture analysis in colorectal cancer histology" (Scientific Reports
6, 27988; MIT licence): 43 numbers (set best2) of each of 5000 patches in 8 classes of 625. The authors' protocol is
10-fold cross-validation over patches, and their accuracy of this set by an RBF SVM is 0.858 (`UID_89838_summary.csv`
beside the features). Which patches are of one patient is not known, so folds are by patch here too, balanced by class.

What a probe has to choose (C or k, and in the first three lines the scaling) is chosen on a fifth of the training part
of each fold; then it is fitted to all of it. Scaling is learnt in the training part.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from engine.evaluation.folds import draw_folds
from engine.evaluation.probe import Probe
from engine.evaluation.protocol import Intervals, evaluate_folds
from engine.evaluation.samples import Samples

FOLDS = 10
PUBLISHED = 0.858
PENALTIES = (0.1, 1.0, 10.0)
NEIGHBOURS = (5.0, 10.0, 20.0, 50.0)
PROBES = {
    "linear, scaling chosen": Probe(scale="auto", options=PENALTIES),
    "kNN, Euclidean, scaling chosen": Probe("knn", "auto", NEIGHBOURS, votes="uniform"),
    "kNN, cosine (HIPT's), scaling chosen": Probe("knn", "auto", NEIGHBOURS),
    "linear, standardised": Probe(options=PENALTIES),
    "linear, discriminants": Probe(scale="lda", options=PENALTIES),
    "kNN, discriminants, Euclidean": Probe("knn", "lda", NEIGHBOURS, votes="uniform"),
    "kNN, discriminants, cosine": Probe("knn", "lda", NEIGHBOURS),
    "kNN, standardised, Euclidean": Probe("knn", "standard", NEIGHBOURS, votes="uniform"),
    "kNN, standardised, cosine": Probe("knn", "standard", NEIGHBOURS),
    "kNN, as they are, cosine (HIPT's)": Probe("knn", "none", NEIGHBOURS),
}


def read_features(path: Path) -> Samples:
    """The patches in the order of the file; each is its own group.

    Raises:
        ValueError: another file.
    """
    from scipy.io import loadmat

    content: dict[str, Any] = loadmat(path)
    wanted = {"source_array", "target_array", "TisCatsName"}
    if not wanted <= content.keys():
        raise ValueError(f"{path}: found {', '.join(sorted(content))}; expected {', '.join(sorted(wanted))}")
    truth = content["target_array"]
    if not (truth.sum(axis=0) == 1).all():
        raise ValueError(f"{path}: target_array gives some patches no class, or several")
    classes = [str(name[0]) for name in content["TisCatsName"][0]]
    names = [f"{number:04d}" for number in range(truth.shape[1])]
    return Samples(
        content["source_array"].T.astype(np.float32),
        truth.argmax(axis=0).astype(np.int64),
        classes,
        np.arange(len(names)),
        names,
        pl.DataFrame({"patch": names}),
        "patch",
    )


def accuracies(samples: Samples, probe: Probe, runs: int, *, folds: int = FOLDS) -> list[dict[str, Any]]:
    """For each run the metrics of cross-validation with folds drawn by its number."""
    found = []
    for run in range(runs):
        drawn = draw_folds(samples.labels, samples.groups, folds=folds, test_fraction=0.5, seed=run)
        result, _ = evaluate_folds(samples, drawn, replace(probe, seed=run), Intervals(seed=run))
        found.append({**result["metrics"], "chosen": [(fold["scale"], fold["chosen"]) for fold in result["folds"]]})
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown of probe -> runs -> metrics."""
    lines = [
        "| probe | accuracy | 95 % interval (first run) | std of a fold | runs | balanced accuracy | AUROC | chosen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        mean = {key: np.mean([run[key]["value"] for run in runs]) for key in ("accuracy", "balanced_accuracy", "auroc")}
        first = runs[0]["accuracy"]
        each = " ".join(f"{run['accuracy']['value']:.3f}" for run in runs)
        chosen = ", ".join(
            f"{scale} {option:g}" for scale, option in sorted({one for run in runs for one in run["chosen"]})
        )
        lines.append(
            f"| {name} | {mean['accuracy']:.3f} | {first['low']:.3f} to {first['high']:.3f} | {first['std']:.3f} "
            f"| {each} | {mean['balanced_accuracy']:.3f} | {mean['auroc']:.3f} | {chosen} |"
        )
    return "\n".join([*lines, f"| RBF SVM, as published | {PUBLISHED:.3f} | | | | | | |"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kather", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="best2_numFeatures43_last_output_rand_18053.mat")
    parser.add_argument("--runs", type=int, default=1, help="of 10-fold cross-validation, default: %(default)s")
    options = parser.parse_args(arguments)
    samples = read_features(options.data)
    results = {name: accuracies(samples, probe, options.runs) for name, probe in PROBES.items()}
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
