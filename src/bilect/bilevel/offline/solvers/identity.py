"""``z = b``: one-step influence, no Hessian product."""

from bilect.bilevel.offline.solvers._solver import Solver, System
from bilect.config import FitConfig
from bilect.functional import linear_solve
from bilect.functional.linear_solve import Solution


class Identity(Solver):
    """See ``functional.linear_solve.identity``."""

    def products(self, config: FitConfig) -> int:
        """None."""
        return 0

    def solve(self, system: System, config: FitConfig) -> Solution:
        """``b`` itself."""
        return linear_solve.identity(system.b)
