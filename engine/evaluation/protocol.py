"""From samples and folds to a result: probes fitted fold by fold, metrics with intervals, a table of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from engine.console import progress
from engine.evaluation.folds import Fold, leaks, with_validation
from engine.evaluation.intervals import Predicted, measure
from engine.evaluation.probe import Fitted, Probe, fit_and_predict
from engine.evaluation.samples import Samples, some

_WORTH_THREADS = 1 << 24  # numbers in the features


@dataclass(frozen=True, slots=True)
class Intervals:
    """`level` is the share of resamples between low and high."""

    level: float = 0.95
    resamples: int = 1000
    seed: int = 0


def evaluate_folds(
    samples: Samples,
    folds: Sequence[Fold],
    probe: Probe,
    intervals: Intervals,
    *,
    val_fraction: float = 0.2,
    allow_leak: bool = False,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Fit the probe to every fold and measure it on what the fold tests.

    Where the probe has something to choose and a fold has no validation, it is drawn from the training groups. With
    several k of knn each is measured (`by_k`), and the chosen one is the result.

    Returns:
        {classes, n, metrics, folds, interval} and by_k, as JSON holds them, and the predictions: a row per tested
        sample and fold with fold, the samples' columns, group, label, predicted, p_CLASS.

    Raises:
        ValueError: a group on two sides of a fold, unless that is allowed; what the probe refuses.
    """
    complete = [
        with_validation(fold, samples.labels, samples.groups, val_fraction=val_fraction, seed=probe.seed)
        if probe.chooses
        else fold
        for fold in folds
    ]
    leaking = [_leak(samples, fold, allow_leak) for fold in complete]
    fitted: list[Fitted] = []
    all_k = probe.kind == "knn" and len(probe.options) > 1
    # Threads that wait for each other cost small fits more than they give.
    threads = 1 if samples.x.size < _WORTH_THREADS else None
    with progress("fit", len(complete), "folds") as advance, threadpool_limits(threads):
        for fold in complete:
            fitted.append(
                fit_and_predict(probe, samples.x, samples.labels, fold, len(samples.classes), every_option=all_k)
            )
            advance(1, "")

    def measured(probabilities: Sequence[Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        predicted = [
            Predicted(samples.labels[fold.test], found, samples.groups[fold.test])
            for fold, found in zip(complete, probabilities, strict=True)
        ]
        return measure(
            predicted,
            samples.classes,
            level=intervals.level,
            resamples=intervals.resamples,
            seed=intervals.seed,
        )

    metrics, each = measured([found.probabilities for found in fitted])
    result: dict[str, Any] = {
        "classes": samples.classes,
        "n": {
            "samples": len(samples.labels),
            "slides": samples.table["slide_id"].n_unique() if "slide_id" in samples.table.columns else None,
            "groups": len(samples.group_names),
            "features": samples.x.shape[1],
            "of_class": dict(
                zip(
                    samples.classes,
                    np.bincount(samples.labels, minlength=len(samples.classes)).tolist(),
                    strict=True,
                )
            ),
            **{name: len(names) for name, names in samples.missing.items()},
        },
        "metrics": metrics,
        "folds": [
            {
                "name": fold.name,
                "n": {part: len(rows) for part, rows in fold.parts().items()},
                "groups": {part: len(np.unique(samples.groups[rows])) for part, rows in fold.parts().items()},
                "chosen": found.chosen,
                "scale": found.scale,
                "validation_balanced_accuracy": found.validation,
                "converged": found.converged,
                **({"leak": leak} if leak else {}),
                "metrics": values,
            }
            for fold, found, leak, values in zip(complete, fitted, leaking, each, strict=True)
        ],
        "interval": {**asdict(intervals), "method": "percentile bootstrap", "resampled": samples.group_by},
    }
    if all_k:
        result["by_k"] = {
            f"{option:g}": measured([found.by_option[option] for found in fitted])[0] for option in probe.options
        }
    return result, _predictions(samples, complete, fitted)


def _leak(samples: Samples, fold: Fold, allowed: bool) -> dict[str, list[str]]:
    found = {
        sides: [samples.group_names[number] for number in groups]
        for sides, groups in leaks(fold, samples.groups).items()
    }
    if found and not allowed:
        sides, names = next(iter(found.items()))
        raise ValueError(
            f"fold {fold.name}: {some(names)}: the same {samples.group_by} is in {sides} ({len(names)} in all), so the "
            "test would be of what was trained on. Split by it, or say allow_leak=true"
        )
    return found


def _predictions(samples: Samples, folds: Sequence[Fold], fitted: Sequence[Fitted]) -> pl.DataFrame:
    classes = np.array(samples.classes, dtype=object)
    tables = []
    for fold, found in zip(folds, fitted, strict=True):
        rows = fold.test
        own = samples.table[rows]
        taken = {"fold", "group", "label", "predicted"} & set(own.columns)
        tables.append(
            pl.DataFrame({"fold": [fold.name] * len(rows)})
            .hstack(own.drop(taken))
            .with_columns(
                pl.Series("group", [samples.group_names[number] for number in samples.groups[rows]], dtype=pl.String),
                pl.Series("label", classes[samples.labels[rows]].tolist(), dtype=pl.String),
                pl.Series("predicted", classes[found.probabilities.argmax(axis=1)].tolist(), dtype=pl.String),
                *(
                    pl.Series(f"p_{name}", found.probabilities[:, number])
                    for number, name in enumerate(samples.classes)
                ),
            )
        )
    return pl.concat(tables)
