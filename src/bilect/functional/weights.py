"""From scores to weights and selections: softmax and naive weights, exact top-k, Gumbel top-k."""

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Weighting",
    "document_weights",
    "effective_sample_size",
    "gumbel_topk",
    "robust_standardise",
    "standardise",
    "topk_mask",
    "weight_entropy",
]

Weighting = Literal["softmax", "naive"]


def document_weights(score_M: Tensor, weighting: Weighting = "softmax") -> Tensor:
    """Weights of the documents of a global batch; non-negative, summing to 1.

    * softmax: ``P_i = exp(s_i) / sum_j exp(s_j)`` (BLISS, section 3)
    * naive:   ``P_i = s_i / sum_j s_j``, which needs positive scores (a sigmoid head)

    Args:
        score_M: scores of *all* documents of the global batch, over all ranks.
        weighting: see above.
    """
    if weighting == "softmax":
        return torch.softmax(score_M, dim=0)
    return score_M / score_M.sum()


def weight_entropy(weight_M: Tensor) -> Tensor:
    """``-sum_i P_i log P_i`` in nats; log M for uniform weights."""
    entropy: Tensor = -torch.special.xlogy(weight_M, weight_M).sum()
    return entropy


def effective_sample_size(weight_M: Tensor) -> Tensor:
    """``(sum_i P_i)^2 / sum_i P_i^2`` in documents; M for uniform weights, 1 for a single document."""
    return weight_M.sum() ** 2 / (weight_M**2).sum()


def standardise(value_M: Tensor) -> Tensor:
    """``(x - mean) / deviation`` over the global batch; zeros where all values are equal."""
    centred = value_M - value_M.mean()
    centred = centred - centred.mean()  # again: the first mean is rounded, and equal values must give zeros
    deviation = centred.square().mean().sqrt()
    floor = torch.finfo(value_M.dtype).eps * value_M.abs().max().clamp(min=torch.finfo(value_M.dtype).tiny)
    # written so that a NaN stays one: a diverged solve must show
    return torch.where(deviation <= floor, torch.zeros_like(centred), centred / deviation.clamp(min=floor))


def robust_standardise(value_M: Tensor, limit: float = 4.0) -> Tensor:
    """``(x - median) / (1.4826 median |x - median|)``, cut at ``+-limit``: labels whose tails do not rule a regression.

    For normal values the denominator is the deviation. Where more than half of the values are equal it would be zero;
    the deviation takes its place.
    """
    centred = value_M - value_M.median()
    spread = 1.4826 * centred.abs().median()
    scaled = torch.where(spread == 0, standardise(value_M), centred / spread)
    return scaled.clamp(-limit, limit)


def topk_mask(value_N: Tensor, k: int) -> Tensor:
    """Boolean mask of exactly ``k`` largest values; ties go to the lower index; NaN is never chosen first.

    Raises:
        ValueError: ``k`` is negative or larger than N.
    """
    if not 0 <= k <= value_N.numel():
        raise ValueError(f"k must lie in [0, {value_N.numel()}], got {k}")
    sortable_N = torch.nan_to_num(value_N, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = torch.argsort(sortable_N, descending=True, stable=True)
    mask = torch.zeros_like(value_N, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


def gumbel_topk(value_N: Tensor, k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Mask of a sample of ``k`` items without replacement, ``P(first = i) ~ exp(value_i / temperature)``.

    Adds ``temperature * Gumbel(0, 1)`` noise and takes the top k; temperature 0 is the plain top-k.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    uniform = torch.rand(value_N.shape, generator=generator, dtype=torch.float64, device=value_N.device)
    noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    return topk_mask(value_N.double() + temperature * noise, k)
