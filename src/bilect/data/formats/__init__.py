"""Formats of inputs, by name: one module each, with a ``FORMAT``.

A module of this package is a format: adding one touches no other file. A file's format is told by the end of its name,
in any case, before which may stand how it is packed.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache

from bilect.data.formats.contract import ALL, Format, Slice
from bilect.data.input import Input
from bilect.data.packing import PACKINGS, packing_of

__all__ = ["get", "name_of", "readable", "slices", "stem"]


@cache
def _formats() -> dict[str, Format]:
    stems = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "contract" and not m.name.startswith("_")]
    return {stem: importlib.import_module(f"{__name__}.{stem}").FORMAT for stem in stems}


def get(name: str) -> Format:
    """The format of a name."""
    return _formats()[name]


def name_of(path: str) -> str | None:
    """Name of the format of a file; None for one that is not read."""
    return _told(path)[0]


def stem(name: str) -> str | None:
    """What stands before the end of a name that tells a format; None where none does."""
    form, end = _told(name)
    return name[: len(name) - len(end)] if form else None


def readable() -> str:
    """All ends of names, for messages."""
    plain = [suffix for form in _formats().values() if form.packable for suffix in form.suffixes]
    others = [suffix for form in _formats().values() if not form.packable for suffix in form.suffixes]
    return ", ".join([f"{', '.join(plain)} (each also {', '.join(PACKINGS)})", *others])


def slices(source: Input) -> Iterator[Slice]:
    """The slices of an input in order: one or more, together all of it. What cannot be read, its reader finds."""
    try:
        return iter(get(source.format).slices(source))
    except Exception:  # every format has its own kinds
        return iter([ALL])


def _told(path: str) -> tuple[str | None, str]:
    """Name of the format, and the end of the path that tells it."""
    name, packing = path.lower(), packing_of(path)
    for form_name, form in _formats().items():
        for suffix in form.suffixes:
            end = f"{suffix}{packing if form.packable else ''}"
            if name.endswith(end):
                return form_name, end
    return None, ""
