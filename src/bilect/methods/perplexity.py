"""Perplexity filtering: keep documents by their loss under the warmed-up proxy.

    low:     score_i = -l_i                  high:   score_i = l_i
    middle:  score_i = -|F(l_i) - 1/2|       F: distribution of the losses of the candidates

l_i is the mean cross-entropy (nats) per predicted token. Marion et al., arXiv 2309.04564, section 3, where the middle
did best; upper data are not looked at.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from bilect.data.tokens import TokenStore
from bilect.methods.contract import DocumentMethod, Figures, Foresight, MethodConfig, Sizes
from bilect.models.flops import forward_flops
from bilect.runtime import distributed
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed
from bilect.training.evaluation import document_losses

__all__ = ["Perplexity", "PerplexityConfig"]

PART = 256  # documents of the sample whose losses one rank takes at a time


class PerplexityConfig(MethodConfig):
    """Which documents are kept."""

    keep: Literal["low", "middle", "high"] = Field("middle", description="of the losses under the warm proxy")
    sample: PositiveInt = Field(4096, description="candidates whose losses give F; used by keep=middle alone")


class Perplexity(DocumentMethod[PerplexityConfig]):
    """See the module."""

    name = "perplexity"
    summary = "loss per token under the warm proxy: the low, middle or high ones (arXiv 2309.04564)"
    Config = PerplexityConfig
    uses_upper = False
    losses = np.zeros(0)  # of the sample, sorted

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """See the module; F is interpolated between the losses of the sample."""
        loss_R = self._losses(store, rows)
        if self.config.keep == "middle":
            quantile_R = np.interp(loss_R, self.losses, np.linspace(0, 1, len(self.losses)))
            return -np.abs(quantile_R - 0.5)
        return loss_R if self.config.keep == "high" else -loss_R

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """A forward pass of the proxy."""
        tokens = float(store.length_R[rows].sum())
        return forward_flops(self.inputs.warm_proxy, tokens, tokens / len(rows))

    def foresee(self, sizes: Sizes) -> Foresight:
        """The sample, where F is needed, and a pass over all."""
        some = min(self.config.sample, sizes.documents) if self.config.keep == "middle" else 0
        fit, scoring = (forward_flops(sizes.proxy, n * sizes.length, sizes.length) for n in (some, sizes.documents))
        return Foresight(some * sizes.length, fit, scoring)

    def _fit(self, task: Task) -> Figures:
        if self.config.keep != "middle":
            return {"flops": 0.0}
        inputs = self.inputs
        generator = np.random.default_rng(derive_seed(inputs.seed, "perplexity"))
        sample = generator.permutation(inputs.rows)[: self.config.sample]
        parts = np.array_split(sample, max(-(-len(sample) // PART), 1))
        self.losses = np.sort(np.concatenate(distributed.spread(lambda rows: self._losses(inputs.pool, rows), parts)))
        return {"flops": self.score_flops(inputs.pool, sample)}

    def _losses(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        inputs = self.inputs
        model, batch_tokens = inputs.warm_proxy, inputs.batch_tokens
        return document_losses(model, store, rows, inputs.pad_id, batch_tokens, bf16=inputs.bf16)

    def _write(self, folder: Path) -> None:
        np.save(folder / "losses.npy", self.losses)

    def _read(self, folder: Path) -> None:
        self.losses = np.load(folder / "losses.npy")
