"""From token rows to batches: endless shuffled documents, length buckets, and packed windows for training."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bilect.data.batch import IGNORE, Batch, make_batch
from bilect.data.tokens import TokenStore
from bilect.runtime.distributed import own_part

__all__ = ["PackedWindows", "cycle_batches", "length_bucketed"]


def cycle_batches(
    store: TokenStore, rows: np.ndarray, batch_size: int, pad_id: int, seed: int, device: torch.device
) -> Iterator[Batch]:
    """Endless batches of documents, reshuffled every pass; each rank gets its part of the same global batch.

    Args:
        store: of the documents.
        rows: the rows to draw from; fewer than a batch are repeated.
        batch_size: documents of the global batch.
        pad_id: padding token.
        seed: of the shuffles; equal on all ranks.
        device: where the batches are put.
    """
    generator = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    while True:
        while len(queue) < batch_size:
            queue = np.concatenate([queue, generator.permutation(rows)])
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield make_batch(store.rows(np.asarray(own_part(batch.tolist()))), pad_id).to(device)


def length_bucketed(length_R: np.ndarray, rows: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Batches of rows of similar length, at most ``batch_tokens`` padded tokens each, longest first.

    Args:
        length_R: tokens of every row of the store.
        rows: the rows to batch.
        batch_tokens: greatest product of documents and longest length; a single longer row goes alone.
    """
    ordered = rows[np.argsort(-length_R[rows], kind="stable")]
    start = 0
    while start < len(ordered):
        width = max(int(length_R[ordered[start]]), 1)
        size = max(batch_tokens // width, 1)
        yield ordered[start : start + size]
        start += size


class PackedWindows(Dataset[dict[str, Tensor]]):
    """Documents laid end to end in random order and cut into windows of ``context`` tokens: no padding is trained on.

    Pass after pass, each in a new order, until ``n_windows`` are full; so arms that keep different amounts of text
    still train on exactly equal numbers of tokens.

    Args:
        store: of the documents.
        rows: documents to train on.
        context: tokens per window.
        n_windows: length of the dataset.
        seed: of the orders.
    """

    def __init__(self, store: TokenStore, rows: np.ndarray, context: int, n_windows: int, seed: int) -> None:
        self.store, self.context, self.n_windows = store, context, n_windows
        generator = np.random.default_rng(seed)
        total = int(store.length_R[rows].sum())
        passes = -(-n_windows * context // max(total, 1))
        self.order = np.concatenate([generator.permutation(rows) for _ in range(passes)])
        self.ends = np.cumsum(store.length_R[self.order])
        self.passes = n_windows * context / max(total, 1)

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.n_windows:
            raise IndexError(index)
        first = index * self.context
        last = first + self.context
        ids, labels = [], []
        k = int(np.searchsorted(self.ends, first, side="right"))
        while k < len(self.order) and self.ends[k] - self.store.length_R[self.order[k]] < last:
            row, n_given = self.store.row(self.order[k])
            begin = int(self.ends[k]) - len(row)
            learned = row.clone()
            learned[1:n_given] = IGNORE  # a document's first token is learned as the end of the one before
            part = slice(max(first - begin, 0), max(last - begin, 0))
            ids.append(row[part])
            labels.append(learned[part])
            k += 1
        window = {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}
        window["labels"][0] = IGNORE  # nothing precedes it
        return window
