"""What every group of settings is made of; overrides put in, and what is wrong with settings in one line."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bilect.errors import BilectError

__all__ = [
    "Fraction",
    "NonNegative",
    "Positive",
    "PositiveFloat",
    "Settings",
    "apply_overrides",
    "explain_wrong",
    "parse_overrides",
    "put",
]

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """A group of settings: immutable, checked, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _known_keys(model: type[BaseModel], at: Sequence[Any]) -> list[str]:
    for key in at:
        field = model.model_fields.get(str(key))
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


def explain_wrong(error: ValidationError, root: type[BaseModel]) -> str:
    """The first wrong setting in one line; for an unknown one, the nearest known."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a typo explains the rest
    where = ".".join(str(p) for p in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        moved: dict[str, str] = getattr(root, "moved", {})
        if len(first["loc"]) == 1 and name in moved:
            return f"{where!r} has moved; set {moved[name]} instead"
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message}{shown}"


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` with ``key.path=value`` settings put in.

    Raises:
        BilectError: an override without ``=``, or through something that is no mapping.
    """
    for key, value in parse_overrides(overrides).items():
        put(values, key, value, f"--set {key}")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``key.path=value`` settings by their keys; values are YAML.

    Raises:
        BilectError: an override without ``=``, or whose value is not YAML.
    """
    found = {}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise BilectError(f"--set {override}: expected key=value")
        try:
            found[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BilectError(f"--set {override}: the value is not valid YAML") from error
    return found


def put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set ``key.path`` in nested settings.

    Raises:
        BilectError: the path leads through something that is no mapping; ``where`` it was given.
    """
    node = values
    *path, last = key.split(".")
    for part in path:
        inner = node.setdefault(part, {})
        if not isinstance(inner, dict):
            raise BilectError(f"{where}: {part!r} is not a group of settings")
        node = inner
    node[last] = value
