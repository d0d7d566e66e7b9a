"""A short training of the proxy that a method's scores come from: AdamW on objectives drawn one after the other."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bilect.bilevel.objective import Objective, lower_objective, upper_objective
from bilect.data.batch import IGNORE, Batch, make_batch
from bilect.data.loading import BatchStream, SetStream, length_bucketed
from bilect.data.tokens import TokenStore
from bilect.functional import linear_solve
from bilect.functional.losses import token_losses
from bilect.functional.trees import Tree, add_scaled, zeros_like
from bilect.methods._influence import Adam
from bilect.methods.contract import Inputs
from bilect.models.causal_lm import CausalLM
from bilect.runtime import distributed

__all__ = [
    "LearnedPart",
    "Steps",
    "pool_batches",
    "pool_objective",
    "upper_batches",
    "upper_gradient",
    "upper_loss",
    "upper_objective_of",
    "whole_texts",
]

LearnedPart = Literal["response", "text"]
WEIGHT_DECAY, GRAD_CLIP = 0.01, 1.0


class Steps:
    """AdamW steps of a model, in place, at a constant learning rate.

    Args:
        lm: the model.
        draw: the objective of the next step, over all ranks.
        learning_rate: of AdamW.
        adam: an optimiser to go on with; None: a fresh one.
        bf16: matrix products in bfloat16.

    Attributes:
        params: those of the model.
        done: steps so far.
        loss: of the last step, before it; a tensor, since a float makes the host wait for a GPU.
    """

    def __init__(
        self,
        lm: CausalLM,
        draw: Callable[[], Objective],
        learning_rate: float,
        *,
        adam: Adam | None = None,
        bf16: bool = False,
    ) -> None:
        self.lm, self.draw, self.bf16 = lm, draw, bf16
        self.params = lm.params()
        adam = adam or Adam({}, {})
        self.optimizer = torch.optim.AdamW(
            list(self.params.values()), lr=learning_rate, betas=adam.betas, eps=adam.eps, weight_decay=WEIGHT_DECAY
        )
        for name, p in self.params.items() if adam.step else ():
            moments = {"exp_avg": adam.first[name].clone(), "exp_avg_sq": adam.second[name].clone()}
            self.optimizer.state[p] = {"step": torch.tensor(float(adam.step)), **moments}
        self.done, self.loss = 0, torch.tensor(0.0)

    def step(self) -> Tensor:
        """One step; returns the loss before it."""
        gradient = self.draw().gradient(self.params, self.bf16)
        for name, p in self.params.items():
            p.grad = gradient.tree[name]
        torch.nn.utils.clip_grad_norm_(self.params.values(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done, self.loss = self.done + 1, gradient.ce
        return self.loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes, but for the positions of the streams behind ``draw``."""
        return {
            "model": self.lm.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "loss": self.loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.lm.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.loss = state["done"], state["loss"]

    def frozen(self) -> Tree:
        """A copy of the parameters as they are."""
        return {name: p.detach().clone() for name, p in self.params.items()}

    def second_moment(self, gradient: Tree) -> Tree:
        """AdamW's v as a step on ``gradient`` would leave it, see ``linear_solve.next_second_moment``."""
        return linear_solve.second_moment_of(self.optimizer, self.params, gradient)


def pool_batches(inputs: Inputs, batch_size: int, label: str) -> BatchStream:
    """Endless batches of the candidates, by weight where the pool has weights."""
    return BatchStream(
        inputs.pool,
        inputs.rows,
        batch_size,
        inputs.pad_id,
        inputs.derive(label),
        inputs.device,
        inputs.pool.weight_R,
    )


def upper_batches(inputs: Inputs, batch_size: int, label: str, rows: Sequence[np.ndarray] | None = None) -> SetStream:
    """Endless batches of the upper sets, or of some rows of each."""
    _, weights, stores = zip(*inputs.upper, strict=True)
    return SetStream(stores, weights, batch_size, inputs.pad_id, inputs.derive(label), inputs.device, rows)


def pool_objective(lm: CausalLM, batches: BatchStream) -> Objective:
    """The mean of the document losses of the next batch."""
    batch = next(batches)
    return lower_objective(lm, batch, torch.full((batch.n_documents,), 1 / batches.batch_size, device=lm.device))


def upper_objective_of(lm: CausalLM, batches: Iterator[Batch], inputs: Inputs, learned: LearnedPart) -> Objective:
    """f on the next batch of the upper sets: of the responses, or of the examples as whole texts."""
    batch = next(batches)
    batch = batch if learned == "response" else whole_texts(batch)
    return upper_objective(lm, batch, [weight for _, weight, _ in inputs.upper])


def upper_gradient(
    lm: CausalLM,
    theta: Tree,
    upper: Iterator[Batch],
    number: int,
    inputs: Inputs,
    learned: LearnedPart,
    bf16: bool = False,
) -> tuple[Tree, Tensor]:
    """``grad f(theta)`` and f over so many batches: means over batches, since a batch's f is a mean."""
    total = zeros_like(theta)
    loss = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for _ in range(number):
        gradient = upper_objective_of(lm, upper, inputs, learned).gradient(theta, bf16)
        total = add_scaled(total, gradient.tree, 1 / number)
        loss = loss + gradient.ce / number
    return total, loss


@torch.no_grad()
def upper_loss(lm: CausalLM, inputs: Inputs, rows: Sequence[np.ndarray], learned: LearnedPart) -> float:
    """f on some rows of each upper set: the weighted mean of their losses per predicted token, in float32."""
    total = 0.0
    for (_, weight, store), own in zip(inputs.upper, rows, strict=True):
        parts = list(length_bucketed(store.length_R, own, inputs.batch_tokens))
        found = distributed.spread(partial(_summed_loss, lm, inputs, store, learned), parts)
        total += weight * sum(loss for loss, _ in found) / max(sum(n for _, n in found), 1)
    return total / sum(weight for _, weight, _ in inputs.upper)


def _summed_loss(
    lm: CausalLM, inputs: Inputs, store: TokenStore, learned: LearnedPart, rows: np.ndarray
) -> tuple[float, int]:
    batch = make_batch(store.rows(rows), inputs.pad_id).to(lm.device)
    batch = batch if learned == "response" else whole_texts(batch)
    hidden_ND = batch.predicting(lm.hidden(batch.input_ids_BT))
    return float(token_losses(hidden_ND, lm.head(), batch.labels_N).ce_N.double().sum()), batch.n_predicted


def whole_texts(batch: Batch) -> Batch:
    """The same documents with their prompts learned too."""
    target_BT = torch.full_like(batch.target_BT, IGNORE)
    target_BT[:, :-1] = batch.input_ids_BT[:, 1:].masked_fill(batch.mask_BT[:, 1:] == 0, IGNORE)
    return Batch(batch.input_ids_BT, target_BT, batch.length_B, batch.set_B)
