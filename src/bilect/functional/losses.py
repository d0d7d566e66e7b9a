"""Token losses from hidden states: cross-entropy, and the divergence from the target model.

Logits are never held for a whole batch: every function works on chunks of predicted tokens, from the hidden
states and the output head. Rows are the N *predicted* tokens only, so prompts and padding cost nothing.

* cross-entropy      ``ce_n = -log p_n[y_n]``
* forward divergence ``kl_n = sum_v q_nv (log q_nv - log p_nv)``  (the released BLISS code; our default)
* reverse divergence ``kl_n = sum_v p_nv (log p_nv - log q_nv)``  (as printed in the paper, section 3)

with p the model's distribution and q the target model's. BLISS, arXiv 2510.06048.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Head",
    "HeldDistribution",
    "KLDirection",
    "TokenLosses",
    "document_mean",
    "token_losses",
    "weighted_token_loss",
]

KLDirection = Literal["target_to_proxy", "proxy_to_target"]

# Logits of one chunk: on CPUs small enough for the caches, on GPUs large enough to keep the device busy.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
LEAST_ROWS = 128
# Where the head itself outgrows a CPU's caches: each chunk reads it and adds to all of its gradient, which with 128
# tokens costs as much as the products (V = 49152, D = 576, bfloat16: 1.0 s for 1,024 tokens, 0.55 s with 512).
LEAST_ROWS_LARGE_HEAD = 512


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: ``cap * tanh(scale * (h W' + b) / cap)``, without cap where None.

    Attributes:
        weight_VD: output embedding.
        bias_V: or None.
        scale: multiplier of the logits (Cohere, Granite); 1 elsewhere.
        softcap: bound of the logits (Gemma); None elsewhere.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits (N, V) in at least float32."""
        return self.transform(torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V))

    def transform(self, raw_NV: Tensor) -> Tensor:
        """What follows ``h W' + b``."""
        logits_NV = raw_NV if raw_NV.dtype == torch.float64 else raw_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def _chain(self, grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Gradient with respect to ``h W' + b`` from the gradient with respect to the logits."""
        if self.softcap is not None:
            grad_NV = grad_NV * (1 - (logits_NV / self.softcap) ** 2)
        return grad_NV * self.scale if self.scale != 1.0 else grad_NV


@dataclass(frozen=True)
class HeldDistribution:
    """The target's distribution itself, for several gradients on one batch; N V numbers.

    Attributes:
        probability_NV: q.
        negentropy_N: ``sum_v q_v log q_v``.
    """

    probability_NV: Tensor
    negentropy_N: Tensor

    @staticmethod
    @torch.no_grad()
    def of(hidden_NE: Tensor, head: Head, dtype: torch.dtype = torch.float32) -> "HeldDistribution":
        """From hidden states and the output head.

        Args:
            hidden_NE: hidden states at the positions that predict a token.
            head: output head.
            dtype: of the result, the dtype of the losses it is used with.
        """
        n_tokens, vocabulary = hidden_NE.shape[0], head.weight_VD.shape[0]
        probability_NV = torch.empty(n_tokens, vocabulary, dtype=dtype, device=hidden_NE.device)
        negentropy_N = torch.empty(n_tokens, dtype=dtype, device=hidden_NE.device)
        rows = _chunk_rows(head.weight_VD)
        for start in range(0, n_tokens, rows):
            part = slice(start, start + rows)
            logq = torch.log_softmax(head.logits(hidden_NE[part]).to(dtype), dim=-1)
            q = torch.exp(logq, out=probability_NV[part])
            negentropy_N[part] = torch.linalg.vecdot(q, logq)
        return HeldDistribution(probability_NV, negentropy_N)


@dataclass(frozen=True)
class TokenLosses:
    """Per-token losses: ``ce_N`` and, when a target was given, ``kl_N`` (nats)."""

    ce_N: Tensor
    kl_N: Tensor | None = None


def _chunk_rows(weight_VD: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(weight_VD.device.type, 1 << 24)
    large = weight_VD.device.type == "cpu" and weight_VD.numel() > elements
    return max(LEAST_ROWS_LARGE_HEAD if large else LEAST_ROWS, elements // weight_VD.shape[0])


def _losses(
    logits_NV: Tensor, labels_N: Tensor, target_logits_NV: Tensor | None, direction: KLDirection
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    ce_N = -logp_NV.gather(1, labels_N[:, None])[:, 0]
    if target_logits_NV is None:
        return ce_N, None, logp_NV, None
    logq_NV = torch.log_softmax(target_logits_NV.to(logp_NV.dtype), dim=-1)
    if direction == "target_to_proxy":
        kl_N = torch.sum(logq_NV.exp() * (logq_NV - logp_NV), dim=-1)
    else:
        kl_N = torch.sum(logp_NV.exp() * (logp_NV - logq_NV), dim=-1)
    return ce_N, kl_N, logp_NV, logq_NV


def token_losses(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    target_hidden_NE: Tensor | None = None,
    target_head: Head | None = None,
    direction: KLDirection = "target_to_proxy",
) -> TokenLosses:
    """Per-token cross-entropy and divergence, differentiable to any order and in forward mode.

    Args:
        hidden_ND: hidden states at the positions that predict a token.
        head: output head of the model.
        labels_N: the predicted tokens.
        target_hidden_NE: hidden states of the target model at the same positions, or None for no divergence.
        target_head: output head of the target model (held constant).
        direction: of the divergence, see the module.
    """
    ce, kl = [], []
    rows = _chunk_rows(head.weight_VD)
    for start in range(0, hidden_ND.shape[0], rows):
        part = slice(start, start + rows)
        target = None
        if target_hidden_NE is not None and target_head is not None:
            with torch.no_grad():
                target = target_head.logits(target_hidden_NE[part])
        ce_n, kl_n, _, _ = _losses(head.logits(hidden_ND[part]), labels_N[part], target, direction)
        ce.append(ce_n)
        if kl_n is not None:
            kl.append(kl_n)
    if not ce:
        empty = hidden_ND.sum(dim=-1)
        return TokenLosses(empty, None if target_hidden_NE is None else empty)
    return TokenLosses(torch.cat(ce), torch.cat(kl) if kl else None)


class _WeightedLoss(torch.autograd.Function):
    """``sum_n a_n ce_n + b_n kl_n`` with its gradient computed in the forward pass, chunk by chunk.

    d/dlogits of ce is ``p - onehot(y)``; of the forward divergence ``p - q``;
    of the reverse divergence ``p (log p - log q - kl)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        labels_N: Tensor,
        ce_weight_N: Tensor,
        kl_weight_N: Tensor | None,
        target_hidden_NE: Tensor | None,
        target_head: Head | None,
        held: HeldDistribution | None,
        direction: KLDirection,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_tokens = hidden_ND.shape[0]
        acc = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        ce_N = torch.zeros(n_tokens, dtype=acc, device=hidden_ND.device)
        kl_N = torch.zeros_like(ce_N)
        need_weight = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=acc) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=acc) if bias_V is not None and ctx.needs_input_grad[2] else None
        rows = _chunk_rows(weight_VD)
        for start in range(0, n_tokens, rows):
            part = slice(start, start + rows)
            h, y = hidden_ND[part], labels_N[part]
            logits = head.logits(h)
            # in place from here on: the chunk's log-probabilities become its gradient
            logp = torch.log_softmax(logits, dim=-1)
            ce_N[part] = -logp.gather(1, y[:, None])[:, 0]
            a = ce_weight_N[part].to(acc)
            if target_hidden_NE is None or target_head is None or kl_weight_N is None:
                grad = logp.exp_().mul_(a[:, None])
            elif held is not None and direction == "target_to_proxy":
                b = kl_weight_N[part].to(acc)
                q = held.probability_NV[part]
                kl_N[part] = held.negentropy_N[part] - torch.linalg.vecdot(q, logp)
                grad = logp.exp_().mul_((a + b)[:, None]).addcmul_(q, b[:, None], value=-1)
            else:
                b = kl_weight_N[part].to(acc)
                target = target_head.logits(target_hidden_NE[part])
                logq = torch.log_softmax(target.to(acc), dim=-1)
                if direction == "target_to_proxy":
                    q = logq.exp()
                    kl_N[part] = torch.linalg.vecdot(q, logq.sub_(logp))
                    grad = logp.exp_().mul_((a + b)[:, None]).sub_(q.mul_(b[:, None]))
                else:
                    p = logp.exp()
                    difference = logp.sub_(logq)
                    kl_n = torch.linalg.vecdot(p, difference)
                    kl_N[part] = kl_n
                    grad = p.mul_(difference.sub_(kl_n[:, None]).mul_(b[:, None]).add_(a[:, None]))
            grad.scatter_add_(1, y[:, None], -a[:, None])
            grad = head._chain(grad, logits).to(weight_VD.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight_VD
            if grad_weight is not None:
                if grad_weight.dtype == grad.dtype:
                    grad_weight.addmm_(grad.T, h)
                else:
                    grad_weight += grad.T @ h
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        loss = torch.dot(ce_weight_N.to(acc), ce_N)
        if kl_weight_N is not None and target_hidden_NE is not None:
            loss = loss + torch.dot(kl_weight_N.to(acc), kl_N)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(ce_N, kl_N)
        return loss, ce_N, kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_loss for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None, None, None)


def weighted_token_loss(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    ce_weight_N: Tensor,
    *,
    kl_weight_N: Tensor | None = None,
    target_hidden_NE: Tensor | None = None,
    target_head: Head | None = None,
    held: HeldDistribution | None = None,
    direction: KLDirection = "target_to_proxy",
) -> tuple[Tensor, TokenLosses]:
    """``sum_n a_n ce_n + b_n kl_n``, first order only, without ever holding more than one chunk of logits.

    The weights are constants known beforehand, so the gradient is made in the same sweep as the loss: three
    products with the head per chunk, as in plain training, and no logits kept for the backward pass.

    Args:
        hidden_ND: hidden states at the positions that predict a token.
        head: output head of the model.
        labels_N: the predicted tokens.
        ce_weight_N: a, constant.
        kl_weight_N: b, constant; None for no divergence.
        target_hidden_NE: hidden states of the target model at the same positions.
        target_head: output head of the target model.
        held: the distribution these two give, where it is held: the forward divergence then needs no product with
            the target's head, which is the largest one here.
        direction: of the divergence, see the module.

    Returns:
        The loss (differentiable in ``hidden_ND`` and the head's parameters) and the per-token losses (constants).
    """
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND = hidden_ND.to(dtype)
        head = Head(
            head.weight_VD.to(dtype), None if head.bias_V is None else head.bias_V.to(dtype), head.scale, head.softcap
        )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss, ce_N, kl_N = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
            hidden_ND,
            head.weight_VD,
            head.bias_V,
            head,
            labels_N,
            ce_weight_N,
            kl_weight_N,
            target_hidden_NE,
            target_head,
            held,
            direction,
        )
    return loss, TokenLosses(ce_N, kl_N if target_hidden_NE is not None else None)


def document_mean(loss_N: Tensor, document_N: Tensor, n_documents: int) -> Tensor:
    """Mean over the predicted tokens of each document: ``l_i = (1/n_i) sum_{n in i} loss_n``; 0 where n_i = 0.

    Args:
        loss_N: per-token values.
        document_N: index of the document each token belongs to, in [0, n_documents).
        n_documents: B.

    Returns:
        Tensor of shape (B,).
    """
    # not bincount: it makes the host wait for a GPU
    zero_B = torch.zeros(n_documents, dtype=document_N.dtype, device=loss_N.device)
    count_B = zero_B.index_add(0, document_N, torch.ones_like(document_N)).clamp(min=1)
    return zero_B.to(loss_N.dtype).index_add(0, document_N, loss_N) / count_B.to(loss_N.dtype)
