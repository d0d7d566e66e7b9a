"""What filters of other tools need of a chooser."""

from typing import Protocol

import numpy as np

from bilect.errors import BilectError

__all__ = ["Chooser", "least_score"]


class Chooser(Protocol):
    """See ``bilect.Chooser``."""

    cut: float | None

    def score(self, texts: list[str]) -> np.ndarray:
        """Scores of some texts."""


def least_score(chooser: Chooser, cut: float | None) -> float:
    """``cut`` itself, or else the least score that the run kept.

    Raises:
        BilectError: there is neither.
    """
    least = chooser.cut if cut is None else cut
    if least is None:
        raise BilectError("cut: the run has kept nothing yet that would tell the least score; give it")
    return least
