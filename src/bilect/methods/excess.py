"""Excess loss: documents that a copy of the proxy knows better once it has been trained on the upper data.

    score_i = l_i(u) - l_i(w)

with u the warm proxy and w the same after K AdamW steps on upper data; l_i is the mean cross-entropy per predicted
token. It is BLADE's excess loss (arXiv 2606.18650, section 3) of whole documents, and the score of CoLoR-Filter (arXiv
2406.10670, section 3), which derives it as a ratio of posteriors: prior u against conditional model w.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from transformers import PreTrainedModel

from bilect.data.tokens import TokenStore
from bilect.methods._resume import resume
from bilect.methods._steps import LearnedPart, Steps, pool_batches, pool_objective, upper_batches, upper_objective_of
from bilect.methods.contract import DocumentMethod, Figures, MethodConfig
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.runtime.checkpoints import Stateful, save_parts
from bilect.runtime.device import autocast
from bilect.runtime.progress import Task
from bilect.training.evaluation import document_losses

__all__ = ["Excess", "ExcessConfig"]


class ExcessConfig(MethodConfig):
    """How w is trained."""

    steps: PositiveInt = Field(150, description="K, AdamW steps of w")
    learning_rate: PositiveFloat = Field(5e-4, description="of AdamW")
    batch_size: PositiveInt = Field(16, description="upper documents of a step, over all ranks")
    learned: LearnedPart = Field("text", description="of the upper examples: whole texts, or the responses alone")
    pool_weight: NonNegativeFloat = Field(
        0.0, description="of the loss on as many candidates, added to f: keeps w near"
    )
    control: Literal["warm", "pool"] = Field(
        "warm", description="u: the warm proxy, or after K steps on the candidates"
    )


class Excess(DocumentMethod[ExcessConfig]):
    """See the module."""

    name = "excess"
    summary = "loss under the warm proxy less that after training on upper data (arXiv 2406.10670, 2606.18650)"
    Config = ExcessConfig
    base: PreTrainedModel  # u
    reference: PreTrainedModel  # w

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Two forward passes."""
        return self._losses(self.base, store, rows) - self._losses(self.reference, store, rows)

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """Two forward passes of the proxy."""
        tokens = float(store.length_R[rows].sum())
        return 2 * forward_flops(self.base, tokens, tokens / len(rows))

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        upper = upper_batches(inputs, config.batch_size, "excess", "upper")
        pool = pool_batches(inputs, config.batch_size, "excess", "pool")
        self.base, self.reference = inputs.load(inputs.proxy), inputs.load(inputs.proxy)
        w, u = CausalLM(self.reference), CausalLM(self.base)
        trained = {
            "w": Steps(
                w, lambda: upper_objective_of(w, upper, inputs, config.learned), config.learning_rate, bf16=inputs.bf16
            )
        }
        if config.control == "pool":
            trained["u"] = Steps(u, lambda: pool_objective(u, pool), config.learning_rate, bf16=inputs.bf16)
        parts: dict[str, Stateful] = {**trained, "upper": upper, "pool": pool}
        path = inputs.scratch / "excess.pt"
        resume(path, parts, inputs.device)
        task.advance(trained["w"].done)
        while trained["w"].done < config.steps:
            losses = {name: steps.step() for name, steps in trained.items()}
            if trained["w"].done % inputs.checkpoint_every == 0:
                save_parts(path, parts)
            task.advance(1, upper_loss=losses["w"])
        documents = config.steps * config.batch_size
        flops = 3 * forward_flops(self.base, documents * upper.mean_length, upper.mean_length)
        if config.control == "pool":
            length = float(inputs.pool.length_R[inputs.rows].mean())
            flops += 3 * forward_flops(self.base, documents * length, length)
        return {"flops": flops, "upper_loss": trained["w"].loss}

    def _losses(self, model: PreTrainedModel, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        inputs = self.inputs
        with autocast(inputs.device, inputs.bf16):
            return document_losses(model, store, rows, inputs.pad_id, inputs.batch_tokens)

    def _write(self, folder: Path) -> None:
        self.reference.save_pretrained(folder / "reference")
        if self.config.control == "pool":
            self.base.save_pretrained(folder / "base")

    def _read(self, folder: Path) -> None:
        self.reference = self.inputs.load(folder / "reference")
        self.base = self.inputs.load(folder / "base") if self.config.control == "pool" else self.inputs.warm_proxy
