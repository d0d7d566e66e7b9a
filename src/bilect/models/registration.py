"""Make the score model known to the transformers auto classes without importing transformers.

Importing transformers takes seconds; ``bilect --help`` must not pay for it. So the registration waits until somebody
imports the auto classes, and happens at once if they are imported already.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["register_with_transformers"]

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_SCORE_MODEL = "bilect.models.score_model"


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        importlib.import_module(_SCORE_MODEL)


class _AfterAutoClasses(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register the score model now or as soon as the auto classes are imported."""
    if _AUTO_CLASSES in sys.modules:
        importlib.import_module(_SCORE_MODEL)
    elif not any(isinstance(finder, _AfterAutoClasses) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoClasses())
