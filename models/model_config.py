"""What every model config shares: it is frozen, and an unknown setting is an error. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


def nearest(word: str, known: list[str]) -> str:
    """Half a sentence for an error message: the known word closest to `word`, and all the known ones."""
    close = get_close_matches(word, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known))}"


class ModelConfig(BaseModel):
    """A frozen model config; an unknown setting is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_class: ClassVar[str]  # "module:Class"; Class(config) is the model

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_settings(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    known = list(cls.model_fields)
                    raise ValueError(f"{cls.__name__} has no setting {key!r}; {nearest(str(key), known)}")
        return values
