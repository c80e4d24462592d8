"""YAML and `key.path=value` to a frozen recipe, with errors that name the key and the nearest known one.

Order: class default < YAML < command line. A recipe is a file, or the name of a shipped one such as `shard/tiny`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Verbatim:
    """Marks a key whose value is the text as it was typed: a path may look like a number, a date or a list."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value from the command line: its text, and what that means as YAML."""

    text: str
    value: Any


class Recipe(BaseModel):
    """A recipe or a section of one: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        # Python takes True for 1, and YAML takes `yes` and `on` for True.
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if not isinstance(value, bool) or field is None or field.annotation in (bool, Any):
                continue
            if section(field.annotation) is None:
                raise ValueError(f"{name}={value}: expected a number or text, found a truth value")
        return values


def section(annotation: Any) -> type[BaseModel] | None:
    """The class of a key that holds keys, be it optional or not; None for any other key."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


RecipeT = TypeVar("RecipeT", bound=BaseModel)


class UsageError(ValueError):
    """The user's mistake in a command or a recipe: exit code 2. The message is one clear sentence."""


def shipped_recipes(verb: str | None = None) -> list[str]:
    """Names of the recipes that come with the engine, e.g. `shard/tiny`."""
    names = []
    for folder in resources.files("configs").iterdir():
        if folder.is_dir() and (verb is None or folder.name == verb):
            names += [f"{folder.name}/{f.name[:-5]}" for f in folder.iterdir() if f.name.endswith(".yaml")]
    return sorted(names)


def read_recipe(verb: str, source: str) -> dict[str, Any]:
    """The mapping that a recipe file or a shipped recipe holds."""
    if source.endswith((".yaml", ".yml")):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"recipe {source}: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise UsageError(f"recipe {source} is no text file in UTF-8.") from None
    else:
        known = shipped_recipes(verb)
        if source not in known:
            raise UsageError(_no_recipe(verb, source, known))
        text = (resources.files("configs") / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {source} is no valid YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"recipe {source} holds a {type(values).__name__}; expected keys and values.")
    return values


def _no_recipe(verb: str, source: str, known: list[str]) -> str:
    shipped = f"Shipped for `engine {verb}`: {', '.join(known)}; your own is given as a path that ends in .yaml."
    if source in shipped_recipes():
        return f"the recipe {source!r} is one of `engine {source.partition('/')[0]}`. {shipped}"
    word = source if "/" in source else f"{verb}/{source}"
    return f"there is no recipe {source!r}{nearest(word, known)} {shipped}"


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `key.path=value` set to a Setting, whose text is read as YAML (`true`, `[1, 2]`)."""
    result = _copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(key.isidentifier() for key in keys):
            raise UsageError(f"{override!r} is no setting; expected key=value or key.path=value.")
        target = result
        for key in keys[:-1]:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise UsageError(f"{override!r}: {key} is a value, not a group of keys.")
        target[keys[-1]] = Setting(text, _scalar(text))
    return result


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 1e-3 for a string
        except ValueError:
            return value
    return value


def typed(recipe_class: type[BaseModel] | None, values: Any) -> Any:
    """`values` with each Setting replaced by its text where the key is marked Verbatim, by its YAML value elsewhere."""
    fields = recipe_class.model_fields if recipe_class else {}
    result = {}
    for key, value in values.items():
        field = fields.get(key)
        if isinstance(value, Setting):
            verbatim = field is not None and any(isinstance(mark, Verbatim) for mark in field.metadata)
            result[key] = value.text if verbatim else value.value
        elif isinstance(value, dict):
            result[key] = typed(section(field.annotation) if field else None, value)
        else:
            result[key] = value
    return result


def build(recipe_class: type[RecipeT], values: dict[str, Any], *, prefix: str = "") -> RecipeT:
    """Validate `values` into a frozen recipe; UsageError in one sentence where they are wrong."""
    try:
        return recipe_class.model_validate(typed(recipe_class, values))
    except ValidationError as error:
        told: dict[str, list[str]] = {}
        for item in error.errors():
            subject, message = _complaint(recipe_class, item, prefix)
            told.setdefault(subject, []).append(message)
        # A key of several types gets a complaint from each of them.
        sentences = [subject + "; or ".join(dict.fromkeys(messages)) for subject, messages in told.items()]
        raise UsageError(" ".join(text if text.endswith((".", "?")) else f"{text}." for text in sentences)) from None


def _complaint(recipe_class: type[BaseModel], item: Any, prefix: str) -> tuple[str, str]:
    """What is wrong, as (the key with its value, the reason); together they are a sentence."""
    # pydantic adds the name of a union's branch to the location; keys of the recipe are what a user knows.
    keys = [str(part) for part in item["loc"]]
    owner, known_keys = _descend(recipe_class, keys)
    name = prefix + ".".join(known_keys)
    if item["type"] == "extra_forbidden":
        return f"unknown key {name!r}", nearest(known_keys[-1], list(owner.model_fields))
    if item["type"] == "missing":
        return f"the key {name!r} is missing: ", f"give it as {name}=..."
    message = item["msg"].removeprefix("Value error, ").rstrip(".")
    return (f"{name}={item['input']}: " if known_keys else ""), message


def _descend(recipe_class: type[BaseModel], keys: list[str]) -> tuple[type[BaseModel], list[str]]:
    owner, path = recipe_class, []
    for key in keys:
        path.append(key)
        field = owner.model_fields.get(key)
        inner = section(field.annotation) if field else None
        if inner is None:
            break
        owner = inner
    return owner, path


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else `.`."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else (f"; known: {', '.join(sorted(known))}." if known else ".")


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML; given back to the same verb it means the same."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
