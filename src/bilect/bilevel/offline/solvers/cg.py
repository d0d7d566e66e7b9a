"""Conjugate gradients, damped by a tenth of the Hessian's norm unless told otherwise."""

from bilect.bilevel.offline.solvers._solver import Solver, System
from bilect.config import FitConfig
from bilect.functional import linear_solve
from bilect.functional.linear_solve import CG_DAMPING, Solution


class ConjugateGradients(Solver):
    """See ``functional.linear_solve.cg``."""

    knows_residual = True

    def measures_norm(self, config: FitConfig) -> bool:
        """For the damping."""
        return config.damping is None

    def damping(self, config: FitConfig, norm: float | None) -> float:
        """``CG_DAMPING ||H||`` where none is given."""
        return CG_DAMPING * (norm or 0.0) if config.damping is None else config.damping

    def solve(self, system: System, config: FitConfig) -> Solution:
        """At most ``solver_steps`` products."""
        return linear_solve.cg(system.hvp, system.b, steps=config.solver_steps, damping=system.damping)
