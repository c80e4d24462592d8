"""`engine evaluate`: how much frozen features know, by a linear probe or by nearest neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import UsageError
from engine.console import say
from engine.evaluation.folds import Fold, draw_folds, folds_of_column, read_folds
from engine.evaluation.probe import Probe
from engine.evaluation.protocol import Intervals, evaluate_folds
from engine.evaluation.samples import Samples, read_samples, some
from engine.figures import as_share
from sharding.atomic import atomic_path

if TYPE_CHECKING:
    import polars as pl

    from engine.evaluate_recipe import EvaluateRecipe

_SHOWN = ("accuracy", "balanced_accuracy", "auroc", "f1", "log_loss")


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Evaluate features; writes `out` and `predictions` where they are given.

    Returns:
        {store or pcam, task, protocol, classes, n, metrics: {name: {value, low, high, ...}}, folds: [{name, n, groups,
        chosen, scale, metrics}], interval, missing, features, recipe, out, predictions}; by_k where several k of knn
        were asked for; differences (from vittm-hmr's protocol) with pcam. `engine.evaluation.intervals` says what is
        what.

    Raises:
        UsageError: files that are there already, or slides that lack something with missing=fail.
        ValueError: what cannot be read, joined, split or fitted, with the slides it is about.
    """
    for path in (recipe.out, recipe.predictions):
        if path is not None and path.exists():
            raise UsageError(f"{path} is there already: give another name, or remove it.")
    samples, folds, facts = _pcam(recipe) if recipe.pcam is not None else _store(recipe)
    result, predictions = evaluate_folds(
        samples,
        folds,
        _probe(recipe),
        Intervals(recipe.level, recipe.resamples, recipe.seed),
        val_fraction=recipe.val_fraction,
        allow_leak=recipe.allow_leak,
    )
    source = "store" if recipe.store is not None else "pcam"
    result = {
        source: str(getattr(recipe, source)),
        "task": recipe.label if recipe.store is not None else "tumour",
        "protocol": recipe.protocol,
        **result,
        "missing": samples.missing,
        **facts,
        "recipe": recipe.model_dump(mode="json"),
        "out": _name(recipe.out),
        "predictions": _name(recipe.predictions),
    }
    if not all(fold["converged"] for fold in result["folds"]):
        say("the logistic regression of some folds did not converge; scale=standard or a smaller c helps")
    if recipe.predictions is not None:
        _write_table(recipe.predictions, predictions)
    if recipe.out is not None:
        recipe.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(recipe.out) as temporary:
            text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
    return result


def _probe(recipe: EvaluateRecipe) -> Probe:
    options: dict[str, tuple[float, ...]] = {"logistic": recipe.c, "knn": tuple(map(float, recipe.k)), "adam": ()}
    return Probe(
        kind=recipe.probe,
        scale=recipe.scale,
        options=options[recipe.probe],
        refit=recipe.refit,
        balanced=recipe.class_weight == "balanced",
        votes=recipe.votes,
        temperature=recipe.temperature,
        seed=recipe.seed,
    )


def _store(recipe: EvaluateRecipe) -> tuple[Samples, list[Fold], dict[str, Any]]:
    from engine.stores import open_store

    assert recipe.store is not None
    store = open_store(recipe.store)
    samples = read_samples(
        store,
        recipe.labels,
        label=recipe.label,
        on=recipe.columns,
        group=recipe.group,
        split=recipe.split,
        array=recipe.array,
        mean=recipe.pool == "mean",
        rows_per_slide=recipe.rows_per_slide,
        seed=recipe.seed,
    )
    if recipe.split is not None:
        folds = folds_of_column(samples.table[recipe.split].to_list(), recipe.split)
    elif recipe.splits is not None:
        folds, unknown = read_folds(recipe.splits, samples.table["slide_id"].to_list())
        samples.missing["listed_without_sample"] = unknown
        listed = np.unique(np.concatenate([rows for fold in folds for rows in fold.parts().values()]))
        rest = np.setdiff1d(np.arange(len(samples.labels)), listed)
        unlisted = samples.table["slide_id"].gather(rest).unique().sort()
        samples.missing["without_split"] = unlisted.to_list()
    else:
        folds = draw_folds(
            samples.labels, samples.groups, folds=recipe.folds, test_fraction=recipe.test_fraction, seed=recipe.seed
        )
    _tell_missing(samples.missing, recipe.missing)
    return samples, folds, {"features": {"digest": store.digest, "array": recipe.array, **store.meta}}


_MISSING = {
    "without_label": "embeddings without a label",
    "without_embedding": "labels without an embedding",
    "listed_without_sample": "slides of the splits without a label or an embedding",
    "without_split": "slides that no split lists",
}


