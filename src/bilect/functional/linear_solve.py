"""Solvers of ``(H + damping I) z = b`` for the implicit hypergradient.

H is the Hessian of the lower objective and b the gradient of the upper one. Each solver sees H only through
``hvp(v) = H v`` and returns the same ``Solution``; ``residual`` is the true relative residual
``||(H + damping I) z - b|| / ||b||`` where the solver knows it (cg: from its recursion), else None
(``relative_residual`` measures it, at the price of one product).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilect.functional.trees import Tree, TreeMap, add_scaled, dot, norm, scale, sub, zeros_like

__all__ = [
    "CG_DAMPING",
    "NORM_PRODUCTS",
    "SGD_STEP_SIZE",
    "Solution",
    "adam",
    "cg",
    "identity",
    "neumann",
    "next_second_moment",
    "relative_residual",
    "second_moment_of",
    "sgd",
    "spectral_norm",
]


SGD_STEP_SIZE = 1e-2  # BLISS, section 3
NORM_PRODUCTS = 5  # Hessian products to measure its norm with, where step size or damping are to follow from it
CG_DAMPING = 0.1  # as a share of that norm: at a model in training there is curvature near zero, and below


@dataclass(frozen=True)
class Solution:
    """``z``, the number of Hessian products spent, the relative residual if known, and a note of a fallback."""

    z: Tree
    products: int
    residual: float | None = None
    note: str = ""


def _damped(hvp: TreeMap, damping: float) -> TreeMap:
    return hvp if damping == 0 else (lambda v: add_scaled(hvp(v), v, damping))


def relative_residual(hvp: TreeMap, b: Tree, z: Tree, damping: float = 0.0) -> float:
    """``||(H + damping I) z - b|| / ||b||``; one Hessian product."""
    size = float(norm(b))
    return float(norm(sub(_damped(hvp, damping)(z), b))) / size if size > 0 else 0.0


def identity(b: Tree) -> Solution:
    """``z = b``: the influence of one plain gradient step; no Hessian product."""
    return Solution(b, 0)


def adam(b: Tree, second_moment: Tree, eps: float = 1e-8) -> Solution:
    """``z = b / (sqrt(v) + eps)``: the local curvature an Adam-trained lower level sees (SAMA, arXiv 2310.05674).

    Args:
        b: gradient of the upper objective.
        second_moment: v, bias-corrected second moments of the lower optimiser, see ``next_second_moment``.
        eps: of the lower optimiser.
    """
    denominator = torch._foreach_sqrt([second_moment[k] for k in b])
    torch._foreach_add_(denominator, eps)
    return Solution(dict(zip(b, torch._foreach_div([*b.values()], denominator), strict=True)), 0)


def next_second_moment(second_moment: Tree, step: float, gradient: Tree, beta: float) -> Tree:
    """``v' = [beta v + (1 - beta) g^2] / (1 - beta^(t+1))``: Adam's second moments as a step on ``g`` would leave them.

    With g = b, ``adam`` is the direction in which Adam would take its next step on f (without momentum), and no entry
    exceeds ``sqrt((1 - beta^(t+1)) / (1 - beta))``. By v alone, entries that no lower gradient has touched yet, such as
    rare tokens of an optimiser a few steps old, are b / eps: they drown all others, and central differences along z.

    Args:
        second_moment: v as the optimiser holds it, not corrected.
        step: t, its steps so far.
        gradient: g.
        beta: its beta2.
    """
    correction = 1 - beta ** (step + 1)
    values = [*gradient.values()]
    moved = torch._foreach_mul([second_moment[k] for k in gradient], beta)
    torch._foreach_addcmul_(moved, values, values, 1 - beta)
    torch._foreach_div_(moved, correction)
    return dict(zip(gradient, moved, strict=True))


def second_moment_of(optimizer: torch.optim.Optimizer, params: Tree, gradient: Tree) -> Tree:
    """``next_second_moment`` of an Adam that has taken a step on all of ``params``."""
    state = {k: optimizer.state[p] for k, p in params.items()}
    v, step = {k: s["exp_avg_sq"] for k, s in state.items()}, float(next(iter(state.values()))["step"])
    return next_second_moment(v, step, gradient, optimizer.defaults["betas"][1])


def neumann(hvp: TreeMap, b: Tree, *, steps: int, step_size: float, damping: float = 0.0) -> Solution:
    """``z = eta sum_{k=0..K} (I - eta (H + damping I))^k b``; converges for ``0 < eta < 2 / lambda_max``.

    Args:
        hvp: Hessian product.
        b: right-hand side.
        steps: K, the number of Hessian products.
        step_size: eta.
        damping: added to the diagonal.
    """
    product = _damped(hvp, damping)
    term, total = b, b
    for _ in range(steps):
        term = add_scaled(term, product(term), -step_size)
        total = add_scaled(total, term)
    # (H + damping) z - b = -(I - eta (H + damping))^(K+1) b: the next term of the series, not known without a product
    return Solution(scale(total, step_size), steps)


def spectral_norm(hvp: TreeMap, v: Tree, *, steps: int = NORM_PRODUCTS) -> float:
    """``||H||``, the greatest ``|eigenvalue|``, by power iteration: ``||H^k v|| / ||H^(k-1) v||`` at k = steps.

    Never above the truth, and no lower after another step (H is symmetric); zero where ``H v`` is.

    Args:
        hvp: Hessian product.
        v: start.
        steps: Hessian products; a handful will do from the gradient of a loss, which lies where curvature is great.
    """
    size = 0.0
    for _ in range(steps):
        v = hvp(scale(v, 1 / norm(v).clamp(min=1e-30)))
        size = float(norm(v))
        if size == 0:
            break
    return size


def cg(hvp: TreeMap, b: Tree, *, steps: int, damping: float = 0.0, tolerance: float = 1e-10) -> Solution:
    """Conjugate gradients from zero, at most ``steps`` products.

    Where a direction of non-positive curvature turns up (``p' A p <= 0``: the Hessian of a neural network is
    indefinite) the current iterate is returned; at the first product that is ``b`` itself, the identity solver.

    Args:
        hvp: Hessian product.
        b: right-hand side.
        steps: greatest number of Hessian products.
        damping: added to the diagonal.
        tolerance: stop once the relative residual is below.
    """
    product = _damped(hvp, damping)
    z, residual, direction = zeros_like(b), b, b
    rr = dot(residual, residual)
    size = left = float(rr.sqrt())
    if size == 0:
        return Solution(z, 0, 0.0)
    for k in range(steps):
        image = product(direction)
        curvature = dot(direction, image)
        alpha = rr / curvature
        residual_next = add_scaled(residual, image, -alpha)
        rr_next = dot(residual_next, residual_next)
        bent, left_next = torch.stack([curvature, rr_next.sqrt()]).tolist()  # both at once: a GPU is waited for
        if bent <= 0:
            if k == 0:
                return Solution(b, 1, float(norm(sub(image, b))) / size, "negative curvature: identity")
            return Solution(z, k + 1, left / size, f"negative curvature after {k} steps")
        z = add_scaled(z, direction, alpha)
        if left_next <= tolerance * size:
            return Solution(z, k + 1, left_next / size)
        direction = add_scaled(residual_next, direction, rr_next / rr)
        residual, rr, left = residual_next, rr_next, left_next
    return Solution(z, steps, left / size)


def sgd(
    hvp: TreeMap,
    b: Tree,
    *,
    steps: int = 3,
    step_size: float = SGD_STEP_SIZE,
    clip: float | None = 1.0,
    damping: float = 0.0,
    start: Tree | None = None,
) -> Solution:
    """Gradient descent on ``1/2 z'(H + damping I)z - b'z``, as published: few steps, each tensor's gradient clipped.

    ``z <- z - step_size * clip((H + damping I) z - b)``; the start is ``1 / numel`` in every entry (numel of the
    whole tree) unless given. BLISS, arXiv 2510.06048, section 3; kept because the paper uses it, not for its accuracy.

    Args:
        hvp: Hessian product.
        b: right-hand side.
        steps: number of steps, one Hessian product each.
        step_size: of each step.
        clip: greatest norm of each tensor of the gradient, or None.
        damping: added to the diagonal.
        start: first z.
    """
    product = _damped(hvp, damping)
    numel = sum(v.numel() for v in b.values())
    z = {k: torch.full_like(v, 1.0 / numel) for k, v in b.items()} if start is None else start
    for _ in range(steps):
        gradient = sub(product(z), b)
        if clip is not None:
            gradient = {k: _clip(v, clip) for k, v in gradient.items()}
        z = add_scaled(z, gradient, -step_size)
    return Solution(z, steps)


def _clip(x: Tensor, limit: float) -> Tensor:
    return x * torch.clamp(limit / x.norm().clamp(min=torch.finfo(x.dtype).tiny), max=1.0)
