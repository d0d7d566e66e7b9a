"""The yardstick of the study: scores that know how training answers to each document, to first order exactly.

    score_i = - d f(theta_T(w)) / d w_i   at w = 1

through a whole training of the proxy on the candidates, from the optimiser that its warm-up has left (see
``functional.metagradient``). A method whose estimates were perfect would give these scores; what even they do not tell
of retraining is that weights are 0 or 1, the other model, and noise. No method of a run: it scores what it trains on.
"""

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilect.bilevel.objective import document_losses
from bilect.data.batch import make_batch
from bilect.data.tokens import TokenStore
from bilect.functional.metagradient import AdamState, SmoothAdam, metagradient
from bilect.functional.trees import Tree
from bilect.methods._influence import warm_adam
from bilect.methods._steps import upper_batches, upper_gradient
from bilect.methods.contract import DocumentMethod, Figures, MethodConfig
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.runtime.progress import Task

__all__ = ["Metagradient", "MetagradientConfig"]

UPPER_BATCH = 16
PASSES = 11  # forward passes that a step costs: 3 of training, and 8 with its graph


class MetagradientConfig(MethodConfig):
    """The training that is differentiated."""

    passes: PositiveInt = Field(3, description="over the candidates")
    batch_size: PositiveInt = Field(16, description="documents of a step")
    learning_rate: PositiveFloat = Field(1e-3, description="of Adam, falling to 0 as a cosine")
    upper_documents: PositiveInt = Field(512, description="of f at the end")


class Metagradient(DocumentMethod[MetagradientConfig]):
    """See the module."""

    name = "metagradient"
    summary = "exact gradient through a whole training (arXiv 2504.16430)"
    Config = MetagradientConfig

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Of documents that were trained on."""
        return np.array([self._score[int(r)] for r in rows])

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        drawn = [self._order(k) for k in range(config.passes)]
        steps = [part for order in drawn for part in np.array_split(order, max(len(order) // config.batch_size, 1))]
        losses, weights = zip(*(self._step(part) for part in steps), strict=True)
        rates = [config.learning_rate * 0.5 * (1 + math.cos(math.pi * t / len(steps))) for t in range(len(steps))]
        adam = warm_adam(inputs.proxy, self._lm.model)
        theta = {k: p.detach() for k, p in self._lm.params().items()}
        start = AdamState.fresh(theta)
        if adam.step:
            start = AdamState(theta, adam.first, adam.second, adam.step)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivatives
            found, _ = metagradient(losses, weights, self._upper, start, rates, SmoothAdam(adam.betas, adam.eps),
                                    lambda: task.advance(0.5))  # fmt: skip
        total: dict[int, float] = dict.fromkeys(map(int, inputs.rows), 0.0)
        for part, d_B, w_B in zip(steps, found, weights, strict=True):
            for row, d in zip(part.tolist(), (d_B * w_B).tolist(), strict=True):  # w relative to 1 per document
                total[row] -= d
        self._score = total
        tokens = config.passes * float(inputs.pool.length_R[inputs.rows].sum())
        return {"flops": PASSES * forward_flops(self._lm.model, tokens, tokens / len(inputs.rows) / config.passes)}

    @cached_property
    def _lm(self) -> CausalLM:
        return CausalLM(self.inputs.load(self.inputs.proxy))

    def _order(self, number: int) -> np.ndarray:
        return np.random.default_rng(self.inputs.derive(f"metagradient {number}")).permutation(self.inputs.rows)

    def _step(self, rows: np.ndarray) -> tuple[Callable[[Tree], Tensor], Tensor]:
        batch = make_batch(self.inputs.pool.rows(rows), self.inputs.pad_id).to(self._lm.device)
        return document_losses(self._lm, batch), torch.full((len(rows),), 1 / len(rows), device=self._lm.device)

    def _upper(self, theta: Tree) -> Tree:
        batches = upper_batches(self.inputs, UPPER_BATCH, "metagradient upper")
        number = batches.batches_of(self.config.upper_documents)
        return upper_gradient(self._lm, theta, batches, number, self.inputs, "response")[0]
