"""MATES: probe a few documents by training on each, and regress what that did to the upper loss.

    influence_i = f(theta) - f(theta - rate * direction(grad l_i))        score: its prediction by a small model

f is the upper loss on a fixed sample of each upper set, theta the warm proxy, ``direction`` its optimiser's step (see
``_influence``); positive means that training on the document lowers the upper loss. The small model is a score model
with a linear head on the warm proxy's trunk; it learns influences brought to mean 0 and deviation 1, and the scores are
in that unit. Yu et al., arXiv 2406.06046, section 3; its Gumbel top-k is ``selection.temperature``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from scipy.stats import spearmanr
from torch import Tensor

from bilect.data.batch import Batch, Row, make_batch
from bilect.errors import BilectError
from bilect.functional.losses import token_losses
from bilect.functional.trees import Tree, add_scaled
from bilect.functional.weights import standardise
from bilect.methods._influence import Adam, document_gradient, warm_adam
from bilect.methods._resume import resume
from bilect.methods._score_model import ScoreModelMethod
from bilect.methods.contract import Figures, Foresight, MethodConfig, Sizes
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.models.score_model import ScoreModel
from bilect.runtime import distributed
from bilect.runtime.checkpoints import save_parts
from bilect.runtime.device import autocast
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed

__all__ = ["Mates", "MatesConfig", "Probe"]

PROBES_AT_ONCE = 64  # between two meetings of the ranks
LEAST_PROBES, HELD_OUT = 10, 0.1  # the held-out share tells how well the small model predicts


class MatesConfig(MethodConfig):
    """Probing and regression."""

    probes: PositiveInt = Field(1024, ge=LEAST_PROBES, description="documents whose influence is measured")
    upper_documents: PositiveInt = Field(64, description="of each upper set, on which f is measured")
    learning_rate: PositiveFloat = Field(1e-3, description="of the one step on a document: the warm-up's")
    regression_epochs: PositiveInt = Field(5, description="passes of the small model over the probes")
    regression_batch_size: PositiveInt = Field(16, description="documents")
    regression_learning_rate: PositiveFloat = Field(1e-4, description="of AdamW")


class Mates(ScoreModelMethod[MatesConfig]):
    """See the module."""

    name = "mates"
    summary = "a small model regresses the measured influence of probe documents (arXiv 2406.06046)"
    Config = MatesConfig

    def foresee(self, sizes: Sizes) -> Foresight:
        """Each probe's step and what f is after it, then the regression."""
        config = self.config
        probes = min(config.probes, sizes.documents)
        looked_at = [(min(config.upper_documents, documents), length) for documents, length in sizes.upper]
        upper_tokens, tokens = sum(n * length for n, length in looked_at), probes * sizes.length
        upper_length = upper_tokens / max(sum(n for n, _ in looked_at), 1)
        flops = 3 * forward_flops(sizes.proxy, tokens, sizes.length)
        flops += (probes + 1) * forward_flops(sizes.proxy, upper_tokens, upper_length)
        flops += 3 * config.regression_epochs * forward_flops(sizes.score_model(None), tokens, sizes.length)
        return Foresight(tokens + (probes + 1) * upper_tokens, flops, self._foreseen_scoring(sizes))

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        generator = np.random.default_rng(derive_seed(inputs.seed, "mates"))
        rows = generator.permutation(inputs.rows)[: config.probes]
        if len(rows) < LEAST_PROBES:
            raise BilectError(f"mates: {len(rows)} candidates are too few to probe; it takes {LEAST_PROBES}")
        upper, upper_tokens = list[tuple[float, Batch]](), 0.0
        for _, weight, store in inputs.upper:
            some = generator.permutation(len(store))[: config.upper_documents]
            upper.append((weight, make_batch(store.rows(some), inputs.pad_id).to(inputs.device)))
            upper_tokens += float(store.length_R[some].sum())
        model = inputs.load(inputs.proxy)
        probe = Probe(CausalLM(model), warm_adam(inputs.proxy, model), upper, config.learning_rate, inputs.pad_id)
        path = inputs.scratch / "probes.pt"
        resume(path, {"probe": probe}, inputs.device)
        task.advance(len(probe.influence))
        at_once = math.gcd(inputs.checkpoint_every, PROBES_AT_ONCE)
        for first in range(len(probe.influence), len(rows), at_once):
            some = rows[first : first + at_once].tolist()
            probe.influence += distributed.spread(lambda row: probe.measure(inputs.pool.row(row)), some)
            if len(probe.influence) % inputs.checkpoint_every == 0:
                save_parts(path, {"probe": probe})
            task.advance(len(some))
        save_parts(path, {"probe": probe})
        value_R = standardise(torch.tensor(probe.influence, dtype=torch.float64)).float()
        held_out = max(round(HELD_OUT * len(rows)), 2)
        head = torch.Generator().manual_seed(derive_seed(inputs.seed, "score head"))
        self.score_model = ScoreModel.from_causal_lm(model, head, "linear").eval()
        self._regress(rows[held_out:], value_R[held_out:].to(inputs.device), generator)
        predicted_R = self.score(inputs.pool, rows[:held_out])
        tokens, length = float(inputs.pool.length_R[rows].sum()), float(inputs.pool.length_R[rows].mean())
        proxy_flops = 3 * forward_flops(model, tokens, length)
        proxy_flops += (len(rows) + 1) * forward_flops(
            model, upper_tokens, upper_tokens / sum(b.n_documents for _, b in upper)
        )
        flops = proxy_flops + 3 * config.regression_epochs * forward_flops(self.score_model, tokens, length)
        return {"flops": flops, "held_out_correlation": _spearman(predicted_R, value_R[:held_out].numpy())}

    def _regress(self, rows: np.ndarray, value_R: Tensor, generator: np.random.Generator) -> None:
        """Least squares of the score model on the influences."""
        inputs, config = self.inputs, self.config
        optimizer = torch.optim.AdamW(self.score_model.parameters(), lr=config.regression_learning_rate)
        for _ in range(config.regression_epochs):
            order = generator.permutation(len(rows))
            for first in range(0, len(order), config.regression_batch_size):
                some = order[first : first + config.regression_batch_size]
                batch = make_batch(inputs.pool.rows(rows[some]), inputs.pad_id).to(inputs.device)
                with autocast(inputs.device, inputs.bf16):
                    score_B = self.score_model(batch.input_ids_BT, batch.mask_BT).scores
                torch.nn.functional.mse_loss(score_B.float(), value_R[some]).backward()
                torch.nn.utils.clip_grad_norm_(self.score_model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


class Probe:
    """Measures influences, one document after the other, always from the same model.

    Args:
        lm: theta.
        adam: its optimiser.
        upper: weight and batch of each upper set; f is the weighted mean of their losses per predicted token.
        learning_rate: of the step on a document.
        pad_id: padding token.

    Attributes:
        influence: of the documents so far.
    """

    def __init__(
        self, lm: CausalLM, adam: Adam, upper: Sequence[tuple[float, Batch]], learning_rate: float, pad_id: int
    ) -> None:
        self.lm, self.adam, self.upper, self.learning_rate, self.pad_id = lm, adam, upper, learning_rate, pad_id
        self.params: Tree = {k: p.detach() for k, p in lm.params().items()}
        self.before = self._upper_loss(self.params)
        self.influence: list[float] = []

    def measure(self, document: Row) -> float:
        """What one step on a document from the warm model takes off f."""
        gradient = document_gradient(self.lm, document, self.pad_id, list(self.params))
        after = add_scaled(self.params, self.adam.direction(gradient), -self.learning_rate)
        return self.before - self._upper_loss(after)

    def state_dict(self) -> dict[str, Any]:
        """The influences; all else is given."""
        return {"influence": self.influence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.influence = list(state["influence"])

    @torch.no_grad()
    def _upper_loss(self, params: Tree) -> float:
        total = 0.0
        for weight, batch in self.upper:
            hidden_ND = batch.predicting(self.lm.hidden(batch.input_ids_BT, params))
            ce_N = token_losses(hidden_ND, self.lm.head(params), batch.labels_N).ce_N
            total += weight * float(ce_N.double().mean())
        return total / sum(weight for weight, _ in self.upper)


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else None
