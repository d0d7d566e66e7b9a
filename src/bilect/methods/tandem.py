"""TANDEM: weights of domains (sources) by the penalty gradient, while twin models train; then documents by weight.

    min over alpha on the simplex, w of   f(w) + lambda [ sum_d alpha_d L_d(w) - min over u of sum_d alpha_d L_d(u) ]

    d/dalpha_d = lambda ( L_d(w) - L_d(u) )

u and w start from the warm proxy and see the same lower batches, one part from every source; u steps on
lambda sum_d alpha_d L_d, w on f beside it, and alpha by exponentiated gradient, alpha_d ~ alpha_d exp(-rate grad_d).
So u is w's matched twin: the gradient shows what the upper data changed and nothing else. L_d is the mean loss per
predicted token of source d. arXiv 2606.04401; exponentiated gradient, floor and scores are ours.

    score_i = log( alpha_d / tokens_d ) + Gumbel noise of document i,         d the source of i

Its top-k is a draw without replacement in which source d has the share alpha_d of the tokens for as long as it has
documents left. Without noise, all documents of a source would tie and whole sources be kept or dropped.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from bilect.bilevel.objective import upper_objective
from bilect.bilevel.offline.twins import FirstOrderModel
from bilect.data.batch import Batch, join_batches
from bilect.data.loading import BatchStream, SetStream
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError, DivergedError
from bilect.functional.trees import add_scaled, scale
from bilect.methods._noise import gumbel
from bilect.methods._resume import resume
from bilect.methods.contract import DocumentMethod, Figures, Foresight, MethodConfig, Sizes
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.runtime import distributed
from bilect.runtime.checkpoints import Stateful, save_parts
from bilect.runtime.files import write_json
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed

__all__ = ["Tandem", "TandemConfig", "TandemFit"]

FLOOR = 1e-3  # share of alpha that is spread evenly: no source is lost to the twins for good


class TandemConfig(MethodConfig):
    """The fit of the weights."""

    steps: PositiveInt = Field(300, description="of twins and weights")
    documents_per_source: PositiveInt = Field(2, description="of a lower batch, over all ranks")
    upper_batch_size: PositiveInt = Field(16, description="documents, over all ranks")
    learning_rate: PositiveFloat = Field(1e-4, description="of the twins' AdamW; a tenth of the proxy's is safe")
    weight_learning_rate: PositiveFloat = Field(1.0, description="of the exponentiated gradient")
    penalty: PositiveFloat = Field(1.0, description="lambda")
    grad_clip: PositiveFloat = Field(1.0, description="greatest gradient norm of the twins")


class Tandem(DocumentMethod[TandemConfig]):
    """See the module."""

    name = "tandem"
    summary = "weights of sources by the penalty gradient of twin models, documents drawn by weight (arXiv 2606.04401)"
    Config = TandemConfig
    weights: dict[str, float]  # alpha by source
    tokens: dict[str, float]  # of the candidates by source

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Log weight of a document's source, spread over its tokens, and the document's noise."""
        code_R, sources = _encoded(store, rows)
        if unknown := [s for s in sources if s not in self.weights]:
            raise BilectError(
                f"tandem: source {unknown[0]!r} was not among the candidates that were weighed; fit again"
            )
        log_G = np.array([np.log(self.weights[s]) - np.log(self.tokens[s]) for s in sources])
        return log_G[code_R] + gumbel(derive_seed(self.inputs.seed, "tandem"), store.doc_ids(rows))

    def foresee(self, sizes: Sizes) -> Foresight:
        """Steps of two models and of the weights; scores cost nothing."""
        config = self.config
        lower = config.documents_per_source * sizes.sources * sizes.length
        upper = config.upper_batch_size * sizes.upper_length
        flops = 6 * forward_flops(sizes.proxy, lower, sizes.length)
        flops += 3 * forward_flops(sizes.proxy, upper, sizes.upper_length)
        return Foresight(config.steps * (lower + upper), config.steps * flops)

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        code_R, sources = _encoded(inputs.pool, inputs.rows)
        if len(sources) < 2:
            raise BilectError(f"tandem: all candidates are of the source {sources[0]!r}; it needs two or more to weigh")
        if config.documents_per_source < distributed.world_size():
            raise BilectError("tandem: documents_per_source must be at least the number of ranks")
        lower = _Sources([
            BatchStream(inputs.pool, inputs.rows[code_R == d], config.documents_per_source, inputs.pad_id,
                        derive_seed(inputs.seed, "lower", d), inputs.device)
            for d in range(len(sources))
        ], inputs.pad_id)  # fmt: skip
        _, weights, stores = zip(*inputs.upper, strict=True)
        upper_seed = derive_seed(inputs.seed, "upper")
        upper = SetStream(stores, weights, config.upper_batch_size, inputs.pad_id, upper_seed, inputs.device)
        model = inputs.load(inputs.proxy)
        fit = TandemFit(CausalLM(model), lower, upper, len(sources), weights, config, inputs.bf16)
        parts: dict[str, Stateful] = {"fit": fit, "lower": lower, "upper": upper}
        path = inputs.scratch / "fit.pt"
        resume(path, parts, inputs.device)
        task.advance(fit.steps_done)
        while fit.steps_done < config.steps:
            loss = fit.step()
            if not np.isfinite(loss):
                raise DivergedError(f"tandem: a loss is not a number at step {fit.steps_done}; lower learning_rate")
            if fit.steps_done % inputs.checkpoint_every == 0:
                save_parts(path, parts)
            task.advance(1, upper_loss=loss)
        length_R = inputs.pool.length_R[inputs.rows].astype(np.float64)
        self.weights = dict(zip(sources, fit.alpha_G.tolist(), strict=True))
        self.tokens = dict(zip(sources, np.bincount(code_R, length_R).tolist(), strict=True))
        length = length_R.mean()
        flops = 6 * forward_flops(model, config.documents_per_source * len(sources) * length, length)
        flops += 3 * forward_flops(model, config.upper_batch_size * upper.mean_length, upper.mean_length)
        return {"flops": float(config.steps * flops), "weights": self.weights}

    def _write(self, folder: Path) -> None:
        write_json(folder / "weights.json", {"weights": self.weights, "tokens": self.tokens})

    def _read(self, folder: Path) -> None:
        note = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
        self.weights, self.tokens = note["weights"], note["tokens"]


