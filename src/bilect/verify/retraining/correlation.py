"""Rank correlations over subsets, with intervals, the chance level and the ceiling that noise sets.

    quality   = Spearman over j of ( sum_{i in S_j} score_i ,  -loss_j )         (the linear datamodelling score)
    ceiling   = sqrt( Spearman over j of ( loss_j , loss'_j ) )                   ' : trained again in another order

Were both losses the same truth plus independent noise, no prediction could correlate with one of them by more than the
root of how they correlate with each other (Spearman 1904, for linear correlation).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

__all__ = ["Estimate", "ceiling", "draws", "estimate", "null", "spearman"]

RESAMPLES, LOW, HIGH = 2000, 2.5, 97.5


@dataclass(frozen=True)
class Estimate:
    """A correlation and its 95% interval; all None where either side is constant."""

    value: float | None
    low: float | None
    high: float | None

    def over(self, ceiling: float | None) -> "Estimate":
        """The same as a share of the ceiling; of none without a ceiling."""
        if not ceiling:
            return Estimate(None, None, None)
        return Estimate(*(None if x is None else x / ceiling for x in (self.value, self.low, self.high)))

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, ties at their mean rank; NaN where either is constant."""
    a, b = (rankdata(x, axis=-1) for x in (a, b))
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def draws(n_subsets: int, seed: int) -> np.ndarray:
    """Subsets of each bootstrap resample, (2000, subsets): the same for all methods."""
    return np.random.default_rng(seed).integers(n_subsets, size=(RESAMPLES, n_subsets))


def estimate(predicted_J: np.ndarray, actual_J: np.ndarray, draws_BJ: np.ndarray) -> Estimate:
    """Spearman with its percentile interval over resampled subsets; the candidates are the same in all of them.

    Args:
        predicted_J: sum of the scores of each subset.
        actual_J: minus its loss.
        draws_BJ: see ``draws``.
    """
    value = float(spearman(predicted_J, actual_J))
    if math.isnan(value):
        return Estimate(None, None, None)
    low, high = np.nanpercentile(spearman(predicted_J[draws_BJ], actual_J[draws_BJ]), [LOW, HIGH])
    return Estimate(value, float(low), float(high))


def null(predicted_KJ: np.ndarray, actual_J: np.ndarray) -> Estimate:
    """What chance gives: mean and central 95% of the correlations of K random scores."""
    values_K = spearman(predicted_KJ, np.broadcast_to(actual_J, predicted_KJ.shape))
    if np.isnan(values_K).any():
        return Estimate(None, None, None)
    return Estimate(float(values_K.mean()), *map(float, np.percentile(values_K, [LOW, HIGH])))


def ceiling(reliability: Estimate) -> float | None:
    """Its root; None where two trainings do not agree at all."""
    return math.sqrt(reliability.value) if reliability.value is not None and reliability.value > 0 else None
