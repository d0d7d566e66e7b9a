"""A few clipped gradient steps on the quadratic, as BLISS publishes it (arXiv 2510.06048, section 3)."""

from bilect.bilevel.offline.solvers._solver import Solver, System
from bilect.config import FitConfig
from bilect.functional import linear_solve
from bilect.functional.linear_solve import SGD_STEP_SIZE, Solution


class Sgd(Solver):
    """See ``functional.linear_solve.sgd``."""

    def solve(self, system: System, config: FitConfig) -> Solution:
        """Of the paper's step size where none is given."""
        step_size = config.solver_step_size or SGD_STEP_SIZE
        return linear_solve.sgd(
            system.hvp, system.b, steps=config.solver_steps, step_size=step_size, damping=system.damping
        )
