"""Objectives of the two levels on a batch, over all ranks: gradients, Hessian products, document losses.

    g(theta) = sum_i P_i l_i(theta) + kl_coef * mean_n KL_n + l2_coef ||theta||^2      (lower)
    f(theta) = sum_k w_k mean_{n in k} ce_n                                            (upper)

over the upper sets k, with weights w that sum to 1; a single set is the plain mean over its predicted tokens.
Both are weighted sums over predicted tokens with constant weights, so one class serves. Sums run over the documents of
all ranks: each rank holds its part of the batch, and every gradient is a sum over ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilect.bilevel.ghost import directional_ghost
from bilect.data.batch import Batch
from bilect.functional.directional import (
    directional_finite_difference,
    directional_jvp,
    hvp_exact,
    hvp_finite_difference,
    hvp_forward_difference,
)
from bilect.functional.losses import (
    Head,
    HeldDistribution,
    KLDirection,
    document_mean,
    token_losses,
    weighted_token_loss,
)
from bilect.functional.trees import Tree, TreeMap, add_scaled
from bilect.models.causal_lm import CausalLM
from bilect.runtime import distributed
from bilect.runtime.device import autocast
from bilect.runtime.sharding import has_shards

__all__ = [
    "Gradient",
    "Objective",
    "TargetOnBatch",
    "directional",
    "document_losses",
    "lower_objective",
    "target_on_batch",
    "upper_objective",
]

HVP = Literal["exact", "finite_difference", "forward_difference"]

HELD_BYTES = 4 << 30  # largest distribution of the target that is held for a batch; 16 x 1024 x 50304 takes 3.3e9


@dataclass(frozen=True)
class TargetOnBatch:
    """The target model's outlook on a batch, from its one forward pass: hidden states, and its head.

    Logits follow chunk by chunk; held whole they would cost V/E times the memory. Where many gradients on the batch
    follow, as in Hessian products, that is well spent: see ``hold``.
    """

    hidden_NE: Tensor
    head: Head
    held: HeldDistribution | None = None

    def hold(self, dtype: torch.dtype) -> "TargetOnBatch":
        """The same with the distribution itself, unless it is larger than ``HELD_BYTES``."""
        size = self.hidden_NE.shape[0] * self.head.weight_VD.shape[0] * dtype.itemsize
        if size > HELD_BYTES:
            return self
        return replace(self, held=HeldDistribution.of(self.hidden_NE, self.head, dtype))


class Gradient(NamedTuple):
    """A gradient and the parts of the loss, summed over the ranks; tensors: for a float the host waits for a GPU.

    Attributes:
        tree: gradient by parameter.
        ce: weighted cross-entropy, a scalar in float64.
        kl: weighted divergence, the same.
        ce_S: the part of ``ce`` in each upper set, (S,); (0,) for a single one.
    """

    tree: Tree
    ce: Tensor
    kl: Tensor
    ce_S: Tensor


@dataclass(frozen=True)
class Objective:
    """``sum_n a_n ce_n + b_n kl_n + l2 ||theta||^2`` on one batch.

    Attributes:
        model: the proxy.
        batch: this rank's documents.
        ce_weight_N: a.
        kl_weight_N: b, or None.
        target: needed with b.
        l2_coef: of the global objective (added once, not once per rank).
        direction: of the divergence.
        n_sets: upper sets in the batch.
    """

    model: CausalLM
    batch: Batch
    ce_weight_N: Tensor
    kl_weight_N: Tensor | None = None
    target: TargetOnBatch | None = None
    l2_coef: float = 0.0
    direction: KLDirection = "target_to_proxy"
    n_sets: int = 1

    def gradient(self, params: Tree, bf16: bool = False) -> Gradient:
        """Gradient and loss over all ranks.

        Args:
            params: theta.
            bf16: matrix products in bfloat16.
        """
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        with torch.enable_grad(), autocast(self.batch.input_ids_BT.device, bf16):
            hidden_ND = self.batch.predicting(self.model.hidden(self.batch.input_ids_BT, leaves))
            loss, tokens = weighted_token_loss(
                hidden_ND,
                self.model.head(leaves),
                self.batch.labels_N,
                self.ce_weight_N,
                kl_weight_N=self.kl_weight_N,
                target_hidden_NE=None if self.target is None else self.target.hidden_NE,
                target_head=None if self.target is None else self.target.head,
                held=None if self.target is None else self.target.held,
                direction=self.direction,
            )
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        total = distributed.sum_tree(dict(zip(leaves, gradients, strict=True)))
        if self.l2_coef:
            total = add_scaled(total, params, 2 * self.l2_coef)
        weighted_N = self.ce_weight_N * tokens.ce_N.to(self.ce_weight_N.dtype)
        kl = weighted_N.new_zeros(())
        if self.kl_weight_N is not None and tokens.kl_N is not None:
            kl = torch.dot(self.kl_weight_N, tokens.kl_N.to(self.kl_weight_N.dtype))
        parts = torch.cat([torch.stack([weighted_N.sum(), kl]), self._by_set(weighted_N)])
        parts = distributed.sum_tree({"": parts})[""]
        return Gradient(total, parts[0], parts[1], parts[2:])

    def _by_set(self, weighted_N: Tensor) -> Tensor:
        if self.batch.set_B is None or self.n_sets == 1:
            return weighted_N.new_zeros(0)
        return weighted_N.new_zeros(self.n_sets).index_add(0, self.batch.set_B[self.batch.document_N], weighted_N)

    def hvp(self, params: Tree, method: HVP) -> TreeMap:
        """``v -> H v`` at theta, summed over the ranks; float32 or better throughout."""
        params = {k: v.detach() for k, v in params.items()}
        if method != "exact":
            differences = hvp_finite_difference if method == "finite_difference" else hvp_forward_difference
            return differences(lambda p: self.gradient(p)[0], params)
        local = hvp_exact(self._loss, params)

        def product(v: Tree) -> Tree:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivatives
                total = distributed.sum_tree(local(v))
            return add_scaled(total, v, 2 * self.l2_coef) if self.l2_coef else total

        return product

    def _loss(self, params: Tree) -> Tensor:
        """This rank's part without l2, differentiable to any order."""
        tokens = token_losses(
            self.batch.predicting(self.model.hidden(self.batch.input_ids_BT, params)),
            self.model.head(params),
            self.batch.labels_N,
            target_hidden_NE=None if self.target is None else self.target.hidden_NE,
            target_head=None if self.target is None else self.target.head,
            direction=self.direction,
        )
        loss = torch.dot(self.ce_weight_N.to(tokens.ce_N.dtype), tokens.ce_N)
        if self.kl_weight_N is not None and tokens.kl_N is not None:
            loss = loss + torch.dot(self.kl_weight_N.to(tokens.kl_N.dtype), tokens.kl_N)
        return loss


