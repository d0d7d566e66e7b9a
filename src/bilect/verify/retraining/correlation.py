"""Rank correlations over subsets, with intervals, the chance level and the ceiling that noise sets.

    quality   = Spearman over j of ( sum_{i in S_j} score_i ,  -loss_j ), mean over the seeds of the fit
                                                                                (the linear datamodelling score)
    ceiling   = sqrt( Spearman over j of ( loss_j , loss'_j ) )                   ' : trained again in another order

Were both losses the same truth plus independent noise, no prediction could correlate with one of them by more than the
root of how they correlate with each other (Spearman 1904, for linear correlation).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

__all__ = ["Draws", "Estimate", "ceiling", "draws", "estimate", "null", "resampled", "spearman"]

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


@dataclass(frozen=True)
class Draws:
    """What each bootstrap resample holds, the same for all methods: ``halves_BJ`` and ``seeds_BK`` of the fits."""

    halves_BJ: np.ndarray
    seeds_BK: np.ndarray


def draws(n_subsets: int, n_seeds: int, seed: int) -> Draws:
    """2000 resamples."""
    generator = np.random.default_rng(seed)
    halves_BJ = generator.integers(n_subsets, size=(RESAMPLES, n_subsets))
    return Draws(halves_BJ, generator.integers(n_seeds, size=(RESAMPLES, n_seeds)))


def resampled(predicted_KJ: np.ndarray, actual_J: np.ndarray, draws: Draws) -> np.ndarray:
    """Mean Spearman over the seeds of a method: as found, then in each resample of halves and seeds; (1 + B,).

    Means of K seeds drawn from K vary by (K - 1) / K of what they should, so their part is stretched by the root of it.

    Args:
        predicted_KJ: sum of the scores of each half, from each seed.
        actual_J: minus its loss.
        draws: see there; the documents are the same in all of them.
    """
    found = spearman(predicted_KJ, np.broadcast_to(actual_J, predicted_KJ.shape)).mean()
    each_KB = np.stack([spearman(sums_J[draws.halves_BJ], actual_J[draws.halves_BJ]) for sums_J in predicted_KJ])
    all_B, drawn_B = each_KB.mean(0), np.take_along_axis(each_KB.T, draws.seeds_BK, axis=1).mean(1)
    n_seeds = len(predicted_KJ)
    return np.append(found, all_B + math.sqrt(n_seeds / max(n_seeds - 1, 1)) * (drawn_B - all_B))


def estimate(values_B: np.ndarray) -> Estimate:
    """The first value with the percentile interval of the others: of one method, or of the difference of two."""
    if math.isnan(values_B[0]):
        return Estimate(None, None, None)
    return Estimate(float(values_B[0]), *map(float, np.nanpercentile(values_B[1:], [LOW, HIGH])))


def null(predicted_KJ: np.ndarray, actual_J: np.ndarray) -> Estimate:
    """What chance gives: mean and central 95% of the correlations of K random scores."""
    values_K = spearman(predicted_KJ, np.broadcast_to(actual_J, predicted_KJ.shape))
    if np.isnan(values_K).any():
        return Estimate(None, None, None)
    return Estimate(float(values_K.mean()), *map(float, np.percentile(values_K, [LOW, HIGH])))


def ceiling(reliability: Estimate) -> float | None:
    """Its root; None where two trainings do not agree at all."""
    return math.sqrt(reliability.value) if reliability.value is not None and reliability.value > 0 else None
