"""A batch of documents, padded on the right, with the predicted tokens listed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["IGNORE", "Batch", "Row", "join_batches", "make_batch"]

# token ids, and what of them is given, not learned: the number of leading tokens (a prompt; the first token of a
# document is never predicted), or, where there is more between learned spans, (T,) booleans: True at learned tokens
Row = tuple[Tensor, int | Tensor]

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """B documents of at most T tokens.

    Attributes:
        input_ids_BT: tokens, padded on the right.
        target_BT: the token each position predicts (the next one), ``IGNORE`` where there is none to learn: at
            padding, at a document's last token and within prompts.
        length_B: real tokens of each document.
        set_B: upper set of each document, where there are several.
        where: row and column of each predicted token, in their order; found where not given, for which a GPU is
            waited for: batches are made on the host and take theirs along.
    """

    input_ids_BT: Tensor
    target_BT: Tensor
    length_B: Tensor
    set_B: Tensor | None = None
    where: tuple[Tensor, Tensor] = None  # type: ignore[assignment]  # never None behind __post_init__

    def __post_init__(self) -> None:
        if self.where is None:
            row_N, column_N = torch.nonzero(self.target_BT != IGNORE, as_tuple=True)
            object.__setattr__(self, "where", (row_N, column_N))
        _ = self.labels_N  # not on first use: inside a functional transform, whose tensors must not outlive it

    @property
    def n_documents(self) -> int:
        """B."""
        return int(self.input_ids_BT.shape[0])

    @cached_property
    def mask_BT(self) -> Tensor:
        """1 at real tokens."""
        positions_T = torch.arange(self.input_ids_BT.shape[1], device=self.length_B.device)
        return (positions_T[None] < self.length_B[:, None]).long()

    @property
    def document_N(self) -> Tensor:
        """Document of each predicted token."""
        return self.where[0]

    @cached_property
    def labels_N(self) -> Tensor:
        """The predicted tokens."""
        return self.target_BT[self.where]

    @property
    def n_predicted(self) -> int:
        """N."""
        return int(self.labels_N.shape[0])

    @cached_property
    def predicted_B(self) -> Tensor:
        """Predicted tokens of each document."""
        return (self.target_BT != IGNORE).sum(dim=1)

    def predicting(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states at the positions that predict a token, (N, D)."""
        return hidden_BTD[self.where]

    def token_mean_weight_N(self, weight_B: Tensor | None = None) -> Tensor:
        """Weights a_n with ``sum_n a_n ce_n = sum_i weight_i l_i``; weight 1 for every document by default."""
        inverse_B = 1.0 / self.predicted_B.clamp(min=1).double()
        if weight_B is not None:
            inverse_B = inverse_B * weight_B.double()
        return inverse_B[self.document_N]

    def rows(self, part: slice) -> "Batch":
        """Some of the documents."""
        sets = None if self.set_B is None else self.set_B[part]
        return Batch(self.input_ids_BT[part], self.target_BT[part], self.length_B[part], sets)

    def to(self, device: torch.device) -> "Batch":
        """The same batch elsewhere; the host does not wait until it is there."""

        def moved(x: Tensor) -> Tensor:
            pinned = device.type == "cuda" and x.device.type == "cpu"
            return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)

        if device == self.input_ids_BT.device:
            return self
        sets = None if self.set_B is None else moved(self.set_B)
        where = moved(self.where[0]), moved(self.where[1])
        return Batch(moved(self.input_ids_BT), moved(self.target_BT), moved(self.length_B), sets, where)


def make_batch(documents: Sequence[Row], pad_id: int, multiple: int = 8) -> Batch:
    """Pad documents on the right to a common length.

    Args:
        documents: token ids of each, and what of them is given.
        pad_id: fills the rest.
        multiple: T is rounded up to it.
    """
    length_B = torch.tensor([len(ids) for ids, _ in documents])
    width = -(-int(length_B.max()) // multiple) * multiple
    input_ids_BT = torch.full((len(documents), width), pad_id, dtype=torch.long)
    target_BT = torch.full_like(input_ids_BT, IGNORE)
    for row, (ids, given) in enumerate(documents):
        input_ids_BT[row, : len(ids)] = ids
        if isinstance(given, Tensor):
            target_BT[row, : len(ids) - 1] = torch.where(given[1:], ids[1:], IGNORE)
            continue
        first = max(given, 1)
        target_BT[row, first - 1 : len(ids) - 1] = ids[first:]
    return Batch(input_ids_BT, target_BT, length_B)


def join_batches(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Batches of several upper sets as one; ``set_B`` says which document is of which.

    Args:
        batches: one per set, in order.
        pad_id: fills the rest of shorter ones.
    """
    width = max(b.input_ids_BT.shape[1] for b in batches)

    def widened(x_BT: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(x_BT, (0, width - x_BT.shape[1]), value=fill)

    sets = [torch.full_like(b.length_B, number) for number, b in enumerate(batches)]
    return Batch(
        torch.cat([widened(b.input_ids_BT, pad_id) for b in batches]),
        torch.cat([widened(b.target_BT, IGNORE) for b in batches]),
        torch.cat([b.length_B for b in batches]),
        torch.cat(sets),
    )
