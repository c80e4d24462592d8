"""`engine VERB --keys`: every key of a recipe with its default and meaning."""

from __future__ import annotations

import textwrap

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def describe_keys(verb: str) -> str:
    """The keys of the verb's recipe, one per paragraph line, for a terminal."""
    from engine.recipes import ShardRecipe, TrainRecipe
    from models.config import MODEL_CONFIGS

    if verb == "shard":
        return "\n".join(_lines(ShardRecipe))
    lines = _lines(TrainRecipe)
    for name, config in MODEL_CONFIGS.items():
        lines += ["", f"model.name={name}:", *_lines(config, "model.")]
    return "\n".join(lines)


def _lines(recipe: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += _lines(inner, f"{prefix}{name}.")
            continue
        default = "(needed)" if field.default is PydanticUndefined else f"[{field.default}]"
        lines += textwrap.wrap(
            f"{f'{prefix}{name}':<24} {default}  {field.description or ''}", width=118, subsequent_indent=" " * 27
        )
    return lines
