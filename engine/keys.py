"""`engine VERB --keys`: every key of a recipe with its default and meaning."""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from engine.config import section


def describe_keys(verb: str) -> str:
    """The keys of the verb's recipe, one per paragraph line, for a terminal."""
    from engine.evaluate_recipe import ENCODERS as IMAGE_ENCODERS
    from engine.evaluate_recipe import EvaluateRecipe
    from engine.extract_recipe import ENCODERS, ExtractRecipe
    from engine.recipes import ShardRecipe, TrainRecipe
    from models.config import MODEL_CONFIGS

    recipes: dict[str, tuple[type[BaseModel], str, tuple[str, ...]]] = {
        "shard": (ShardRecipe, "", ()),
        "train": (TrainRecipe, "model", tuple(MODEL_CONFIGS)),
        "extract": (ExtractRecipe, "encoder", tuple(ENCODERS)),
        "evaluate": (EvaluateRecipe, "encoder", IMAGE_ENCODERS),
    }
    recipe, section_name, names = recipes[verb]
    lines = _lines(recipe)
    for name in names:
        lines += ["", f"{section_name}.name={name}:", *_lines(MODEL_CONFIGS[name], f"{section_name}.")]
    return "\n".join(lines)


def _lines(recipe: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in recipe.model_fields.items():
        inner = section(field.annotation)
        if inner is not field.annotation:
            meaning = ": ".join(part for part in (_choices(field.annotation), field.description) if part)
            lines += textwrap.wrap(
                f"{f'{prefix}{name}':<24} {_default(field.default)}  {meaning}", width=118, subsequent_indent=" " * 27
            )
        if inner is not None:
            lines += _lines(inner, f"{prefix}{name}.")
    return lines


def _default(value: Any) -> str:
    """The default as it is typed in a recipe."""
    if value is PydanticUndefined:
        return "(needed)"
    return f"[{value if isinstance(value, str) else json.dumps(value)}]"


def _choices(annotation: Any) -> str:
    return " | ".join(get_args(annotation)) if get_origin(annotation) is Literal else ""
