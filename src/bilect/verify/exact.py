"""The exact answer: the lower level solved to float64 precision, and the dense linear system.

dPhi/dalpha_n = -d_n,    d_n = < grad l_n(w*), z >,    H z = grad f(w*),    H = Hess_w g(alpha, w*)
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from bilect.functional.trees import Tree
from bilect.verify.problems import F64, Losses, Problem

__all__ = ["Solved", "flat", "gradient", "jacobian", "minimise", "newton", "resolved_slope", "solve"]

DIFFERENCE = (
    1e-4  # of central differences, relative to alpha; rounding is then of order 1e-12, truncation of order 1e-8
)


def flat(tree: Tree) -> Tensor:
    """A tree as one vector (P,)."""
    return torch.cat([v.detach().reshape(-1) for v in tree.values()])


def gradient(objective: Losses, params: Tree) -> Tree:
    """Gradient of a scalar objective."""
    leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
    return dict(zip(leaves, torch.autograd.grad(objective(leaves), list(leaves.values())), strict=True))


def jacobian(problem: Problem, function: Losses, params: Tree, second: bool = False) -> Tensor:
    """Derivatives of a function by batched backward passes, (outputs, P); of its gradient if ``second``."""
    w_P = flat(params).requires_grad_()
    value = function(problem.tree(w_P))
    if second:
        (value,) = torch.autograd.grad(value, w_P, create_graph=True)
    eye = torch.eye(len(value), dtype=F64)
    rows = [torch.autograd.grad(value, w_P, e, retain_graph=True, is_grads_batched=True)[0] for e in eye.split(64)]
    return torch.cat(rows)


def minimise(problem: Problem, objective: Losses, start: Tree, hessian_PP: Tensor | None = None) -> Tree:
    """A minimum to float64 precision: Newton steps, after L-BFGS where the problem is not convex.

    Args:
        problem: gives the shapes.
        objective: parameters -> scalar.
        start: first parameters.
        hessian_PP: at a point nearby; then every step uses it, and L-BFGS is left out.

    Raises:
        ArithmeticError: the Hessian is not positive definite, or the gradient does not vanish.
    """
    w_P = flat(start)
    fresh = hessian_PP is None and problem.convex
    if hessian_PP is None and not problem.convex:
        w_P = _lbfgs(problem, objective, w_P)
        hessian_PP = jacobian(problem, objective, problem.tree(w_P), second=True)
    size = torch.inf
    for step in range(60):
        params = problem.tree(w_P)
        gradient_P = flat(gradient(objective, params))
        before, size = size, float(gradient_P.norm())
        if size <= 1e-13 or (before < 1e-9 and size > 0.9 * before):  # nothing left but rounding
            return params
        if fresh or step == 0:
            matrix_PP = jacobian(problem, objective, params, second=True) if hessian_PP is None else hessian_PP
            factor_PP, failed = torch.linalg.cholesky_ex(matrix_PP)
            if int(failed):
                raise ArithmeticError(f"{problem.name}: the Hessian at the solution is not positive definite")
        w_P = w_P - torch.cholesky_solve(gradient_P[:, None], factor_PP)[:, 0]
    raise ArithmeticError(f"{problem.name}: the gradient stays at {size:.1e}")


def _lbfgs(problem: Problem, objective: Losses, w_P: Tensor) -> Tensor:
    w_P = w_P.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w_P], max_iter=5000, tolerance_grad=1e-7, tolerance_change=0, history_size=60, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss = objective(problem.tree(w_P))
        (w_P.grad,) = torch.autograd.grad(loss, w_P)
        return loss.detach()

    optimizer.step(closure)
    return w_P.detach()


@dataclass(frozen=True)
class Solved:
    """The lower level solved at one alpha, and everything exact that follows.

    Attributes:
        alpha_N: weights.
        params: w*(alpha).
        hessian_PP: H.
        jacobian_NP: grad l_n(w*).
        upper_gradient_P: grad f(w*).
        z_P: ``H^-1 grad f(w*)``.
        d_N: the exact ``-dPhi/dalpha_n``.
    """

    alpha_N: Tensor
    params: Tree
    hessian_PP: Tensor
    jacobian_NP: Tensor
    upper_gradient_P: Tensor
    z_P: Tensor
    d_N: Tensor

    @cached_property
    def eigenvalues(self) -> tuple[float, float]:
        """``lambda_min(H), lambda_max(H)``."""
        values_P = torch.linalg.eigvalsh(self.hessian_PP)
        return float(values_P[0]), float(values_P[-1])


def solve(problem: Problem, alpha_N: Tensor) -> Solved:
    """Solve the lower level and the dense linear system."""
    lower = partial(problem.lower, alpha_N)
    params = minimise(problem, lower, problem.start)
    hessian_PP = jacobian(problem, lower, params, second=True)
    jacobian_NP = jacobian(problem, problem.losses, params)
    upper_gradient_P = flat(gradient(problem.upper, params))
    z_P = torch.linalg.solve(hessian_PP, upper_gradient_P)
    return Solved(alpha_N, params, hessian_PP, jacobian_NP, upper_gradient_P, z_P, jacobian_NP @ z_P)


def newton(problem: Problem, alpha_SN: Tensor, steps: int = 30) -> Tensor:
    """``w*`` for every row of weights, all at once, (S, P); convex problems only.

    Raises:
        ArithmeticError: some row did not converge.
    """

    def lower(alpha_N: Tensor, w_P: Tensor) -> Tensor:
        return problem.lower(alpha_N, problem.tree(w_P))

    slope = torch.vmap(torch.func.grad(lower, argnums=1))
    curvature = torch.vmap(torch.func.hessian(lower, argnums=1))
    solutions = []
    for part_SN in alpha_SN.split(2048):
        w_SP = flat(problem.start).expand(len(part_SN), -1)
        gradient_SP = slope(part_SN, w_SP)
        for _ in range(steps):
            w_SP = w_SP - torch.linalg.solve(curvature(part_SN, w_SP), gradient_SP)
            gradient_SP = slope(part_SN, w_SP)
            if float(gradient_SP.norm(dim=1).max()) < 1e-12:
                break
        else:
            raise ArithmeticError(f"{problem.name}: Newton's method did not converge on every row of weights")
        solutions.append(w_SP)
    return torch.cat(solutions)


def resolved_slope(problem: Problem, solved: Solved, direction_N: Tensor) -> float:
    """``[Phi(alpha + h v) - Phi(alpha - h v)] / 2h`` with the lower level solved again at both ends."""
    ends = []
    for h in (DIFFERENCE, -DIFFERENCE):
        lower = partial(problem.lower, solved.alpha_N + h * direction_N)
        ends.append(float(problem.upper(minimise(problem, lower, solved.params, solved.hessian_PP))))
    return (ends[0] - ends[1]) / (2 * DIFFERENCE)
