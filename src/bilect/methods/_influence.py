"""One training step on one document: its gradient, and the direction Adam makes of it.

    m' = beta1 m + (1 - beta1) g       v' = beta2 v + (1 - beta2) g^2
    direction(g) = [ m' / (1 - beta1^(t+1)) ] / [ sqrt(v' / (1 - beta2^(t+1))) + eps ]

with m, v, t as the warm proxy's optimiser has left them. Without them they are zero and the direction is the gradient's
sign: the first step of a fresh Adam. (Weight decay is the same for every document and left out.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from bilect.bilevel.objective import document_losses
from bilect.data.batch import Row, make_batch
from bilect.errors import BilectError
from bilect.functional.trees import Tree
from bilect.models.causal_lm import CausalLM
from bilect.runtime.checkpoints import load_state
from bilect.training.train import OPTIMIZER_FILE
from bilect.training.trainer import FusedLoss

__all__ = ["Adam", "document_gradient", "warm_adam"]


def document_gradient(lm: CausalLM, document: Row, pad_id: int, names: Sequence[str]) -> Tree:
    """``grad l_i`` in some parameters, at the model's own; l_i is the mean over the document's predicted tokens.

    Args:
        lm: the model.
        document: token ids, and the number of given ones.
        pad_id: padding token.
        names: of the parameters.
    """
    params = {k: p.detach() for k, p in lm.params().items()}
    leaves = {k: params[k].requires_grad_() for k in names}  # nothing flows below the first of them
    batch = make_batch([document], pad_id).to(lm.device)
    with torch.enable_grad():
        loss = document_losses(lm, batch)(params).sum()
    return dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@dataclass(frozen=True)
class Adam:
    """State of an Adam optimiser by parameter; see the module.

    Attributes:
        first: m; empty for a fresh optimiser.
        second: v.
        step: t.
        betas: beta1 and beta2.
        eps: of the denominator.
    """

    first: Tree
    second: Tree
    step: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def direction(self, gradient: Tree) -> Tree:
        """What the next step would subtract, at learning rate 1."""
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1 ** (self.step + 1), 1 - beta2 ** (self.step + 1)
        direction = {}
        for k, g in gradient.items():
            m, v = (1 - beta1) * g, (1 - beta2) * g.square()
            if self.step:
                m, v = m + beta1 * self.first[k], v + beta2 * self.second[k]
            direction[k] = (m / correction1) / ((v / correction2).sqrt() + self.eps)
        return direction


def warm_adam(folder: Path, model: PreTrainedModel) -> Adam:
    """The optimiser that ``bilect.training`` has left beside a model; a fresh one where there is none.

    Args:
        folder: of the model.
        model: read from there.

    Raises:
        BilectError: the file is broken, or another model's.
    """
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        return Adam({}, {})
    state = load_state(path, "restore it, or delete it to do without", model.device)
    named = {n: p for n, p in FusedLoss(model).named_parameters() if p.requires_grad}
    decayed = set(Trainer.get_decay_parameter_names(None, FusedLoss(model)))  # the Trainer's groups give the order
    order = [n for n in named if n in decayed] + [n for n in named if n not in decayed]
    slots = [state["state"].get(i) for group in state["param_groups"] for i in group["params"]]
    if [None if s is None else s["exp_avg"].shape for s in slots] != [named[n].shape for n in order]:
        raise BilectError(f"checkpoint: {path} is not the optimiser of the model beside it; restore it, or delete it")
    by_name = {n.removeprefix("model."): s for n, s in zip(order, slots, strict=True)}
    group = state["param_groups"][0]
    return Adam(
        {k: s["exp_avg"] for k, s in by_name.items()},
        {k: s["exp_avg_sq"] for k, s in by_name.items()},
        int(slots[0]["step"]),
        tuple(group["betas"]),
        group["eps"],
    )
