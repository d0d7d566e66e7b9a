"""How close each solver's ``d_n = < grad l_n, z >`` comes to the exact one, at the solution of the lower level.

Here H and the gradients of single items are at hand densely, so a product costs nothing and every k and damping can be
tried; what a solver would cost on a real model is counted in Hessian products. Solvers are the project's own
(``functional.linear_solve``), with BLISS's settings for sgd (arXiv 2510.06048, section 3).
"""

import math
from typing import Any

import torch
from torch import Tensor

from bilect.functional import linear_solve
from bilect.functional.directional import directional_jvp, hvp_exact
from bilect.functional.linear_solve import Solution, relative_residual
from bilect.functional.trees import TreeMap
from bilect.verify.claims import Claim, Reported, cosine, relative_error
from bilect.verify.exact import DIFFERENCE, Solved, flat, resolved_slope
from bilect.verify.problems import F64, Problem

__all__ = ["adam_second_moment", "check_oracle", "check_solvers", "sweep"]

DAMPINGS = (0.0, 0.01, 0.1, 1.0)
STEPS = (1, 2, 3, 5, 10, 20, 50, 100)
LOWER_BATCH = 16  # documents of a lower batch: how noisy the gradients are that Adam's second moment remembers
ROUNDING = 1e-10  # float64 has 1e-16, and no sum here has more than 1e5 terms
RESOLVED = 1e-6  # bounds smaller than this are too near to the solvers' own stopping rule (1e-10) to compare with


def adam_second_moment(solved: Solved, batch: int = LOWER_BATCH) -> Tensor:
    """AdamW's second moment at w*, (P,): ``E[g_b^2] = Var_alpha(grad l_n) / b``, as ``E[g_b] = 0`` there."""
    mean_P = solved.alpha_N @ solved.jacobian_NP / solved.alpha_N.sum()
    return solved.alpha_N @ (solved.jacobian_NP - mean_P).square() / solved.alpha_N.sum() / batch


def sweep(problem: Problem, solved: Solved) -> list[dict[str, Any]]:
    """One row per solver, k and damping.

    Returns:
        Per row, of d: ``cosine`` and ``relative_error``; of z: the true ``residual`` of the undamped system and the
        ``error`` ``||z - z*||_H / ||z*||_H``; and the ``products`` spent.
    """
    b, hvp = problem.tree(solved.upper_gradient_P), _dense_product(problem, solved)

    def energy(v_P: Tensor) -> float:
        return float(v_P @ (solved.hessian_PP @ v_P)) ** 0.5

    def row(solver: str, solution: Solution, k: int, damping: float = 0.0) -> dict[str, Any]:
        z_P = flat(solution.z)
        d_N = solved.jacobian_NP @ z_P
        return {
            "problem": problem.name, "solver": solver, "k": k, "damping": damping, "products": solution.products,
            "cosine": cosine(d_N, solved.d_N), "relative_error": relative_error(d_N, solved.d_N),
            "residual": relative_residual(hvp, b, solution.z),
            "error": energy(z_P - solved.z_P) / energy(solved.z_P), "note": solution.note,
        }  # fmt: skip

    rows = [
        row("identity", linear_solve.identity(b), 0),
        row("adam", linear_solve.adam(b, problem.tree(adam_second_moment(solved))), 0),
        row("sgd, published", linear_solve.sgd(hvp, b), 3),
    ]
    for damping in DAMPINGS:
        for k in STEPS:
            rows.append(row("cg", linear_solve.cg(hvp, b, steps=k, damping=damping), k, damping))
    size = linear_solve.spectral_norm(hvp, b)
    for k in STEPS:
        damped = linear_solve.cg(hvp, b, steps=k, damping=linear_solve.CG_DAMPING * size)
        rows.append(row("cg, as in the fit", damped, k))
        best = linear_solve.neumann(hvp, b, steps=k, step_size=1 / solved.eigenvalues[1])
        rows.append(row("neumann", best, k))
        rows.append(row("neumann, as in the fit", linear_solve.neumann(hvp, b, steps=k, step_size=1 / size), k))
    return rows


