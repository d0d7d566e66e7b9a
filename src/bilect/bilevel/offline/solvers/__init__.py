"""Solvers of the implicit hypergradient by name: one module each, so that a new one is one new file."""

import difflib
import importlib
import pkgutil

from bilect.bilevel.offline.solvers._solver import Solver, System

__all__ = ["Solver", "System", "get", "names"]


def names() -> list[str]:
    """All solvers, sorted; none is imported."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Solver:
    """A solver.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names())}"
        raise ValueError(f"there is no solver {name!r}; {hint}")
    found = vars(importlib.import_module(f"{__name__}.{name}")).values()
    (kind,) = [c for c in found if isinstance(c, type) and issubclass(c, Solver) and c is not Solver]
    return kind()
