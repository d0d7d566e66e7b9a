"""Frank-Wolfe on the capped simplex: from excess losses to a selection.

    A = { alpha in [0, 1]^N : sum_n alpha_n = k }

The penalised problem (BLADE, arXiv 2606.18650, section 3) is

    min over alpha in A, w of   L_val(w) + lambda * [ sum_n alpha_n l_n(w) - min over u of sum_n alpha_n l_n(u) ]

so that ``dL/dalpha_n = lambda (l_n(w) - l_n(u)) = -lambda Delta_n``. A linear form is smallest over A at a vertex: ones
at the k smallest entries of the gradient, the k **largest** excess losses Delta. With step size 1 the iterate is that
vertex.
"""

import math

import torch
from torch import Tensor

from bilect.functional.weights import topk_mask

__all__ = ["alpha_gradient", "duality_gap", "frank_wolfe_step", "kept_count", "linear_minimiser", "step_size"]


def alpha_gradient(model_loss_N: Tensor, reference_loss_N: Tensor, penalty: float = 1.0) -> Tensor:
    """``dL/dalpha_n = lambda (l_n(w) - l_n(u))``: negative where more weight lowers the penalised objective.

    By the envelope theorem neither w nor u is differentiated: both are minimisers.

    Args:
        model_loss_N: losses under u.
        reference_loss_N: losses under w.
        penalty: lambda.
    """
    return penalty * (reference_loss_N - model_loss_N)


def kept_count(n: int, keep_ratio: float) -> int:
    """``k = ceil(keep_ratio n)``, free of the rounding of the product (0.7 * 10 is 7, not 8).

    Raises:
        ValueError: ``keep_ratio`` is not in (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")
    return min(math.ceil(keep_ratio * n * (1 - 1e-12)), n)


def linear_minimiser(gradient_N: Tensor, k: int) -> Tensor:
    """A vertex of A that minimises ``<gradient, alpha>``: ones (N,) at the k smallest entries; ties to the lower index.

    Raises:
        ValueError: ``k`` is negative or larger than N.
    """
    return topk_mask(-gradient_N, k).to(gradient_N.dtype)


def duality_gap(gradient_N: Tensor, alpha_N: Tensor) -> Tensor:
    """``max over s in A of <gradient, alpha - s>``, a scalar: never negative, zero at a stationary point.

    For a convex objective it is no less than the distance from the minimum. k is the sum of alpha.

    Args:
        gradient_N: of the objective at alpha.
        alpha_N: a point of A with an integral sum.
    """
    vertex_N = linear_minimiser(gradient_N, round(float(alpha_N.sum())))
    return torch.dot(gradient_N, alpha_N - vertex_N)


def step_size(t: int, memoryless: bool = False) -> float:
    """``2 / (t + 2)`` at step t = 0, 1, ..., which converges at rate O(1/t); 1 for the memoryless variant."""
    return 1.0 if memoryless else 2.0 / (t + 2)


def frank_wolfe_step(alpha_N: Tensor, gradient_N: Tensor, step: float) -> Tensor:
    """``alpha + step (s - alpha)`` with s the vertex of ``linear_minimiser``; stays in A.

    Args:
        alpha_N: a point of A with an integral sum.
        gradient_N: of the objective at alpha.
        step: in [0, 1], see ``step_size``.
    """
    vertex_N = linear_minimiser(gradient_N, round(float(alpha_N.sum())))
    return torch.lerp(alpha_N, vertex_N, step)
