"""Where work runs, by name: one module each, with one function ``start(workers, folder)``.

A module of this package is an engine: adding one touches no other file. A library that only an engine needs is imported
where it is used.
"""

import difflib
import importlib
import pkgutil
from pathlib import Path

from bilect.engines._ranks import Led, Together
from bilect.engines.contract import Engine, Here
from bilect.errors import BilectError

__all__ = ["Engine", "Here", "Led", "Together", "names", "open_engine"]


def names() -> list[str]:
    """All engines, sorted; none is imported."""
    stems = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted(stem for stem in stems if stem != "contract" and not stem.startswith("_"))


def open_engine(name: str = "local", workers: int | None = None, folder: Path | None = None) -> Engine:
    """An engine; nothing is started before it has work.

    Args:
        name: of the engine.
        workers: processes; None is the engine's own default.
        folder: where results go, which all workers must reach; it may be made later.

    Raises:
        BilectError: there is none of this name, or what it needs is not installed.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names())}"
        raise BilectError(f"engine: there is no engine {name!r}; {hint}")
    engine: Engine = importlib.import_module(f"{__name__}.{name}").start(workers, folder)
    return engine
