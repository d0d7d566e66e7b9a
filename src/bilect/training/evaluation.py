"""Held-out loss and perplexity per token, and accuracy on the responses of prompt/response sets."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bilect.data.batch import Batch, make_batch
from bilect.data.loading import length_bucketed
from bilect.data.tokens import TokenStore
from bilect.functional.losses import Head, document_mean, token_losses
from bilect.models.causal_lm import CausalLM
from bilect.runtime import distributed
from bilect.runtime.device import autocast
from bilect.runtime.sharding import has_shards

__all__ = ["Evaluation", "document_losses", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one set.

    Attributes:
        loss: mean cross-entropy per predicted token, nats.
        perplexity: exp(loss).
        accuracy: share of the documents whose whole response is the most likely continuation, token by token; None
            where the set has no prompts. For LAMBADA this is the last-word accuracy.
        documents: number of documents.
        tokens: number of predicted tokens.
    """

    loss: float
    perplexity: float
    accuracy: float | None
    documents: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    store: TokenStore,
    pad_id: int,
    batch_tokens: int = 8192,
    rows: np.ndarray | None = None,
    *,
    bf16: bool = False,
) -> Evaluation:
    """Evaluate a model on documents of a store; of several ranks, all call this and share the batches.

    Args:
        model: a causal LM.
        store: the set; the loss is on the response only where there is a prompt.
        pad_id: padding token.
        batch_tokens: padded tokens per batch.
        rows: documents; None: all.
        bf16: matrix products in bfloat16; losses are float32.
    """
    lm = CausalLM(model)
    rows = np.arange(len(store)) if rows is None else rows

    def sums(part: np.ndarray) -> tuple[float, int, int]:
        batch = make_batch(store.rows(part), pad_id).to(lm.device)

        def work(hidden_BTD: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
            hidden_ND = batch.predicting(hidden_BTD)
            ce_N = token_losses(hidden_ND, head, batch.labels_N).ce_N
            if not store.has_prompts:
                return ce_N, None
            return ce_N, torch.cat([head.logits(h).argmax(dim=-1) for h in hidden_ND.split(1024)])

        with autocast(lm.device, bf16):
            (ce_N, guess_N), right = lm.call(batch.input_ids_BT, work), 0
        if guess_N is not None:
            wrong_B = torch.bincount(batch.document_N, (guess_N != batch.labels_N).double(), batch.n_documents)
            right = int((wrong_B == 0).sum())
        return float(ce_N.double().sum()), batch.n_predicted, right

    parts = list(length_bucketed(store.length_R, rows, batch_tokens))
    found = distributed.spread(sums, parts, in_step=has_shards(model))
    tokens, right = sum(n for _, n, _ in found), sum(n for _, _, n in found)
    loss = sum(total for total, _, _ in found) / max(tokens, 1)
    accuracy = right / len(rows) if store.has_prompts else None
    return Evaluation(loss, math.exp(min(loss, 700.0)), accuracy, len(rows), tokens)


@torch.no_grad()
def document_losses(
    model: PreTrainedModel,
    store: TokenStore,
    rows: np.ndarray,
    pad_id: int,
    batch_tokens: int = 8192,
    *,
    bf16: bool = False,
) -> np.ndarray:
    """Mean cross-entropy of each document, in the order of ``rows``; of a sharded model on all ranks at once.

    ``bf16``: matrix products in bfloat16; losses are float32.
    """
    lm = CausalLM(model)
    parts, found = [*length_bucketed(store.length_R[rows], np.arange(len(rows)), batch_tokens)], list[torch.Tensor]()
    for part in parts:
        batch = make_batch(store.rows(rows[part]), pad_id).to(lm.device)

        def work(hidden_BTD: Tensor, head: Head, batch: Batch = batch) -> Tensor:
            return token_losses(batch.predicting(hidden_BTD), head, batch.labels_N).ce_N

        with autocast(lm.device, bf16):
            loss_N = lm.call(batch.input_ids_BT, work)
        loss_B = document_mean(loss_N, batch.document_N, batch.n_documents)
        found.append(loss_B.double())  # fetched at the end: a GPU goes on while the next batch is made
    losses = np.empty(len(rows))
    if parts:
        losses[np.concatenate(parts)] = torch.cat(found).cpu().numpy()
    return losses
