"""The sections of the page. A module here is a section: it says its place and builds what it shows from the run.

    ORDER    its place on the page
    build    RunFiles -> Section, or None where the run has nothing of the kind

They are found by name: a new section is a new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from bilect.report.blocks import Section
from bilect.report.inputs import RunFiles

__all__ = ["build_sections"]


def build_sections(run: RunFiles) -> list[Section]:
    """The sections that a run has, in the order of the page."""
    built = (module.build(run) for module in sorted(_modules(), key=lambda module: module.ORDER))
    return [section for section in built if section is not None]


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
