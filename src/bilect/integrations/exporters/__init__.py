"""Ways out of a selection, by name: one module each, with one function ``write(kept, folder)``.

A module of this package is an exporter: adding one touches no other file. ``write`` fills an empty folder with the kept
documents, best first; the folder gets its place when it is complete. A library that only an exporter needs is imported
in its ``write``, through ``extra``.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from bilect.errors import BilectError

if TYPE_CHECKING:
    from bilect.integrations.exporters._kept import Kept

__all__ = ["extra", "get", "names", "summary"]

Write = Callable[["Kept", Path], None]


def names() -> list[str]:
    """All exporters, sorted; none is imported."""
    return sorted(_modules())


def get(name: str) -> Write:
    """The function that writes a format.

    Raises:
        BilectError: there is none of this name.
    """
    write: Write = _module(name).write
    return write


def summary(name: str) -> str:
    """What an exporter writes, in one line."""
    return (_module(name).__doc__ or "").splitlines()[0]


def extra(module: str, package: str) -> ModuleType:
    """A library that not everybody has.

    Raises:
        BilectError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BilectError(f"export: this format needs {package}; pip install {package!r} ({error})") from error


def _module(name: str) -> ModuleType:
    if name not in _modules():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names())}"
        raise BilectError(f"export: there is no format {name!r}; {hint}")
    return importlib.import_module(_modules()[name])


def _modules() -> dict[str, str]:
    stems = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return {stem.rstrip("_").replace("_", "-"): f"{__name__}.{stem}" for stem in stems}
