"""Token methods that ``BladeConfig`` describes."""

from typing import Any, TypeVar

from bilect.config.online import BladeConfig
from bilect.methods.contract import TokenMethod

__all__ = ["SelectorMethod"]

B = TypeVar("B", bound=BladeConfig)


class SelectorMethod(TokenMethod[B]):
    """One of its choices of ``method``."""

    def options(self, learning_rate: float) -> dict[str, Any]:
        """See ``BladeConfig.selector_options``."""
        return self.config.selector_options(learning_rate)
