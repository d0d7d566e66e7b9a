"""Influence: documents along whose gradient the upper loss falls, the number that BLISS's score model learns from.

    score_i = sum_c rate_c < grad l_i(theta_c), z_c >        z_c = P_c grad f(theta_c)

over C checkpoints of a short continuation of the proxy's warm-up on the candidates, rate_c its learning rate. f is the
upper loss on a large sample of the upper data, and P_c = 1 / (sqrt(v_c) + eps) with AdamW's second moment v_c as a step
on f would leave it (solver ``adam``; SAMA, arXiv 2310.05674), or 1 (``identity``; TracIn, arXiv 2002.08484). To first
order it is by how much steps on the document at the checkpoints lower f. No gradient of a single document is formed,
see ``functional.directional``.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from bilect.bilevel.objective import directional
from bilect.data.batch import make_batch
from bilect.data.loading import SetStream, length_bucketed
from bilect.data.tokens import TokenStore
from bilect.functional import linear_solve
from bilect.functional.trees import Tree
from bilect.methods._influence import warm_adam
from bilect.methods._resume import resume
from bilect.methods._steps import LearnedPart, Steps, pool_batches, pool_objective, upper_batches, upper_gradient
from bilect.methods.contract import DocumentMethod, Figures, Foresight, MethodConfig, Sizes
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.runtime.checkpoints import Stateful, load_state, save_parts, save_state
from bilect.runtime.progress import Task

__all__ = ["Influence", "InfluenceConfig"]

FILE = "directions.pt"


class InfluenceConfig(MethodConfig):
    """Where gradients are taken, and what direction they are compared with."""

    checkpoints: PositiveInt = Field(1, description="C, each after further steps on the candidates")
    steps: PositiveInt = Field(25, description="AdamW steps of the proxy before each checkpoint")
    learning_rate: PositiveFloat = Field(5e-4, description="of these steps")
    batch_size: PositiveInt = Field(16, description="documents of a step, over all ranks")
    upper_documents: PositiveInt = Field(512, description="whose mean gradient is that of f; of fewer all")
    learned: LearnedPart = Field("response", description="of the upper examples: whole texts, or the responses alone")
    solver: Literal["adam", "identity"] = Field("adam", description="what is made of the gradient of f")
    directional: Literal["jvp", "finite_difference", "ghost"] = Field(
        "finite_difference", description="two passes of any kernel, one that carries tangents, or one with a backward"
    )


class Influence(DocumentMethod[InfluenceConfig]):
    """See the module."""

    name = "influence"
    summary = "first-order gain in the upper loss of training on a document (d of arXiv 2510.06048, 2002.08484)"
    Config = InfluenceConfig
    pairs: list[tuple[Tree, Tree]]  # theta_c, z_c

    @property
    def steps(self) -> int:
        """Of the proxy, before all checkpoints."""
        return self.config.checkpoints * self.config.steps

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Two forward passes, or their like, per checkpoint."""
        inputs, lm, total_R = self.inputs, self._lm, np.zeros(len(rows))
        for theta, z in self.pairs:
            lm.model.load_state_dict(theta, strict=False)  # what is no parameter stays
            parts, found = [*length_bucketed(store.length_R[rows], np.arange(len(rows)), inputs.batch_tokens)], []
            for part in parts:
                batch = make_batch(store.rows(rows[part]), inputs.pad_id).to(inputs.device)
                d_B = directional(lm, batch, theta, z, self.config.directional)
                found.append(d_B.double())  # fetched at the end: a GPU goes on while the next batch is made
            total_R[np.concatenate(parts)] += torch.cat(found).cpu().numpy()
        return self.config.learning_rate * total_R

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """Two forward passes of the proxy per checkpoint; the other ways cost about the same."""
        tokens = float(store.length_R[rows].sum())
        return 2 * len(self.pairs) * forward_flops(self.inputs.warm_proxy, tokens, tokens / len(rows))

    def foresee(self, sizes: Sizes) -> Foresight:
        """Steps and one direction at each checkpoint."""
        config, proxy, times = self.config, sizes.proxy, self.config.checkpoints
        tokens = times * config.steps * config.batch_size * sizes.length
        some = min(config.upper_documents, sum(documents for documents, _ in sizes.upper))
        of_upper = times * math.ceil(some / config.batch_size) * config.batch_size * sizes.upper_length
        flops = forward_flops(proxy, tokens, sizes.length) + forward_flops(proxy, of_upper, sizes.upper_length)
        scoring = 2 * times * forward_flops(proxy, sizes.tokens, sizes.length)
        return Foresight(tokens + of_upper, 3 * flops, scoring)

    @cached_property
    def _lm(self) -> CausalLM:
        return CausalLM(self.inputs.load(self.inputs.proxy))

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        pool = pool_batches(inputs, config.batch_size, "influence pool")
        model = inputs.load(inputs.proxy)
        lm, adam = CausalLM(model), warm_adam(inputs.proxy, model)
        steps = Steps(lm, lambda: pool_objective(lm, pool), config.learning_rate, adam=adam, bf16=inputs.bf16)
        upper = upper_batches(inputs, config.batch_size, "influence upper")
        found, path = _Found(), inputs.scratch / "influence.pt"
        parts: dict[str, Stateful] = {"steps": steps, "pool": pool, "upper": upper, "found": found}
        resume(path, parts, inputs.device)
        task.advance(steps.done)
        while len(found.pairs) < config.checkpoints:
            figures: dict[str, float] = {}
            if steps.done < (len(found.pairs) + 1) * config.steps:
                steps.step()
            if steps.done == (len(found.pairs) + 1) * config.steps:
                z, figures["upper_loss"] = self._direction(steps, upper)
                found.pairs.append((steps.frozen(), z))
            if steps.done % inputs.checkpoint_every == 0:
                save_parts(path, parts)
            task.advance(1, **figures)
        self.pairs = found.pairs
        length, documents = float(inputs.pool.length_R[inputs.rows].mean()), config.steps * config.batch_size
        flops = 3 * config.checkpoints * forward_flops(model, documents * length, length)
        of_upper = upper.batches_of(config.upper_documents) * config.batch_size * upper.mean_length
        flops += 3 * config.checkpoints * forward_flops(model, of_upper, upper.mean_length)
        return {"flops": flops, **figures}

    def _direction(self, steps: Steps, upper: SetStream) -> tuple[Tree, float]:
        """z at the parameters as they are, and f there."""
        config, inputs = self.config, self.inputs
        batches, theta = upper.batches_of(config.upper_documents), steps.frozen()
        total, loss = upper_gradient(steps.lm, theta, upper, batches, inputs, config.learned, inputs.bf16)
        if config.solver == "identity":
            return total, float(loss)
        return linear_solve.adam(total, steps.second_moment(total), steps.optimizer.defaults["eps"]).z, float(loss)

    def _write(self, folder: Path) -> None:
        save_state(folder / FILE, _Found(self.pairs).state_dict())

    def _read(self, folder: Path) -> None:
        self.pairs = load_state(folder / FILE, "fit it again", self.inputs.device)["pairs"]


class _Found:
    """The checkpoints so far."""

    def __init__(self, pairs: list[tuple[Tree, Tree]] | None = None) -> None:
        self.pairs = [] if pairs is None else pairs

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs = list(state["pairs"])
