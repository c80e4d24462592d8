"""`engine weights`: look into a checkpoint, and convert it to safetensors with all that must be known of it.

A checkpoint seldom says how its pixels were normalised, at what spacing, and by which rule positions are resampled;
here it is written down once, and travels on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.config import UsageError, apply_overrides, build, nearest
from engine.console import say
from models.config import MODEL_CONFIGS
from sharding.atomic import atomic_path

NORMALISATIONS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# Of the published HIPT weights, which state none; any other model has no default.
_HIPT_MPP = 0.5
_SHOWN = 8


def inspect(file: Path) -> dict[str, Any]:
    """What a checkpoint holds.

    Returns {file, bytes, wrapper, model, digest, config, mean, std, mpp, pos_interpolation, entries, parameters,
    dtypes, left_out, weights: [{name, dtype, shape}]}. `model` is the one whose defaults fit, None where none does;
    the digest is that of the weights under its names, without those `left_out`. What is unknown is None.

    Raises UsageError where there is no such file, ValueError where it is no checkpoint.
    """
    from models.weights import fit
    from models.weights_info import WeightsInfo, weights_digest

    found = _read(file)
    name, settings = _recognise(found, file)
    if name is None:
        state, info = found.state, found.info or WeightsInfo(weights_digest(found.state))
    else:
        state, info = fit(_on_meta(name, settings), found, file)
        info = replace(info, model=name)
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "wrapper": found.wrapper,
        **asdict(info),
        "entries": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "dtypes": dict(Counter(str(value.dtype).removeprefix("torch.") for value in state.values())),
        "left_out": len(found.state) - len(state),
        "weights": [
            {"name": key, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for key, value in state.items()
        ],
    }


def convert(
    file: Path,
    out: Path | None = None,
    *,
    model: str | None = None,
    settings: Sequence[str] = (),
    normalisation: str | None = None,
    mpp: float | None = None,
) -> dict[str, Any]:
    """Write the weights of `file` under the model's own names, as safetensors with metadata.

    Args:
        out: the new file; None is `file` with the suffix .safetensors.
        model, settings: a name of `MODEL_CONFIGS` and key=value for its config; None is the model that is recognised.
        normalisation: a key of NORMALISATIONS, or `R,G,B/R,G,B`: mean and standard deviation of RGB in [0, 1].
        mpp: spacing that the model was trained at, in um/px.

    Normalisation and mpp are those the file itself states, else for a HIPT model those of the published weights.

    Returns {file, out, digest, model, config, mean, std, mpp, pos_interpolation, entries, bytes}.
    Raises UsageError for a value that is wrong or missing, or where `out` is there already; ValueError where the file
    is no checkpoint, or not one of that model.
    """
    from safetensors.torch import save_file

    from models.weights import fit

    if mpp is not None and mpp <= 0:
        raise UsageError(f"--mpp {mpp:g}: expected um/px above 0.")
    target = file.with_suffix(".safetensors") if out is None else out.expanduser()
    if target.exists():
        raise UsageError(f"{target} is there already; give another --out.")
    if target.suffix != ".safetensors":
        raise UsageError(f"--out {target}: expected a name that ends in .safetensors.")
    found = _read(file)
    name, config = _choose(found, file, model, settings)
    state, info = fit(_on_meta(name, config), found, file)
    mean, std = (
        (info.mean, info.std) if normalisation is None else parse_normalisation(normalisation, "--normalisation ")
    )
    mpp = info.mpp if mpp is None else mpp
    if mean is None or mpp is None:
        if not name.startswith("hipt_"):
            raise UsageError(
                f"normalisation and spacing that {name} was trained with must be known; give them as --normalisation "
                f"{' | '.join(NORMALISATIONS)} | R,G,B/R,G,B and --mpp 0.5 (um/px)."
            )
        say("what was not given is that of the published HIPT weights: normalisation half (0.5/0.5), 0.5 um/px")
        mean, std = (mean, std) if mean is not None else NORMALISATIONS["half"]
        mpp = _HIPT_MPP if mpp is None else mpp
    rule = config.get("pos_interpolation") or config.get("region", {}).get("pos_interpolation")
    known = replace(info, model=name, config=config, mean=mean, std=std, mpp=mpp, pos_interpolation=rule)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        # A clone each: a checkpoint may hold views of one storage, which safetensors refuses.
        save_file({key: value.clone().contiguous() for key, value in state.items()}, temporary, known.to_metadata())
    return {
        "file": str(file),
        "out": str(target),
        **asdict(known),
        "entries": len(state),
        "bytes": target.stat().st_size,
    }


def _read(file: Path) -> Any:
    from models.weights import read_checkpoint

    try:
        return read_checkpoint(file)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None


def _on_meta(name: str, config: dict[str, Any]) -> Any:
    """The model without values: keys and shapes are all that is asked of it."""
    import torch

    from models import build_model

    with torch.device("meta"):
        return build_model(name, **config)


def _recognise(found: Any, file: Path) -> tuple[str | None, dict[str, Any]]:
    """The model that the file's metadata names, or the first whose defaults have its keys and shapes."""
    from models.weights import fit

    if found.info is not None and found.info.model is not None:
        return found.info.model, found.info.config
    classes = next((len(value) for key, value in found.state.items() if key.endswith("classifier.weight")), 0)
    for name, config in MODEL_CONFIGS.items():
        needed = [key for key, field in config.model_fields.items() if field.is_required()]
        if needed and not (needed == ["n_classes"] and classes):
            continue
        settings: dict[str, Any] = {"n_classes": classes} if needed else {}
        variants = ("small", "tiny", "base") if name == "hipt_patch" else (None,)
        for variant in variants:
            tried = settings if variant is None else {"variant": variant}
            try:
                fit(_on_meta(name, tried), found, file)
            except ValueError:
                continue
            return name, tried
    return None, {}