class TandemFit:
    """The twins and the weights.

    Args:
        model: u and w start from its parameters.
        lower: batches whose ``set_B`` is the source.
        upper: upper batches.
        n_sources: G.
        upper_weights: of the upper sets.
        config: every choice.
        bf16: matrix products in bfloat16.

    Attributes:
        u: minimises the lower level.
        w: is pulled to the upper data too.
        alpha_G: weights of the sources, summing to 1.
        steps_done: steps made.
    """

    def __init__(
        self,
        model: CausalLM,
        lower: Iterator[Batch],
        upper: Iterator[Batch],
        n_sources: int,
        upper_weights: Sequence[float],
        config: TandemConfig,
        bf16: bool = False,
    ) -> None:
        self.model, self.lower, self.upper, self.config, self.bf16 = model, lower, upper, config, bf16
        self.upper_weights = upper_weights
        self.u, self.w = (FirstOrderModel(model.params(), config.learning_rate, config.grad_clip) for _ in range(2))
        self.alpha_G = torch.full((n_sources,), 1 / n_sources, dtype=torch.float64)
        self.gradient_G = torch.zeros_like(self.alpha_G)
        self.steps_done = 0

    def step(self) -> float:
        """One step of u, w and alpha; returns f(w)."""
        penalty = self.config.penalty
        lower = upper_objective(self.model, next(self.lower), self.alpha_G.tolist())
        upper = upper_objective(self.model, next(self.upper), self.upper_weights)
        at_u, at_w = (lower.gradient(twin.params, self.bf16) for twin in (self.u, self.w))
        upper_at_w = upper.gradient(self.w.params, self.bf16)
        n_sources, seen = len(self.alpha_G), torch.cat([at_u.ce_S, at_w.ce_S, upper_at_w.ce[None]]).cpu()
        loss_u_G, loss_w_G = (seen[:n_sources] / self.alpha_G, seen[n_sources:-1] / self.alpha_G)
        self.gradient_G = penalty * (loss_w_G - loss_u_G)
        self.u.step(scale(at_u.tree, penalty))
        self.w.step(add_scaled(upper_at_w.tree, at_w.tree, penalty))
        self.alpha_G = exponentiated_gradient(self.alpha_G, self.gradient_G, self.config.weight_learning_rate)
        self.steps_done += 1
        return float(seen[-1])

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes, but for the positions of the batch streams."""
        twins = {name: {"params": t.params, "optimizer": t.optimizer.state_dict()} for name, t in self._twins()}
        return {**twins, "alpha_G": self.alpha_G, "steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name, twin in self._twins():
            for k, p in twin.params.items():
                p.data.copy_(state[name]["params"][k])
            twin.optimizer.load_state_dict(state[name]["optimizer"])
        self.alpha_G, self.steps_done = state["alpha_G"].cpu(), state["steps_done"]

    def _twins(self) -> tuple[tuple[str, FirstOrderModel], ...]:
        return ("u", self.u), ("w", self.w)


def exponentiated_gradient(alpha_G: Tensor, gradient_G: Tensor, rate: float) -> Tensor:
    """``alpha_d exp(-rate gradient_d)``, brought to sum 1, and mixed with ``FLOOR`` of the uniform weights."""
    moved_G = torch.softmax(alpha_G.log() - rate * gradient_G, dim=0)
    return (1 - FLOOR) * moved_G + FLOOR / len(alpha_G)


class _Sources(Iterator[Batch]):
    """Batches with a part from every source, in their order."""

    def __init__(self, streams: Sequence[BatchStream], pad_id: int) -> None:
        self.streams, self.pad_id = streams, pad_id

    def __next__(self) -> Batch:
        return join_batches([next(stream) for stream in self.streams], self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        return {str(d): stream.state_dict() for d, stream in enumerate(self.streams)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for d, stream in enumerate(self.streams):
            stream.load_state_dict(state[str(d)])


def _encoded(store: TokenStore, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Source of each row as a number, and the names, sorted."""
    names, code_R = np.unique(np.asarray(store.sources(rows), dtype=object).astype(str), return_inverse=True)
    return code_R, names.tolist()
