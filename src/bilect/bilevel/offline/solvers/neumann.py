"""The Neumann series of the inverse; its step follows from the Hessian's norm unless one is given."""

from bilect.bilevel.offline.solvers._solver import Solver, System
from bilect.config import FitConfig
from bilect.functional import linear_solve
from bilect.functional.linear_solve import Solution


class Neumann(Solver):
    """See ``functional.linear_solve.neumann``."""

    def measures_norm(self, config: FitConfig) -> bool:
        """For the step."""
        return config.solver_step_size is None

    def solve(self, system: System, config: FitConfig) -> Solution:
        """The step is 1 / (||H|| + damping) where none is given."""
        step_size = config.solver_step_size or 1 / max((system.norm or 0.0) + system.damping, 1e-30)
        return linear_solve.neumann(
            system.hvp, system.b, steps=config.solver_steps, step_size=step_size, damping=system.damping
        )