def _tell_missing(missing: dict[str, list[str]], policy: str) -> None:
    told = [f"{len(names)} {_MISSING[kind]}: {some(names)}" for kind, names in missing.items() if names]
    if told and policy == "fail":
        raise UsageError(f"missing=fail: {'; '.join(told)}.")
    for text in told:
        say(f"left out: {text}")


def _pcam(recipe: EvaluateRecipe) -> tuple[Samples, list[Fold], dict[str, Any]]:
    from engine.evaluation.encoder import open_encoder
    from engine.evaluation.pcam import MPP, SIDE_PX, differences, read_pcam
    from engine.extract_recipe import RANDOM
    from engine.extraction.agreement import checkpoint_file, known_of, resolved_config

    assert recipe.pcam is not None
    assert recipe.weights is not None
    name, given = recipe.encoder["name"], {key: value for key, value in recipe.encoder.items() if key != "name"}
    weights = checkpoint_file(str(recipe.weights))
    infos = [] if weights == RANDOM else [known_of(weights)]
    config = resolved_config(name, given, infos, side_px=recipe.resize_px)
    if config.get("img_size", recipe.resize_px) != recipe.resize_px:
        raise UsageError(
            f"the encoder's img_size is {config['img_size']}, and resize_px={recipe.resize_px}: give "
            f"resize_px={config['img_size']}."
        )
    encoder = open_encoder(name, config, Path(weights), mean=recipe.mean, std=recipe.std, seed=recipe.seed)
    counts = {"train": recipe.train_images, "val": recipe.val_images, "test": recipe.test_images}
    samples, fold = read_pcam(recipe.pcam, encoder, counts, resize_px=recipe.resize_px, batch_size=recipe.batch_size)
    found = {
        **{f"{part}_images": len(rows) for part, rows in fold.parts().items()},
        "resize_px": recipe.resize_px,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "probe": recipe.probe,
        "scale": recipe.scale,
    }
    spacing = {"seen_mpp": MPP * SIDE_PX / recipe.resize_px}
    return samples, [fold], {"features": {**encoder.facts, **spacing}, "differences": differences(found)}


def _write_table(path: Path, table: pl.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            table.write_csv(temporary)
        else:
            table.write_parquet(temporary)


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def describe(result: dict[str, Any]) -> str:
    """The result for a person."""
    folds, n, interval = result["folds"], result["n"], result["interval"]
    many = f", mean of {len(folds)} folds" if len(folds) > 1 else ""
    scaled = result["recipe"]["scale"] == "auto"
    each = [[fold["scale"]] * scaled + [f"{fold['chosen']:g}"] * (fold["chosen"] is not None) for fold in folds]
    chosen = ", ".join(dict.fromkeys(" ".join(one) for one in each if one))
    lines = [
        f"{result['protocol']} on {n['samples']} samples of {n['groups']} groups ({interval['resampled']}), "
        f"{len(result['classes'])} classes{many}{f'; chosen: {chosen}' if chosen else ''}",
        *(_line(name, result["metrics"][name], interval["level"]) for name in _SHOWN),
    ]
    lines += [
        f"k={k}: balanced accuracy {_number(metrics['balanced_accuracy']['value'])}, AUROC "
        f"{_number(metrics['auroc']['value'])}"
        for k, metrics in result.get("by_k", {}).items()
    ]
    lines += [f"differs from vittm-hmr: {text}" for text in result.get("differences", [])]
    left_out = [f"{len(names)} {_MISSING[kind]}" for kind, names in result["missing"].items() if names]
    lines += [f"left out: {'; '.join(left_out)}"] if left_out else []
    lines += [f"{sum('leak' in fold for fold in folds)} folds leak"] if any("leak" in fold for fold in folds) else []
    lines += [f"written: {path}" for path in (result["out"], result["predictions"]) if path]
    return "\n".join(lines)


def _line(name: str, entry: dict[str, Any], level: float) -> str:
    text = f"  {name.replace('_', ' '):<18}{_number(entry['value'])}"
    if entry["low"] is not None:
        text += f"  [{entry['low']:.3f}, {entry['high']:.3f}] at {100 * level:g} %"
    if entry.get("std") is not None:
        text += f", std {entry['std']:.3f}"
    left_out = entry.get("left_out", entry["degenerate"] / (entry["degenerate"] + entry["resamples"]))
    if left_out:
        text += f", without the {as_share(left_out)} of resamples where it has no value"
    return text + (f"  ({entry['reason']})" if "reason" in entry else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
