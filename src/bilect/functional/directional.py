"""Directional derivatives of document losses, and Hessian products, without per-document gradients.

For document losses ``l_i(theta)`` and a direction z,

    d_i = < grad l_i(theta), z >

is all the hypergradient needs (methods: forward mode, central differences, and in ``ghost.py`` one backward pass).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bilect.functional.trees import Tree, TreeMap, add_scaled, norm, scale, sub

__all__ = [
    "central_step",
    "directional_finite_difference",
    "directional_jvp",
    "hvp_exact",
    "hvp_finite_difference",
    "hvp_forward_difference",
]


def central_step(params: Tree, z: Tree, relative: float | None = None) -> Tensor:
    """Step eps of a central difference: ``eps ||z|| = relative * max(||theta||, 1)``, a scalar in float64.

    ``relative`` defaults to 1e-4 in float32 and 1e-6 in float64, where rounding and truncation balance for language
    models (docs/results_log.md). 0 for ``z = 0``, NaN where z is not finite: a diverged z must show. It stays on the
    device, where as a float it would make the host wait for a GPU, twice for each Hessian product.
    """
    if relative is None:
        relative = 1e-6 if next(iter(params.values())).dtype == torch.float64 else 1e-4
    with torch.no_grad():
        length, size = norm(z).double(), norm(params).double()
        eps = relative * size.clamp(min=1.0) / length.where(length.isfinite(), torch.nan)
        return eps.where(length != 0, 0.0)


def _inverse(step: Tensor) -> Tensor:
    """``1 / step``, and 0 for a step of 0, whose differences are 0."""
    return torch.where(step == 0, 0.0, 1 / step)


def directional_jvp(losses: Callable[[Tree], Tensor], params: Tree, z: Tree) -> Tensor:
    """``d_B`` exactly, by forward-mode differentiation: one pass that carries values and tangents.

    Args:
        losses: maps parameters to document losses (B,); must use kernels that have forward-mode derivatives.
        params: theta.
        z: direction.
    """
    d_B: Tensor = torch.func.jvp(losses, (params,), (z,))[1]
    return d_B


def directional_finite_difference(
    losses: Callable[[Tree], Tensor], params: Tree, z: Tree, relative: float | None = None
) -> Tensor:
    """``d_i = [l_i(theta + eps z) - l_i(theta - eps z)] / 2 eps``: two forward passes, any attention kernel.

    Error O(eps^2) from truncation and O(precision / eps) from rounding.
    """
    eps = central_step(params, z, relative)
    with torch.no_grad():
        return (losses(add_scaled(params, z, eps)) - losses(add_scaled(params, z, -eps))) * _inverse(2 * eps)


def hvp_exact(loss: Callable[[Tree], Tensor], params: Tree) -> TreeMap:
    """``v -> H v`` by forward-over-reverse differentiation of a scalar loss; needs twice-differentiable kernels."""
    gradient = torch.func.grad(loss)

    def product(v: Tree) -> Tree:
        image: Tree = torch.func.jvp(gradient, (params,), (v,))[1]
        return image

    return product


def hvp_finite_difference(gradient: TreeMap, params: Tree, relative: float | None = None) -> TreeMap:
    """``v -> [grad g(theta + eps v) - grad g(theta - eps v)] / 2 eps``: two gradients, any kernel."""

    def product(v: Tree) -> Tree:
        eps = central_step(params, v, relative)
        difference = sub(gradient(add_scaled(params, v, eps)), gradient(add_scaled(params, v, -eps)))
        return scale(difference, _inverse(2 * eps))

    return product


def hvp_forward_difference(gradient: TreeMap, params: Tree, relative: float | None = None) -> TreeMap:
    """``v -> [grad g(theta + eps v) - grad g(theta)] / eps``: one gradient per product, and one for all of them.

    Error O(eps) from truncation: at the default step in float32 about 1e-2 of ``H v``, where central differences have
    1e-5 to 1e-2 depending on v. Good for the few products of a rough solve.
    """
    base: list[Tree] = []

    def product(v: Tree) -> Tree:
        eps = central_step(params, v, relative)
        if not base:
            base.append(gradient(params))
        return scale(sub(gradient(add_scaled(params, v, eps)), base[0]), _inverse(eps))

    return product
