"""How close the penalty's ``d_n = lambda (l_n(w*) - l_n(w_lambda))`` comes to the exact one, everything solved.

    w* minimises g(alpha, .),   w_lambda minimises f + lambda g(alpha, .):   error O(1/lambda)   (BLADE, section 3)

(arXiv 2606.18650). The error is a power series in ``rho / lambda``, ``rho = ||H^-1/2 Hess f H^-1/2||``: where lambda is
well above rho its first term is all that counts, and below it the penalised problem need not be convex around w*.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilect.functional import hypergradient
from bilect.functional.trees import Tree
from bilect.verify.claims import Claim, Reported, cosine, log_slope, relative_error
from bilect.verify.exact import Solved, jacobian, minimise
from bilect.verify.problems import Problem

__all__ = ["MULTIPLES", "Penalised", "check_penalty", "sweep"]

MULTIPLES = (10.0, 30.0, 100.0, 300.0)  # of rho


class Penalised:
    """The penalised problem at one solved lower level; ``rho`` as above."""

    def __init__(self, problem: Problem, solved: Solved) -> None:
        self.problem, self.solved = problem, solved
        self.upper_hessian_PP = jacobian(problem, problem.upper, solved.params, second=True)
        factor_PP = torch.linalg.cholesky(solved.hessian_PP)
        half_PP = torch.linalg.solve_triangular(factor_PP, self.upper_hessian_PP, upper=False)
        relative_PP = torch.linalg.solve_triangular(factor_PP, half_PP.mT, upper=False)
        self.rho = float(torch.linalg.eigvalsh(relative_PP).abs().max())

    def values(self, penalty: float) -> Tensor:
        """``lambda (l_n(w*) - l_n(w_lambda))``, (N,)."""

        def objective(params: Tree) -> Tensor:  # divided by lambda, so that its scale stays
            return self.problem.upper(params) / penalty + self.problem.lower(self.solved.alpha_N, params)

        hessian_PP = self.upper_hessian_PP / penalty + self.solved.hessian_PP
        w = minimise(self.problem, objective, self.solved.params, hessian_PP)
        with torch.no_grad():
            losses = self.problem.losses
            return hypergradient.penalty_values(losses(self.solved.params), losses(w), penalty)


def sweep(problem: Problem, solved: Solved) -> list[dict[str, Any]]:
    """Error against lambda."""
    penalised, rows = Penalised(problem, solved), []
    for multiple in MULTIPLES:
        d_N = penalised.values(multiple * penalised.rho)
        rows.append({"problem": problem.name, "rho": penalised.rho, "penalty": multiple * penalised.rho,
                     "relative_error": relative_error(d_N, solved.d_N), "cosine": cosine(d_N, solved.d_N)})  # fmt: skip
    return rows


def check_penalty(rows: Sequence[dict[str, Any]]) -> list[Claim | Reported]:
    """The rate ``O(1/lambda)``: what would refute the reformulation."""
    name = rows[0]["problem"]
    slope = log_slope([r["penalty"] for r in rows], [r["relative_error"] for r in rows])
    return [
        Claim("penalty", f"{name}: slope of log error against log lambda", slope,
              "-1 in theory; set beforehand", -1.2, -0.8),
        Reported("penalty", f"{name}: rho, which lambda has to exceed by far", rows[0]["rho"]),
    ]  # fmt: skip