def _choose(found: Any, file: Path, model: str | None, settings: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Name and whole config of the model that is meant."""
    if model is None:
        recognised, config = _recognise(found, file)
        if recognised is None:
            raise UsageError(
                f"{file} holds {len(found.state)} weights that no model has by default; name it with --model and "
                f"key=value for its settings. Known: {', '.join(MODEL_CONFIGS)}."
            )
        name = recognised
    else:
        if model not in MODEL_CONFIGS:
            raise UsageError(f"--model {model}: there is no such model{nearest(model, list(MODEL_CONFIGS))}")
        name, config = model, {}
    checked = build(MODEL_CONFIGS[name], apply_overrides(config, settings), prefix="")
    return name, checked.model_dump(mode="json")


def parse_normalisation(text: str, key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a name or of R,G,B/R,G,B; UsageError, which says `key`, where it is neither."""
    if text in NORMALISATIONS:
        return NORMALISATIONS[text]
    try:
        numbers = [tuple(float(number) for number in part.split(",")) for part in text.split("/")]
    except ValueError:
        numbers = []
    if [len(part) for part in numbers] != [3, 3] or min(numbers[1]) <= 0:
        raise UsageError(f"{key}{text}: expected {', '.join(NORMALISATIONS)}, or R,G,B/R,G,B with deviations above 0.")
    return numbers[0], numbers[1]


def describe(result: dict[str, Any]) -> str:
    """Either result for a person."""
    if "out" in result:
        return f"{result['out']}: {result['entries']} weights of {result['model']}\n{_facts(result)}"
    lines = [
        f"{result['file']}: {result['entries']} weights, {result['parameters']:,} numbers "
        f"({', '.join(result['dtypes'])}), {result['bytes']:,} bytes",
        f"model          {result['model'] or 'not recognised'}",
        f"wrapped in     {result['wrapper'] or 'nothing'}",
        f"left out       {result['left_out']} of a head or a projection",
        _facts(result),
    ]
    lines += [f"  {one['name']}  {one['dtype']}  {one['shape']}" for one in result["weights"][:_SHOWN]]
    if len(result["weights"]) > _SHOWN:
        lines.append(f"  ... and {len(result['weights']) - _SHOWN} more (--json lists all)")
    return "\n".join(lines)


def _facts(result: dict[str, Any]) -> str:
    mean, std = result["mean"], result["std"]
    pixels = "unknown" if mean is None else f"mean {', '.join(map(str, mean))}; std {', '.join(map(str, std))}"
    facts = {
        "digest": result["digest"],
        "normalisation": pixels,
        "spacing": "unknown" if result["mpp"] is None else f"{result['mpp']:g} um/px",
        "positions": result["pos_interpolation"] or "unknown",
    }
    return "\n".join(f"{name:<15}{value}" for name, value in facts.items())
