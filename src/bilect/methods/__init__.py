"""Selection methods by name: one module each, and those that other packages register.

A module of this package is a method: adding one touches no other file. Another package registers a class through an
entry point of the group ``bilect.methods``, whose name is the method's; built-in names come first.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilect.errors import BilectError, reason

if TYPE_CHECKING:
    from bilect.config import Config
    from bilect.methods.contract import DocumentMethod, Inputs, Method

__all__ = ["GROUP", "get", "load", "make", "make_for", "methods_of", "names"]

GROUP = "bilect.methods"


def names() -> list[str]:
    """All methods, sorted; none is imported."""
    return sorted({*_modules(), *_registered()})


def get(name: str) -> "type[Method[Any]]":
    """The class of a method.

    Raises:
        BilectError: there is none of this name, or another package's cannot be used.
    """
    from bilect.methods.contract import Method

    if module := _modules().get(name):
        found = vars(importlib.import_module(module)).values()
        own = [c for c in found if isinstance(c, type) and issubclass(c, Method) and vars(c).get("name") == name]
        if not own:
            raise BilectError(f"methods: {module} has no method of the name {name!r}")
        return own[0]
    if (entry := _registered().get(name)) is None:
        raise BilectError(f"methods: {_unknown(name)}")
    try:
        method = entry.load()
    except Exception as error:  # anything can happen in another package
        raise BilectError(f"methods: cannot import {name!r} from {entry.value} ({reason(error)})") from error
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise BilectError(
            f"methods: {entry.value} is no subclass of bilect.methods.contract.DocumentMethod or TokenMethod"
        )
    return method


def make(name: str, settings: Mapping[str, Any] | None = None) -> "Any":
    """A method with checked settings.

    Args:
        name: of the method.
        settings: plain values; the defaults where missing.

    Raises:
        BilectError: no such method, or one line that names the first wrong setting.
    """
    from pydantic import ValidationError

    from bilect.config.base import explain_wrong

    method = get(name)
    try:
        return method(method.Config.model_validate(dict(settings or {})))
    except ValidationError as error:
        raise BilectError(f"{name}: {explain_wrong(error, method.Config)}") from error


def make_for(config: "Config", name: str, settings: Mapping[str, Any] | None = None) -> "Any":
    """``make`` for a run: what is given here goes before ``methods``, and that before ``fit`` (bilevel methods).

    A bilevel method has the run's ``fit`` but for what its own settings fix.
    """
    from bilect.config import FitConfig

    inherited: dict[str, Any] = {}
    if issubclass(kind := get(name).Config, FitConfig):
        of_fit, own = FitConfig.model_fields, kind.model_fields
        fixed = {k for k in of_fit if own[k].annotation != of_fit[k].annotation}
        inherited = config.fit.model_dump(exclude=fixed, exclude_none=True) | {"score_head": config.models.score_head}
    return make(name, {**inherited, **config.methods.get(name, {}), **(settings or {})})


def methods_of(config: "Config") -> "dict[str, Method[Any]]":
    """The method of every arm of a run, by name: what the run is about first, then its controls.

    Raises:
        BilectError: no such method; one that chooses no documents where documents are to be chosen; wrong settings, or
            settings of another arm.
    """
    from bilect.config import TOKEN_METHODS
    from bilect.methods.contract import DocumentMethod

    for where, arm in (("method", config.method), *(("controls", arm) for arm in config.controls)):
        if arm not in names():
            raise BilectError(f"{where}: {_unknown(arm)}")
    if config.method in config.controls:
        raise BilectError(f"controls: {config.method} is what the run itself is about (method); leave it out")
    if not get(config.method).scores_documents:
        hint = f"; to train with it, set online.method={config.method}" if config.method in TOKEN_METHODS else ""
        raise BilectError(f"method: {config.method} does not choose documents{hint}")
    found: dict[str, Method[Any]] = {}
    for arm in config.arms:
        if arm in TOKEN_METHODS:
            found[arm] = get(arm)(config.online_of(arm))
        elif issubclass(get(arm), DocumentMethod):
            found[arm] = make_for(config, arm)
        else:
            raise BilectError(f"controls: {arm} chooses tokens in a way that a run cannot carry out; the ways that it "
                              f"can are {', '.join(TOKEN_METHODS)}")  # fmt: skip
    if unused := [name for name in config.methods if name not in (*found, *TOKEN_METHODS)]:
        raise BilectError(f"methods: settings of {unused[0]!r}, which is neither the method nor one of the controls")
    return found


def load(folder: Path, inputs: "Inputs") -> "DocumentMethod[Any]":
    """Whatever document method a folder holds; see ``DocumentMethod.load``."""
    from bilect.methods.contract import DocumentMethod, saved_name

    method = get(saved_name(folder))
    assert issubclass(method, DocumentMethod)  # only these save
    return method.load(folder, inputs)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names())}"
    return f"there is no method {name!r}; {hint}"


def _modules() -> dict[str, str]:
    """Module of each built-in method: ``random_`` is "random", ``bliss_penalty`` is "bliss-penalty"."""
    stems = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "contract" and not m.name.startswith("_")]
    return {stem.rstrip("_").replace("_", "-"): f"{__name__}.{stem}" for stem in stems}


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
