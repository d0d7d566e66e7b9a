"""Settings from files and plain values, checked; what is wrong with them in one line.

Relative paths are relative to the file they stand in, and those given as plain values or on a command line to the
current directory; a checked config has absolute ones, so that a run directory means the same wherever it is read.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bilect.config.base import apply_overrides, explain_wrong
from bilect.config.data import SourceConfig
from bilect.config.run import Config
from bilect.config.selection import SelectionConfig
from bilect.errors import BilectError

__all__ = ["load_config", "parse_config", "parse_selection", "parse_source"]


def parse_config(values: Mapping[str, Any]) -> Config:
    """A checked config from plain values; their paths are relative to the current directory.

    Raises:
        BilectError: one line that names the first wrong setting.
    """
    try:
        return Config.model_validate(_absolute(values, Path.cwd()))
    except ValidationError as error:
        raise BilectError(explain_wrong(error, Config)) from error


def parse_selection(values: Mapping[str, Any]) -> SelectionConfig:
    """Checked settings of a selection alone; as ``parse_config``."""
    try:
        return SelectionConfig.model_validate(values)
    except ValidationError as error:
        raise BilectError(f"selection: {explain_wrong(error, SelectionConfig)}") from error


def parse_source(values: Mapping[str, Any]) -> SourceConfig:
    """One checked source alone; as ``parse_config``."""
    try:
        return SourceConfig.model_validate(_absolute_source(values, Path.cwd()))
    except ValidationError as error:
        raise BilectError(f"data: {explain_wrong(error, SourceConfig)}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A config from a YAML file and ``key.path=value`` overrides (values are YAML).

    Paths in the file are relative to its folder, those in overrides to the current directory. What may also be the name
    of something else (a model, a tokenizer, a dataset, a task) is a path where there is such a file or folder.

    Raises:
        BilectError: no such file, not YAML, or a wrong setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BilectError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BilectError(f"config: {path}{_not_yaml(path, error)}") from error
    if not isinstance(values, dict):
        raise BilectError(f"config: {path} must hold a mapping of settings, as `bilect init` writes it")
    return parse_config(apply_overrides(_absolute(values, path.parent.absolute()), overrides))


def _not_yaml(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no YAML, and where; or what was probably meant by it."""
    if path.suffix not in (".yaml", ".yml", ""):
        return " is no config (YAML); `bilect init` writes one, and `bilect choose` takes a pool of text"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f" is not valid YAML: {' '.join(str(error).split())}"
    context, begin = getattr(error, "context", None), getattr(error, "context_mark", None)
    inside = f" {context}, which begins in line {begin.line + 1}" if context and begin else ""
    hint = "; indent by spaces" if "\\t" in problem else ""
    return f", line {mark.line + 1}, column {mark.column + 1}: not valid YAML{inside}: {problem}{hint}"


def _absolute(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A copy with absolute paths; whatever has not the form of settings is left for the check that follows."""

    def changed(group: Any, change: Mapping[str, Any]) -> Any:
        if not isinstance(group, Mapping):
            return group
        return {key: change[key](value) if key in change else value for key, value in group.items()}

    def each(change: Any) -> Any:
        return lambda items: [change(i) for i in items] if isinstance(items, list | tuple) else items

    def known(name: Any) -> Any:
        return _there(name, base, ("config.json", "tokenizer.json", "tokenizer_config.json"))

    def task(name: Any) -> Any:
        return _there(name, base, ())

    sources = each(lambda source: _absolute_source(source, base))

    def variant(settings: Any) -> Any:
        spelt = {f"{group}.{key}": change for group in groups for key, change in groups[group].items()}
        return changed(settings, spelt | {group: partial(changed, change=groups[group]) for group in groups})

    def variants(group: Any) -> Any:
        return {name: variant(v) for name, v in group.items()} if isinstance(group, Mapping) else group

    groups: dict[str, dict[str, Any]] = {
        "data": {**dict.fromkeys(("lower_data", "upper_data", "heldout_data"), sources), "tokenizer": known},
        "models": {"proxy": known, "target": known},
        "tasks": {"names": each(task)},
    }
    found = variant(values)
    return dict(changed(found, {"compare": lambda group: changed(group, {"variants": variants})}))


def _absolute_source(source: Any, base: Path) -> Any:
    if not isinstance(source, Mapping):
        return source
    found = dict(source)
    path = found.get("path")
    if isinstance(path, str) and path and "://" not in path and "::" not in path and not path.startswith("~"):
        found["path"] = os.path.join(base, path)
    if "dataset" in found:
        found["dataset"] = _there(found["dataset"], base, ("",))
    return found


def _there(name: Any, base: Path, holding: Sequence[str]) -> Any:
    """The absolute path of a file, or of a folder that holds one of some names; else the name, as on the Hub."""
    if not isinstance(name, str) or not name or name.startswith("~"):
        return name
    path = os.path.normpath(os.path.join(base, name))
    found = os.path.isfile(path) or any(os.path.exists(os.path.join(path, mark)) for mark in holding)
    return path if found else name
