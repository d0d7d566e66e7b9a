"""Batches as transformers takes them, and the quantities of BLADE the long way round: full logits, plain loops."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import tiny_lm

Batch = dict[str, Tensor]


def make_batch(seed: int, lengths: Sequence[int] = (8, 12, 12), given: int = 1, width: int | None = None) -> Batch:
    """Padded on the right, prompts and padding not learned."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) if width is None else width
    ids_BT = torch.randint(1, 64, (len(lengths), width), generator=generator)
    mask_BT = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    labels_BT = torch.where(mask_BT.bool() & (torch.arange(width)[None] >= given), ids_BT, -100)
    return {"input_ids": ids_BT * mask_BT, "labels": labels_BT, "attention_mask": mask_BT}


def plain_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each label (B, T), NaN where there is none; the first position predicts nothing before it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels_BT = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=-100)
    loss_BT = torch.where(labels_BT != -100, loss.view_as(labels_BT), torch.nan)
    return torch.cat([torch.full((len(loss_BT), 1), torch.nan, dtype=loss.dtype), loss_BT], dim=1)


def best(value_BT: Tensor, k: int) -> Tensor:
    """Mask of the k largest that are not NaN."""
    flat = value_BT.flatten().nan_to_num(nan=-torch.inf)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:k]] = True
    return mask.view_as(value_BT)


def masked_mean(loss_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return loss_BT[mask_BT].mean()


def learned(batch: Batch) -> Tensor:
    mask_BT = batch["labels"] != -100
    mask_BT[:, 0] = False
    return mask_BT


def plain_reference(
    model: nn.Module,
    uppers: Sequence[Batch],
    lowers: Sequence[tuple[Batch, Tensor]],
    *,
    lr: float,
    penalty: float = 1.0,
) -> nn.Module:
    """One AdamW step on ``L_val + penalty * L_tr`` for every pair; no upper batches: the matched twin."""
    w = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(w.parameters(), lr=lr, weight_decay=0.0)
    for i, (lower, mask_BT) in enumerate(lowers):
        loss = penalty * masked_mean(plain_losses(w, lower), mask_BT)
        if uppers:
            loss = loss + masked_mean(plain_losses(w, uppers[i]), learned(uppers[i]))
        loss.backward()
        nn.utils.clip_grad_norm_(w.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return w


def train(model: nn.Module, selector: Any, batches: Sequence[Batch], lr: float = 1e-2) -> list[float]:
    """The three lines of the documentation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for batch in batches:
        loss = selector.loss(model, batch)
        loss.backward()
        optimizer.step()
        selector.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


def small(kind: str = "llama", **more: Any) -> Any:
    return tiny_lm(kind, layers=1, **more)
