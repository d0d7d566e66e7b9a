"""Means over seeds with their uncertainty, differences between arms of the same seed, and speed-ups along a curve."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import t

__all__ = ["estimate", "reached", "speedup"]


def estimate(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard error and 95% interval of one value per seed.

    se = s / sqrt(n), interval = mean -+ t(0.975; n - 1) se (Student), s with n - 1 degrees of freedom. For differences
    between two arms, give one difference per seed: seeds share the warm start, so that the pairing removes its spread.

    Args:
        values: one per seed; None where there is none, which then is not counted.

    Returns:
        ``mean``, ``se``, ``low``, ``high`` (None where n is too small), ``n``, and the ``values`` as given.
    """
    there = [v for v in values if v is not None and math.isfinite(v)]
    n = len(there)
    result: dict[str, Any] = {"mean": None, "se": None, "low": None, "high": None, "n": n, "values": list(values)}
    if n:
        result["mean"] = mean = float(np.mean(there))
    if n > 1:
        result["se"] = se = float(np.std(there, ddof=1) / math.sqrt(n))
        half = float(t.ppf(0.975, n - 1)) * se
        result |= {"low": mean - half, "high": mean + half}
    return result


def reached(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve of (x, loss) first comes down to ``level``, by linear interpolation.

    None where it does not, or starts there already: then the level says nothing of the training.
    """
    for (x0, above), (x1, below) in pairwise(curve):
        if above <= level:
            return None
        if below <= level:
            return x0 + (x1 - x0) * (above - level) / (above - below)
    return None


def speedup(curve: Sequence[tuple[float, float]], control: Sequence[tuple[float, float]]) -> float | None:
    """How many times less an arm spends than the control to come down to the control's final loss.

        speedup = x at which the control first is there / x at which the arm first is there

    so that the control against itself has 1, also where it has gained nothing in the end.

    Args:
        curve: (spent, loss) of the arm, from the warm model on.
        control: of the control, in the same unit.

    Returns:
        The ratio; None where ``reached`` has none for either.
    """
    level = control[-1][1]
    own, its = reached(curve, level), reached(control, level)
    return None if own is None or its is None else its / own
