"""Excess loss: documents that a copy of the proxy knows better once it has been trained on the upper data.

    score_i = l_i(u) - l_i(w)

with u the warm proxy and w the same after K AdamW steps on upper data, as it was when it was best on a part of these
that it does not learn; l_i is the mean cross-entropy per predicted token. It is BLADE's excess loss (arXiv 2606.18650,
section 3) of whole documents, and the score of CoLoR-Filter (arXiv 2406.10670, section 3), which derives it as a ratio
of posteriors: prior u against conditional model w.

Upper examples are learned as whole texts: from short answers alone w would learn how these are distributed, and score
documents by that.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt
from transformers import PreTrainedModel

from bilect.data.tokens import TokenStore
from bilect.functional.trees import Tree
from bilect.methods._resume import resume
from bilect.methods._steps import (
    LearnedPart,
    Steps,
    pool_batches,
    pool_objective,
    upper_batches,
    upper_loss,
    upper_objective_of,
)
from bilect.methods.contract import DocumentMethod, Figures, Foresight, MethodConfig, Sizes
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.runtime.checkpoints import Stateful, save_parts
from bilect.runtime.progress import Task
from bilect.training.evaluation import document_losses

__all__ = ["Excess", "ExcessConfig"]

LOOKS, PATIENCE = 10, 3
LEAST_HELD_OUT, MOST_HELD_OUT = 4, 1024  # documents of a set: more would cost more than the training they end
SHOWN_EVERY = 10  # steps between two losses on the screen: to show one, a GPU is waited for


class ExcessConfig(MethodConfig):
    """How w is trained."""

    steps: PositiveInt = Field(150, description="K, AdamW steps of w, at most")
    learning_rate: PositiveFloat = Field(5e-4, description="of AdamW")
    batch_size: PositiveInt = Field(16, description="upper documents of a step, over all ranks")
    learned: LearnedPart = Field("text", description="of the upper examples: whole texts, or the responses alone")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="share of each upper set that ends w's training, at most 1,024 documents; 0: none"
    )
    control: Literal["warm", "pool"] = Field("warm", description="u: the warm proxy, or after K steps on candidates")


class Excess(DocumentMethod[ExcessConfig]):
    """See the module."""

    name = "excess"
    summary = "loss under the warm proxy less that after training on upper data (arXiv 2406.10670, 2606.18650)"
    Config = ExcessConfig
    base: PreTrainedModel  # u
    reference: PreTrainedModel  # w

    @property
    def steps(self) -> int:
        """Of w at most, and of u."""
        return self.config.steps * (2 if self.config.control == "pool" else 1)

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Two forward passes."""
        return self._losses(self.base, store, rows) - self._losses(self.reference, store, rows)

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """Two forward passes of the proxy."""
        tokens = float(store.length_R[rows].sum())
        return 2 * forward_flops(self.base, tokens, tokens / len(rows))

    def foresee(self, sizes: Sizes) -> Foresight:
        """With all K steps, and as many looks at what is held out."""
        config, proxy = self.config, sizes.proxy
        tokens = config.steps * config.batch_size * sizes.upper_length
        flops = 3 * forward_flops(proxy, tokens, sizes.upper_length)
        if config.control == "pool":
            drawn = config.steps * config.batch_size * sizes.length
            tokens, flops = tokens + drawn, flops + 3 * forward_flops(proxy, drawn, sizes.length)
        held_out = [min(config.held_out * documents, MOST_HELD_OUT) * length for documents, length in sizes.upper]
        looked_at = min(LOOKS, config.steps) * sum(held_out)
        flops += forward_flops(proxy, looked_at, sizes.upper_length)
        return Foresight(tokens + looked_at, flops, 2 * forward_flops(proxy, sizes.tokens, sizes.length))

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        learned, held_out = zip(*(self._split(store) for _, _, store in inputs.upper), strict=True)
        upper = upper_batches(inputs, config.batch_size, "excess upper", rows=learned)
        pool = pool_batches(inputs, config.batch_size, "excess pool")
        self.base, self.reference = inputs.load(inputs.proxy), inputs.load(inputs.proxy)
        w_lm, u_lm = CausalLM(self.reference), CausalLM(self.base)
        w = Steps(w_lm, lambda: upper_objective_of(w_lm, upper, inputs, config.learned), config.learning_rate,
                  bf16=inputs.bf16)  # fmt: skip
        u = Steps(u_lm, lambda: pool_objective(u_lm, pool), config.learning_rate, bf16=inputs.bf16)
        best = _Best()
        parts: dict[str, Stateful] = {"w": w, "u": u, "upper": upper, "pool": pool, "best": best}
        path = inputs.scratch / "excess.pt"
        resume(path, parts, inputs.device)
        task.advance(w.done + u.done)
        looks = config.held_out > 0 and all(len(rows) >= LEAST_HELD_OUT for rows in held_out)
        every = -(-config.steps // LOOKS)
        if looks and w.done == 0:
            best.before = upper_loss(w_lm, inputs, held_out, config.learned)
        while w.done < config.steps and best.looks_since < PATIENCE:
            self._step(w, parts, path, task)
            if looks and (w.done % every == 0 or w.done == config.steps):
                best.look(upper_loss(w_lm, inputs, held_out, config.learned), w)
        if looks:
            self.reference.load_state_dict(best.weights, strict=False)
        taken = best.step if looks else w.done
        while config.control == "pool" and u.done < taken:
            self._step(u, parts, path, task)
        length = float(inputs.pool.length_R[inputs.rows].mean())
        flops = 3 * forward_flops(self.base, w.done * config.batch_size * upper.mean_length, upper.mean_length)
        flops += 3 * forward_flops(self.base, u.done * config.batch_size * length, length)
        if looks:
            tokens = sum(float(s.length_R[r].sum()) for (_, _, s), r in zip(inputs.upper, held_out, strict=True))
            flops += forward_flops(self.base, best.looks * tokens, upper.mean_length)
        figures = {"held_out_loss_before": best.before, "held_out_loss": best.loss} if looks else {}
        return {"flops": flops, "steps": taken, **figures}

    def _step(self, steps: Steps, parts: dict[str, Stateful], path: Path, task: Task) -> None:
        loss = steps.step()
        if steps.done % self.inputs.checkpoint_every == 0:
            save_parts(path, parts)
        task.advance(1, **({"loss": float(loss)} if steps.done % SHOWN_EVERY == 0 else {}))

    def _split(self, store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
        """Rows of an upper set that w learns, and those held out."""
        order = np.random.default_rng(self.inputs.derive("excess held out")).permutation(len(store))
        held_out = min(int(self.config.held_out * len(store)), MOST_HELD_OUT)
        if held_out and len(store) >= 2 * LEAST_HELD_OUT:  # of a small set more than its share, or w learns it by heart
            held_out = max(held_out, LEAST_HELD_OUT)
        return np.sort(order[held_out:]), np.sort(order[:held_out])

    def _losses(self, model: PreTrainedModel, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        inputs = self.inputs
        return document_losses(model, store, rows, inputs.pad_id, inputs.batch_tokens, bf16=inputs.bf16)

    def _write(self, folder: Path) -> None:
        self.reference.save_pretrained(folder / "reference")
        if self.config.control == "pool":
            self.base.save_pretrained(folder / "base")

    def _read(self, folder: Path) -> None:
        self.reference = self.inputs.load(folder / "reference")
        self.base = self.inputs.load(folder / "base") if self.config.control == "pool" else self.inputs.warm_proxy


class _Best:
    """w at its lowest loss on the upper data held out."""

    def __init__(self) -> None:
        self.weights: Tree = {}
        self.before, self.loss, self.step, self.looks, self.looks_since = 0.0, math.inf, 0, 0, 0

    def look(self, loss: float, w: Steps) -> None:
        """Compare with w as it is."""
        self.looks += 1
        self.looks_since += 1
        if loss < self.loss:
            self.weights, self.loss, self.step, self.looks_since = w.frozen(), loss, w.done, 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