def target_on_batch(
    target: CausalLM, batch: Batch, bf16: bool = False, micro_batch: int | None = None
) -> TargetOnBatch:
    """The one forward pass of the target model over a batch, by so many documents at a time (None: all).

    The target may be sharded over the ranks (FSDP2), which then call this together.
    """
    parts, heads, sharded = list[Tensor](), list[Head](), has_shards(target.model)

    def outlook(hidden_BTE: Tensor, head: Head) -> Tensor:
        if not heads:
            weights = (head.weight_VD.detach(), None if head.bias_V is None else head.bias_V.detach())
            if sharded:  # gathered for this call alone
                weights = (weights[0].clone(), None if weights[1] is None else weights[1].clone())
            heads.append(Head(*weights, head.scale, head.softcap))
        return hidden_BTE.bfloat16() if bf16 else hidden_BTE  # normalisation layers hand on float32

    pieces = batch.input_ids_BT.split(micro_batch or batch.n_documents)
    calls = max(distributed.gather_objects(len(pieces))) if sharded else len(pieces)
    with torch.no_grad(), autocast(batch.input_ids_BT.device, bf16):
        for number in range(calls):  # all ranks as often; those with fewer documents repeat the last
            hidden_BTE = target.call(pieces[min(number, len(pieces) - 1)], outlook)
            parts += [hidden_BTE] if number < len(pieces) else []
    hidden_NE, (head,) = batch.predicting(torch.cat(parts)), heads
    if hidden_NE.dtype != head.weight_VD.dtype:
        bias = None if head.bias_V is None else head.bias_V.to(hidden_NE.dtype)
        head = Head(head.weight_VD.to(hidden_NE.dtype), bias, head.scale, head.softcap)
    return TargetOnBatch(hidden_NE, head)


