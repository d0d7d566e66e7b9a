"""The exact gradient of a loss after training with respect to the weights of what was trained on.

    theta_T(w) = T Adam steps from theta_0,   step t on   g_t = sum_{i in B_t} w_i grad l_i(theta_{t-1})
    metagradient:   d f(theta_T(w)) / d w_i   at the given w

by reverse differentiation through every step, one step at a time: the states (theta, m, v) of a first pass are kept,
and each step is done again with its graph. MAGIC, arXiv 2504.16430; Adam's root is smoothed, ``sqrt(v + eps^2)``, since
that of 0 has no derivative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilect.functional.trees import Tree, zeros_like

__all__ = ["AdamState", "SmoothAdam", "metagradient"]


@dataclass(frozen=True)
class AdamState:
    """Where training stands.

    Attributes:
        theta: parameters.
        first: m; a fresh optimiser's are zeros.
        second: v.
        step: steps behind the moments.
    """

    theta: Tree
    first: Tree
    second: Tree
    step: int = 0

    @staticmethod
    def fresh(theta: Tree) -> "AdamState":
        """No step made."""
        return AdamState(theta, zeros_like(theta), zeros_like(theta))

    def leaves(self) -> list[Tensor]:
        """theta, m, v."""
        return [*self.theta.values(), *self.first.values(), *self.second.values()]

    def detached(self, requires_grad: bool = False) -> "AdamState":
        """The same values without history."""

        def values(tree: Tree) -> Tree:
            return {k: v.detach().requires_grad_(requires_grad) for k, v in tree.items()}

        return AdamState(values(self.theta), values(self.first), values(self.second), self.step)


@dataclass(frozen=True)
class SmoothAdam:
    """An Adam step that can be differentiated.

        m' = beta1 m + (1 - beta1) g        v' = beta2 v + (1 - beta2) g^2
        theta' = theta - rate * m'/(1 - beta1^t) / sqrt(v'/(1 - beta2^t) + eps^2)

    Attributes:
        betas: beta1, beta2.
        eps: as above.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def step(self, state: AdamState, gradient: Tree, learning_rate: float) -> AdamState:
        """The state after a step on ``gradient``."""
        beta1, beta2 = self.betas
        count = state.step + 1
        first = {k: beta1 * state.first[k] + (1 - beta1) * g for k, g in gradient.items()}
        second = {k: beta2 * state.second[k] + (1 - beta2) * g.square() for k, g in gradient.items()}
        theta = {
            k: p - learning_rate * first[k] / (1 - beta1**count)
            / (second[k] / (1 - beta2**count) + self.eps**2).sqrt()
            for k, p in state.theta.items()
        }  # fmt: skip
        return AdamState(theta, first, second, count)


def metagradient(
    losses: Sequence[Callable[[Tree], Tensor]],
    weights: Sequence[Tensor],
    upper_gradient: Callable[[Tree], Tree],
    start: AdamState,
    learning_rates: Sequence[float],
    adam: SmoothAdam | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], AdamState]:
    """``d f(theta_T) / d w`` for the weights of every step.

    Costs a pass of training, and for each step another gradient with a backward pass through it: about five times what
    training costs. Memory: ``3 T`` copies of the parameters.

    Args:
        losses: of each step, ``theta -> l_B``; twice differentiable.
        weights: of each step, w (B,) as they enter ``sum_i w_i l_i``.
        upper_gradient: ``theta -> grad f(theta)``.
        start: theta_0, with the moments that training begins with.
        learning_rates: of each step.
        adam: the optimiser.
        on_step: called after each of 2T steps, forward and backward.

    Returns:
        For each step (B,), and the state after the last.
    """
    adam, state = adam or SmoothAdam(), start.detached()
    kept = []
    for loss_B, w_B, rate in zip(losses, weights, learning_rates, strict=True):
        kept.append(state)
        leaves = {k: v.detach().requires_grad_() for k, v in state.theta.items()}
        gradient = torch.autograd.grad((w_B * loss_B(leaves)).sum(), [*leaves.values()])
        state = adam.step(state, dict(zip(leaves, gradient, strict=True)), rate).detached()
        on_step()
    adjoint = [*upper_gradient(state.theta).values(), *map(torch.zeros_like, [*state.leaves()][len(state.theta) :])]
    found = []
    for t in reversed(range(len(kept))):
        before, w_B = kept[t].detached(requires_grad=True), weights[t].detach().requires_grad_()
        loss = (w_B * losses[t](before.theta)).sum()
        gradient = torch.autograd.grad(loss, [*before.theta.values()], create_graph=True)
        after = adam.step(before, dict(zip(before.theta, gradient, strict=True)), learning_rates[t])
        w_adjoint, *adjoint = torch.autograd.grad(after.leaves(), [w_B, *before.leaves()], adjoint)
        found.append(w_adjoint)
        on_step()
    return found[::-1], state
