"""The scores of ``methods.influence`` and ``methods.excess`` against exact ones, at the solution of the lower level.

    influence:  < grad l_n(w*), z >,  with the exact z:  d_n itself, since dPhi/dalpha_n = -d_n
    excess:     l_n(w*) - l_n(w* - r grad f)  =  r < grad l_n(w*), grad f > + O(r^2):  one small step is influence with
                the solver ``identity``

What excess is worth after many steps, theory does not say; its cosine with the exact d is reported.
"""

import torch
from torch import Tensor

from bilect.functional.directional import directional_finite_difference
from bilect.functional.trees import Tree, add_scaled
from bilect.verify.claims import Claim, Reported, cosine, log_slope, relative_error
from bilect.verify.exact import Solved, gradient
from bilect.verify.problems import Problem

__all__ = ["check_direct", "excess_after"]

RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # of one step, over lambda_max
STEPS = (1, 10, 100)  # of AdamW on f
LEARNING_RATE = 1e-2
TRUNCATION = 1e-6  # the step of central differences in float64, which err by its square


def check_direct(problem: Problem, solved: Solved) -> list[Claim | Reported]:
    """Both claims, and the cosine of excess after 1, 10 and 100 steps."""
    z = problem.tree(solved.z_P)
    d_N = directional_finite_difference(problem.losses, solved.params, z)
    upper = problem.tree(solved.upper_gradient_P)
    first_order_N = solved.jacobian_NP @ solved.upper_gradient_P
    rates = [r / solved.eigenvalues[1] for r in RATES]
    errors = [relative_error(_excess(problem, solved.params, add_scaled(solved.params, upper, -r)) / r, first_order_N)
              for r in rates]  # fmt: skip
    found: list[Claim | Reported] = [
        Claim("direct", f"{problem.name}: influence with the exact z against the exact d, relative error",
              relative_error(d_N, solved.d_N), "central differences of step 1e-6", high=TRUNCATION),
        Claim("direct", f"{problem.name}: excess after one step over its rate, slope of log error against log rate",
              log_slope(rates, errors), "1 in theory; set beforehand", 0.8, 1.2),
    ]  # fmt: skip
    for steps in STEPS:
        text = f"{problem.name}: excess after {steps} AdamW steps on f, cosine with the exact d"
        found.append(Reported("direct", text, cosine(excess_after(problem, solved.params, steps), solved.d_N)))
    return found


def excess_after(problem: Problem, u: Tree, steps: int) -> Tensor:
    """``l_n(u) - l_n(w)``, w after AdamW steps on f from u."""
    w = {k: v.clone() for k, v in u.items()}
    optimizer = torch.optim.AdamW(list(w.values()), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(steps):
        slope = gradient(problem.upper, w)
        for k, v in w.items():
            v.grad = slope[k]
        optimizer.step()
    return _excess(problem, u, w)


def _excess(problem: Problem, u: Tree, w: Tree) -> Tensor:
    with torch.no_grad():
        return problem.losses(u) - problem.losses({k: v.detach() for k, v in w.items()})
