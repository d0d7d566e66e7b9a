"""What must hold, each with its tolerance and the reason for it; and what is reported without a verdict.

A tolerance comes from theory or from a figure fixed beforehand, never from the outcome. A quantity of which theory says
nothing is ``Reported``.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Claim", "Reported", "cosine", "log_slope", "relative_error"]


@dataclass(frozen=True)
class Claim:
    """``low <= value <= high``; NaN fails, and so does the command.

    Attributes:
        panel: part of the study.
        text: what is claimed, in words.
        value: the figure measured.
        why: where the tolerance comes from.
        low: least value allowed.
        high: greatest value allowed.

    Raises:
        ValueError: there is no bound, so that the claim could not fail.
    """

    panel: str
    text: str
    value: float
    why: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError(f"{self.text}: a claim needs a bound")

    @property
    def passed(self) -> bool:
        """Whether the value lies within its tolerance."""
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def tolerance(self) -> str:
        """In words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at most {self.high:g}" if self.low is None else f"at least {self.low:g}"

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinities: a value that is not finite is None."""
        value = self.value if math.isfinite(self.value) else None
        return {**asdict(self), "value": value, "tolerance": self.tolerance, "passed": self.passed}


@dataclass(frozen=True)
class Reported:
    """A figure without a verdict."""

    panel: str
    text: str
    value: float


def cosine(a_N: Tensor, b_N: Tensor) -> float:
    """``<a, b> / ||a|| ||b||`` without the means, which softmax weights do not see; 0 if either is constant."""
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    size = float(a_N.norm() * b_N.norm())
    return float(a_N @ b_N) / size if size > 0 else 0.0


def relative_error(actual_N: Tensor, exact_N: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((actual_N - exact_N).norm() / exact_N.norm())


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x."""
    points = torch.tensor([x, y], dtype=torch.float64).log()
    points = points - points.mean(1, keepdim=True)
    return float((points[0] @ points[1]) / (points[0] @ points[0]))
