"""One tree of settings: YAML, ``key=value`` overrides, defaults with their unit and source.

An unknown key is an error that names the nearest known one.
"""

from bilect.config.compare import CompareConfig, CurveConfig
from bilect.config.data import DataConfig, SourceConfig
from bilect.config.fit import FitConfig
from bilect.config.load import load_config, parse_config, parse_selection, parse_source
from bilect.config.models import ModelsConfig
from bilect.config.online import BladeConfig
from bilect.config.run import TOKEN_METHODS, Config
from bilect.config.selection import SelectionConfig
from bilect.config.tasks import TasksConfig
from bilect.config.training import TrainConfig, WarmupConfig

__all__ = [
    "TOKEN_METHODS",
    "BladeConfig",
    "CompareConfig",
    "Config",
    "CurveConfig",
    "DataConfig",
    "FitConfig",
    "ModelsConfig",
    "SelectionConfig",
    "SourceConfig",
    "TasksConfig",
    "TrainConfig",
    "WarmupConfig",
    "load_config",
    "parse_config",
    "parse_selection",
    "parse_source",
]
