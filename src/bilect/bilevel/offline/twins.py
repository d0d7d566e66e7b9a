"""Reference and matched twin: the two first-order models of the penalty hypergradient.

From the model u, at the same moment,

    w takes K steps on   L_val(w) + lambda * L_tr(alpha, w)      (the reference)
    m takes K steps on              lambda * L_tr(alpha, m)      (the matched twin)

on the same lower batches with the same fresh AdamW. Then ``l_n(m) - l_n(w)`` is what the target set changed, and
nothing else: the training that both had more than u cancels. The plain form of BLADE (arXiv 2606.18650, section 3)
compares w with u itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilect.bilevel.objective import Objective
from bilect.functional.trees import Tree, add_scaled, scale

__all__ = ["FirstOrderModel", "Twins"]


class FirstOrderModel:
    """A parameter tree with its own AdamW, clipped to a gradient norm."""

    def __init__(self, params: Tree, learning_rate: float, grad_clip: float, weight_decay: float = 0.0) -> None:
        self.params: Tree = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
        self.grad_clip = grad_clip
        self.optimizer = torch.optim.AdamW(list(self.params.values()), lr=learning_rate, weight_decay=weight_decay)

    def step(self, gradient: Tree) -> None:
        """One AdamW step on a gradient that is already summed over the ranks."""
        for k, p in self.params.items():
            p.grad = gradient[k]
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Twins:
    """Parameters of w and, where matched, of m; the last upper loss of w, and its parts by upper set."""

    reference: Tree
    matched: Tree | None
    upper_loss: Tensor
    upper_loss_S: Tensor

    @staticmethod
    def train(
        params: Tree,
        draw: Callable[[], tuple[Objective, Objective]],
        *,
        steps: int,
        learning_rate: float,
        penalty: float,
        matched: bool,
        grad_clip: float,
        bf16: bool = False,
    ) -> "Twins":
        """Synchronise with ``params`` and take K steps.

        Args:
            params: of u.
            draw: gives a lower and an upper objective, each on a fresh batch.
            steps: K.
            learning_rate: of both.
            penalty: lambda.
            matched: train m as well.
            grad_clip: greatest gradient norm, of both.
            bf16: matrix products in bfloat16.
        """
        w = FirstOrderModel(params, learning_rate, grad_clip)
        m = FirstOrderModel(params, learning_rate, grad_clip) if matched else None
        upper_loss, upper_loss_S = torch.tensor(torch.nan), torch.zeros(0)
        for _ in range(steps):
            lower, upper = draw()
            upper_gradient, upper_loss, _, upper_loss_S = upper.gradient(w.params, bf16)
            w.step(add_scaled(upper_gradient, lower.gradient(w.params, bf16)[0], penalty))
            if m is not None:
                m.step(scale(lower.gradient(m.params, bf16)[0], penalty))
        return Twins(
            {k: v.detach() for k, v in w.params.items()},
            None if m is None else {k: v.detach() for k, v in m.params.items()},
            upper_loss,
            upper_loss_S,
        )
