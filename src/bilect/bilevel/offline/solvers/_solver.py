"""What a solver is given, and what the fit must know of it. Its mathematics is a function of ``functional``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from bilect.config import FitConfig
from bilect.functional.linear_solve import Solution
from bilect.functional.trees import Tree, TreeMap

__all__ = ["Solver", "System"]


@dataclass(frozen=True)
class System:
    """``(H + damping I) z = b`` at the proxy's present parameters.

    Attributes:
        hvp: ``v -> H v``.
        b: gradient of the upper objective.
        damping: see ``Solver.damping``.
        norm: of H, measured; None where the solver does not ask for it.
        second_moment: of the proxy's Adam, bias-corrected, as a step on b would leave it; a function: few ask for it.
        eps: of the same.
    """

    hvp: TreeMap
    b: Tree
    damping: float
    norm: float | None
    second_moment: Callable[[], Tree]
    eps: float


class Solver(ABC):
    """One way to solve for z; the settings are ``solver_steps``, ``solver_step_size`` and ``damping`` of the fit.

    Attributes:
        knows_residual: whether its solution comes with the true relative residual, at no cost.
    """

    knows_residual = False

    def products(self, config: FitConfig) -> int:
        """Hessian products of one solve."""
        return config.solver_steps

    def measures_norm(self, config: FitConfig) -> bool:
        """Whether one of its settings follows from the Hessian's norm."""
        return False

    def damping(self, config: FitConfig, norm: float | None) -> float:
        """What is added to the Hessian's diagonal."""
        return config.damping or 0.0

    @abstractmethod
    def solve(self, system: System, config: FitConfig) -> Solution:
        """z, and what is known of it."""