def _dense_product(problem: Problem, solved: Solved) -> TreeMap:
    return lambda v: problem.tree(solved.hessian_PP @ flat(v))


def check_oracle(problem: Problem, solved: Solved) -> list[Claim]:
    """The yardstick itself: the dense solve against re-solving, and the project's products against dense ones."""
    generator, b = torch.Generator().manual_seed(0), problem.tree(solved.upper_gradient_P)
    norm = linear_solve.spectral_norm(_dense_product(problem, solved), b)
    direction_N = torch.randn(problem.n_items, generator=generator, dtype=F64) * solved.alpha_N
    slope, exact = resolved_slope(problem, solved, direction_N), -float(solved.d_N @ direction_N)
    z = problem.tree(torch.randn(problem.n_params, generator=generator, dtype=F64))
    product = hvp_exact(lambda p: problem.lower(solved.alpha_N, p), solved.params)(z)
    d_N = directional_jvp(problem.losses, solved.params, z)
    return [
        Claim("oracle", f"{problem.name}: dense d against differences of the re-solved lower level, relative error",
              abs(slope - exact) / abs(exact), "the step h itself, where central differences err by h^2",
              high=DIFFERENCE),
        Claim("oracle", f"{problem.name}: Hessian product against the dense Hessian, relative error",
              relative_error(flat(product), solved.hessian_PP @ flat(z)), "rounding", high=ROUNDING),
        Claim("oracle", f"{problem.name}: directional derivatives against the dense Jacobian, relative error",
              relative_error(d_N, solved.jacobian_NP @ flat(z)), "rounding", high=ROUNDING),
        Claim("oracle", f"{problem.name}: the Hessian's norm as the fit measures it, over lambda_max",
              norm / solved.eigenvalues[1], "never above by construction; neumann's step must be below 2 / lambda_max",
              low=0.5, high=1 + ROUNDING),
    ]  # fmt: skip


def check_solvers(rows: list[dict[str, Any]], solved: Solved, convex: bool) -> list[Claim | Reported]:
    """Claims on one problem's rows: the convergence that theory promises of cg and neumann, at every k."""
    name = rows[0]["problem"]
    condition = solved.eigenvalues[1] / solved.eigenvalues[0]
    root = math.sqrt(condition)

    def own(solver: str) -> list[dict[str, Any]]:
        return [r for r in rows if r["solver"] == solver and not r["damping"]]

    def worst(solver: str, bounds: dict[int, float]) -> float:
        return max(r["error"] / bounds[r["k"]] for r in own(solver) if bounds[r["k"]] > RESOLVED)

    cg = {k: 2 * ((root - 1) / (root + 1)) ** k for k in STEPS}
    neumann = {k: (1 - 1 / condition) ** (k + 1) for k in STEPS}
    found: list[Claim | Reported] = [
        Claim("implicit", f"{name}: cg, error of z over its bound, greatest over k", worst("cg", cg),
              "2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k in the norm of H, c the condition number", high=1 + RESOLVED),
        Claim("implicit", f"{name}: neumann, error of z over its bound, greatest over k", worst("neumann", neumann),
              "(1 - 1/c)^(k+1) with steps of 1 / lambda_max", high=1 + RESOLVED),
    ]  # fmt: skip
    last = own("cg")[-1]["cosine"]
    text = f"{name}: cg with {STEPS[-1]} products, cosine with the exact d"
    if convex:
        found.append(Claim("implicit", text, last, "set beforehand; at most P products solve it in theory", low=0.999))
    else:
        found.append(Reported("implicit", text, last))
    for solver in ("identity", "adam", "sgd, published"):
        found.append(Reported("implicit", f"{name}: {solver}, cosine with the exact d", own(solver)[0]["cosine"]))
    text = f"{name}: sgd as published, true relative residual"
    return [*found, Reported("implicit", text, own("sgd, published")[0]["residual"])]