def lower_objective(
    model: CausalLM,
    batch: Batch,
    weight_B: Tensor,
    *,
    target: TargetOnBatch | None = None,
    kl_coef: float = 0.0,
    l2_coef: float = 0.0,
    direction: KLDirection = "target_to_proxy",
) -> Objective:
    """g on a batch with the weights held fixed. The divergence is a mean over the global batch's predicted tokens.

    Args:
        model: the proxy.
        batch: this rank's documents.
        weight_B: P of this rank's documents (summing to 1 over all ranks).
        target: see ``target_on_batch``; None for no divergence.
        kl_coef: weight of the divergence.
        l2_coef: weight of ``||theta||^2``.
        direction: of the divergence.
    """
    kl_weight_N = None
    if target is not None and kl_coef:
        n_global = distributed.sum_scalar(batch.n_predicted)
        kl_weight_N = torch.full_like(batch.labels_N, 0, dtype=torch.float64) + kl_coef / max(n_global, 1.0)
    return Objective(
        model,
        batch,
        batch.token_mean_weight_N(weight_B),
        kl_weight_N,
        target if kl_weight_N is not None else None,
        l2_coef,
        direction,
    )


def upper_objective(model: CausalLM, batch: Batch, weight_S: Sequence[float] = (1.0,)) -> Objective:
    """f on a batch, over all ranks.

    Args:
        model: the proxy.
        batch: documents of the upper sets.
        weight_S: weight of each set's mean loss; brought to sum 1.
    """
    set_B = torch.zeros_like(batch.length_B) if batch.set_B is None else batch.set_B
    set_N = set_B[batch.document_N]
    count_S = torch.zeros(len(weight_S), dtype=torch.float64, device=set_N.device)
    count_S = count_S.index_add(0, set_N, torch.ones_like(set_N, dtype=torch.float64))
    count_S = distributed.sum_tree({"": count_S})[""].clamp(min=1)
    share_S = torch.tensor([weight / sum(weight_S) for weight in weight_S], dtype=torch.float64)
    ce_weight_N = (_sent(share_S, set_N.device) / count_S)[set_N]
    return Objective(model, batch, ce_weight_N, n_sets=len(weight_S))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what the device still has to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def document_losses(model: CausalLM, batch: Batch) -> Callable[[Tree], Tensor]:
    """``theta -> l_B``: mean cross-entropy of each of this rank's documents, differentiable to any order."""

    def losses(params: Tree) -> Tensor:
        hidden_ND = batch.predicting(model.hidden(batch.input_ids_BT, params))
        ce_N = token_losses(hidden_ND, model.head(params), batch.labels_N).ce_N
        return document_mean(ce_N, batch.document_N, batch.n_documents)

    return losses


def directional(
    model: CausalLM, batch: Batch, params: Tree, z: Tree, method: Literal["jvp", "finite_difference", "ghost"]
) -> Tensor:
    """``d_i = < grad l_i(theta), z >`` of each of this rank's documents.

    Args:
        model: the proxy.
        batch: documents.
        params: theta; for "ghost" the model's own.
        z: direction.
        method: forward mode, central differences, or one backward pass.
    """
    if method == "ghost":
        return directional_ghost(model, batch, z)
    losses = document_losses(model, batch)
    if method == "finite_difference":
        return directional_finite_difference(losses, params, z)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        return directional_jvp(losses, params, z)
