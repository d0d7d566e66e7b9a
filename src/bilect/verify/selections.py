"""Which k of N items? Every subset retrained, against what the estimators and Frank-Wolfe choose.

    min over S, |S| = k, of  Phi(1_S / k)        relaxed:  alpha in A = { [0,1]^N, sum = k },  weights alpha / k

Step 1 is the memoryless choice of BLADE (arXiv 2606.18650, section 3); 2/(t+2) the classical one, for which error and
least duality gap are O(1/T) where Phi is convex in alpha (Jaggi 2013, theorems 1 and 2). Of the problems here that is
known of the weighted mean only; a convex lower level is not enough.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, combinations
from typing import Any

import torch
from torch import Tensor

from bilect.functional.frank_wolfe import duality_gap, frank_wolfe_step, linear_minimiser, step_size
from bilect.verify.claims import Claim, Reported, log_slope
from bilect.verify.exact import Solved, newton, solve
from bilect.verify.penalty import Penalised
from bilect.verify.problems import F64, Problem

__all__ = ["all_subsets", "check_selections", "frank_wolfe", "retrained_upper_losses", "study"]

Estimate = Callable[[Solved], Tensor]


def all_subsets(n: int, k: int) -> Tensor:
    """Every subset of k out of n items as a row of zeros and ones, (C(n, k), n)."""
    chosen = torch.tensor(list(combinations(range(n), k)))
    return torch.zeros(len(chosen), n, dtype=F64).scatter_(1, chosen, 1.0)


def retrained_upper_losses(problem: Problem, w_SP: Tensor) -> Tensor:
    """``f`` of each row of parameters, (S,)."""
    return torch.vmap(lambda w_P: problem.upper(problem.tree(w_P)))(w_SP)


def frank_wolfe(problem: Problem, estimate: Estimate, k: int, iterations: int, memoryless: bool) -> dict[str, Any]:
    """Phi, gap and vertices along the way from the uniform alpha.

    Args:
        problem: whose Phi.
        estimate: the lower level solved at alpha / k -> d_N, the negative gradient in the weights.
        k: items to choose.
        iterations: number of them.
        memoryless: step 1 instead of ``2 / (t + 2)``.

    Returns:
        ``phi`` and ``gap`` per iterate (the gap with the exact gradient), the last ``alpha_N``, all ``vertices_VN``.
    """
    alpha_N = torch.full((problem.n_items,), k / problem.n_items, dtype=F64)
    phi, gaps, vertices = [], [], []
    for t in range(iterations + 1):
        solved = solve(problem, alpha_N / k)
        gradient_N = -estimate(solved) / k
        phi.append(float(problem.upper(solved.params)))
        gaps.append(float(duality_gap(-solved.d_N / k, alpha_N)))
        if t < iterations:
            vertices.append(linear_minimiser(gradient_N, k))
            alpha_N = frank_wolfe_step(alpha_N, gradient_N, step_size(t, memoryless))
    return {"phi": phi, "gap": gaps, "alpha_N": alpha_N, "vertices_VN": torch.stack(vertices)}


def study(problem: Problem, k: int, iterations: int) -> dict[str, Any]:
    """Everything at once for one problem.

    Returns:
        ``rows``: per way of choosing, overlap with the best subset, regret, share of all subsets that are better;
        ``curves``: phi and gap of Frank-Wolfe; ``best``, ``random``: the least and the mean Phi over all subsets.
    """
    n = problem.n_items
    subsets_SN = all_subsets(n, k)
    w_SP = newton(problem, subsets_SN / k)
    phi_S = retrained_upper_losses(problem, w_SP)
    best = int(phi_S.argmin())

    def penalised(solved: Solved) -> Tensor:
        problem_at = Penalised(problem, solved)
        return problem_at.values(100 * problem_at.rho)  # an error of about a hundredth

    def row(name: str, chosen_VN: Tensor) -> dict[str, Any]:
        """Of the best of some subsets."""
        own_V = (chosen_VN @ subsets_SN.T).argmax(1)  # the rows of the same subsets
        at = int(own_V[phi_S[own_V].argmin()])
        return {
            "choice": name, "overlap": float(subsets_SN[at] @ subsets_SN[best]) / k,
            "regret": float(phi_S[at] - phi_S[best]), "better": float((phi_S < phi_S[at]).double().mean()),
        }  # fmt: skip

    rows, curves = [], []
    uniform = solve(problem, problem.uniform())
    estimates: dict[str, Estimate] = {"implicit": lambda solved: solved.d_N, "penalty": penalised}
    for name, estimate in estimates.items():
        rows.append(row(f"{name}, top k once", linear_minimiser(-estimate(uniform), k)[None]))
        for memoryless in (True, False):
            course = frank_wolfe(problem, estimate, k, iterations, memoryless)
            kind = "step 1" if memoryless else "step 2/(t+2)"
            if memoryless:
                rows.append(row(f"{name}, {kind}, last", course["vertices_VN"][-1:]))
            else:
                rows.append(row(f"{name}, {kind}, top k of alpha", linear_minimiser(-course["alpha_N"], k)[None]))
            rows.append(row(f"{name}, {kind}, best vertex", torch.unique(course["vertices_VN"], dim=0)))
            curves.append({"estimate": name, "kind": kind, "phi": course["phi"], "gap": course["gap"]})
    return {"problem": problem.name, "n": n, "k": k, "subsets": len(subsets_SN), "best": float(phi_S[best]),
            "random": float(phi_S.mean()), "rows": rows, "curves": curves}  # fmt: skip


def check_selections(studies: Sequence[dict[str, Any]]) -> list[Claim | Reported]:
    """Claims on the studies of one kind of problem, one per seed: the worst of them counts."""
    name, n, k = studies[0]["problem"], studies[0]["n"], studies[0]["k"]
    where, found = f"{name}, {k} of {n}", list[Claim | Reported]()

    def curve(study: dict[str, Any], estimate: str = "implicit") -> dict[str, Any]:
        return next(c for c in study["curves"] if (c["estimate"], c["kind"]) == (estimate, "step 2/(t+2)"))

    def regret(study: dict[str, Any], choice: str) -> float:
        return float(next(r["regret"] for r in study["rows"] if r["choice"] == choice))

    for estimate in ("implicit", "penalty"):
        text = f"{where}: Frank-Wolfe ({estimate}), Phi of its alpha less the best subset's"
        found.append(Claim("selections", text, max(curve(s, estimate)["phi"][-1] - s["best"] for s in studies),
                           "set beforehand; below 0 in theory, as A holds every subset", high=1e-3))  # fmt: skip
    differences = [regret(s, "penalty, top k once") - regret(s, "implicit, top k once") for s in studies]
    found.append(Claim("selections", f"{where}: Phi of the penalty's top k less the implicit top k's",
                       max(differences), "0 in theory unless d ties; as above", high=1e-3))  # fmt: skip
    for choice in ("top k once", "step 1, last", "step 2/(t+2), top k of alpha", "step 2/(t+2), best vertex"):
        worst = max(regret(s, f"implicit, {choice}") for s in studies)
        found.append(Reported("selections", f"{where}: greatest regret of {choice}", worst))
    slopes = []
    for one in studies:
        gap = [max(g, 1e-14) for g in accumulate(curve(one)["gap"][1:], min)]  # float64 knows no less
        slopes.append(log_slope([t + 2.0 for t in range(1, len(gap) + 1)], gap))
    text = f"{where}: Frank-Wolfe (implicit), slope of log least duality gap against log T"
    if name == "mean":
        why = "-1 or steeper in theory, Phi being convex; as wide as the penalty's"
        return [*found, Claim("selections", text, max(slopes), why, high=-0.8)]
    return [*found, Reported("selections", text, max(slopes))]
