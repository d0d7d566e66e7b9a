"""A metric of a downstream task, example by example: its standard error, and how two models differ on the same ones.

Every metric here is f(r) of a ratio r = sum x_i / sum w_i over n examples (w_i = 1 but for metrics per byte or word).
To first order an example moves it by u_i, whence the error of one model, and of the difference of two on the same
examples, in which what makes an example hard for both drops out::

    u_i = |f'(r)| (x_i - r w_i) / sum w
    se^2 = n / (n - 1) sum u_i^2            se(b - a)^2 = n / (n - 1) sum (u_bi - u_ai)^2

That is s / sqrt(n) for a mean. It is in closed form, so that repeating an evaluation repeats it to the last bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, t

from bilect.errors import BilectError

__all__ = ["Examples", "TaskExamples", "paired_difference"]

LEVEL = 0.95


@dataclass(frozen=True)
class Examples:
    """One metric on every example of a task.

    Attributes:
        aggregation: lm-eval's name of f: mean, perplexity, weighted_perplexity or bits_per_byte; of others no error is
            known.
        value: f(r).
        samples: x_i, or pairs (x_i, w_i).
    """

    aggregation: str
    value: float
    samples: Sequence[Any]

    @property
    def effect_N(self) -> np.ndarray | None:
        """u_i; None for other aggregations, and for fewer than two examples."""
        value = self.value
        slopes = {"mean": 1.0, "perplexity": value, "weighted_perplexity": value, "bits_per_byte": 1 / math.log(2)}
        if self.aggregation not in slopes or len(self.samples) < 2:
            return None
        x_N, w_N = self._pair_N2.T
        return slopes[self.aggregation] * (x_N - x_N.sum() / w_N.sum() * w_N) / w_N.sum()

    @property
    def stderr(self) -> float | None:
        """Standard error of the value."""
        effect_N = self.effect_N
        return None if effect_N is None else _norm(effect_N)

    @property
    def hit_N(self) -> np.ndarray | None:
        """Which examples are right, of a share of right ones; None for other metrics."""
        if self.aggregation != "mean" or not self.samples:  # others' samples may be anything
            return None
        x_N, w_N = self._pair_N2.T
        return x_N == 1 if np.isin(x_N, (0, 1)).all() and (w_N == 1).all() else None

    @property
    def _pair_N2(self) -> np.ndarray:
        return np.array([s if isinstance(s, tuple) else (s, 1.0) for s in self.samples], dtype=float).reshape(-1, 2)


@dataclass(frozen=True)
class TaskExamples:
    """A task on one model.

    Attributes:
        n: examples.
        metrics: by name.
    """

    n: int
    metrics: dict[str, Examples]

    def figures(self) -> dict[str, Any]:
        """``{metric: {"value", "stderr"}, ..., "n"}``."""
        return {**{k: {"value": e.value, "stderr": e.stderr} for k, e in self.metrics.items()}, "n": self.n}


def paired_difference(before: Examples, after: Examples) -> dict[str, float | None]:
    """A metric of one model less that of another on the same examples.

    Args:
        before: of the model that is subtracted.
        after: of the other.

    Returns:
        ``difference``; ``low`` and ``high`` of its 95% interval (Student, n - 1 degrees of freedom), None where no
        error is known; and ``p`` of McNemar's exact test, two-sided, where the metric is a share of right answers.

    Raises:
        BilectError: not the same examples.
    """
    if len(before.samples) != len(after.samples):
        raise BilectError(f"tasks: {len(before.samples)} and {len(after.samples)} examples cannot be paired")
    difference = after.value - before.value
    found: dict[str, float | None] = {"difference": difference, "low": None, "high": None, "p": None}
    effects = before.effect_N, after.effect_N
    if effects[0] is not None and effects[1] is not None:
        half = float(t.ppf((1 + LEVEL) / 2, len(before.samples) - 1)) * _norm(effects[1] - effects[0])
        found |= {"low": difference - half, "high": difference + half}
    hits = before.hit_N, after.hit_N
    if hits[0] is not None and hits[1] is not None:
        gained, lost = int((hits[1] & ~hits[0]).sum()), int((hits[0] & ~hits[1]).sum())
        found["p"] = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return found


def _norm(effect_N: np.ndarray) -> float:
    n = len(effect_N)
    return math.sqrt(n / (n - 1) * float((effect_N**2).sum()))
