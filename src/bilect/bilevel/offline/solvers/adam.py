"""``z = b / (sqrt(v') + eps)``: the curvature that an Adam-trained lower level sees (SAMA, arXiv 2310.05674).

v' is v with b's square taken in, see ``functional.linear_solve.next_second_moment``.
"""

from bilect.bilevel.offline.solvers._solver import Solver, System
from bilect.config import FitConfig
from bilect.functional import linear_solve
from bilect.functional.linear_solve import Solution


class Adam(Solver):
    """See ``functional.linear_solve.adam``."""

    def products(self, config: FitConfig) -> int:
        """None."""
        return 0

    def solve(self, system: System, config: FitConfig) -> Solution:
        """By the second moments of the proxy's optimiser."""
        return linear_solve.adam(system.b, system.second_moment(), system.eps)
