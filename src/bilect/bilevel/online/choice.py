"""From excess losses to the tokens that are trained on, over all ranks."""

from typing import Literal

import torch
from torch import Tensor

from bilect.bilevel.online.token_loss import TokenBatch
from bilect.functional.frank_wolfe import kept_count, linear_minimiser
from bilect.functional.losses import document_mean
from bilect.runtime import distributed

__all__ = ["Granularity", "Scope", "choose", "spread", "token_mean"]

Granularity = Literal["token", "sequence"]
Scope = Literal["global", "local"]


def spread(delta_N: Tensor, tokens: TokenBatch) -> Tensor:
    """The mean excess loss of its sequence at every token."""
    return document_mean(delta_N, tokens.row_N, tokens.shape[0])[tokens.row_N]


def choose(delta_N: Tensor, tokens: TokenBatch, keep_ratio: float, granularity: Granularity, scope: Scope) -> Tensor:
    """Mask (N,) of the ``ceil(keep_ratio n)`` largest Delta; ties go to the lower rank, then the earlier position.

    Args:
        delta_N: of this rank's learned tokens, equal within a sequence where sequences are chosen.
        tokens: the batch; sequences without learned tokens are not counted.
        keep_ratio: in (0, 1].
        granularity: what n counts.
        scope: the largest over the batches of all ranks, or over this rank's.
    """
    value_S = delta_N
    if granularity == "sequence":
        rows_S, count_S = torch.unique_consecutive(tokens.row_N, return_counts=True)
        value_S = delta_N[torch.cumsum(count_S, 0) - count_S]  # at the first learned token of each
    value_M, own = distributed.gather_rows(value_S) if scope == "global" else (value_S, slice(None))
    mask_S = linear_minimiser(-value_M, kept_count(len(value_M), keep_ratio))[own].bool()
    if granularity == "token":
        return mask_S
    mask_B = torch.zeros(tokens.shape[0], dtype=torch.bool, device=delta_N.device)
    mask_B[rows_S] = mask_S
    return mask_B[tokens.row_N]


def token_mean(mask_N: Tensor, scope: Scope = "global") -> Tensor:
    """Weights a_n that make ``sum_n a_n l_n``, *averaged* over the ranks, the mean over the masked tokens of all ranks.

    Gradients are averaged over ranks by DDP and FSDP2; so a_n is the number of ranks over the number of masked tokens.
    With scope "local" the rank's own mean.
    """
    if scope == "local":
        return mask_N.double() / mask_N.sum().clamp(min=1)
    count = distributed.sum_tree({"": mask_N.sum().double()})[""]  # no number: for that a GPU is waited for
    return mask_N.double() * (distributed.world_size() / count.clamp(min=1))
