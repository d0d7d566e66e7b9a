"""Settings from files and plain values, checked; what is wrong with them in one line."""

from collections.abc import Mapping, Sequence
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
    """A checked config from plain values.

    Raises:
        BilectError: one line that names the first wrong setting.
    """
    try:
        return Config.model_validate(values)
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
        return SourceConfig.model_validate(values)
    except ValidationError as error:
        raise BilectError(f"data: {explain_wrong(error, SourceConfig)}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A config from a YAML file and ``key.path=value`` overrides (values are YAML).

    Raises:
        BilectError: no such file, not YAML, or a wrong setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BilectError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BilectError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BilectError(f"config: {path} must hold a mapping of settings")
    return parse_config(apply_overrides(values, overrides))
