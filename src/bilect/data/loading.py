"""From token rows to batches: endless shuffled documents, length buckets, and packed windows for training."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bilect.data.batch import IGNORE, Batch, join_batches, make_batch
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.runtime.distributed import own_part, world_size

__all__ = ["BatchStream", "PackedWindows", "SetStream", "length_bucketed", "one_pass"]


def one_pass(rows: np.ndarray, weight_R: np.ndarray | None, generator: np.random.Generator) -> np.ndarray:
    """``rows`` in random order, each once; or by weight: floor(w) times, and once more with probability w - floor(w).

    Args:
        rows: rows of a store.
        weight_R: relative frequency of every row of the store; None: each row once.
        generator: of the order, and before it of the fractions.
    """
    if weight_R is not None:
        whole = np.floor(weight_R[rows])
        more = generator.random(len(rows)) < weight_R[rows] - whole
        rows = np.repeat(rows, whole.astype(np.int64) + more)
    return generator.permutation(rows)


class BatchStream(Iterator[Batch]):
    """Endless batches of documents, reshuffled every pass; each rank gets its part of the same global batch.

    Args:
        store: of the documents.
        rows: the rows to draw from; fewer than a batch are repeated.
        batch_size: documents of the global batch.
        pad_id: padding token.
        seed: of the shuffles; equal on all ranks.
        device: where the batches are put.
        weight_R: how often a pass has each row of the store, see ``one_pass``.

    Attributes:
        drawn: rows of the latest global batch.

    Raises:
        BilectError: nothing to draw from.
    """

    drawn: np.ndarray

    def __init__(
        self,
        store: TokenStore,
        rows: np.ndarray,
        batch_size: int,
        pad_id: int,
        seed: int,
        device: torch.device,
        weight_R: np.ndarray | None = None,
    ) -> None:
        self.store, self.rows, self.batch_size, self.pad_id, self.device = store, rows, batch_size, pad_id, device
        self.weight_R = weight_R
        self._generator = np.random.default_rng(seed)
        self._queue = np.empty(0, dtype=np.int64)
        if not (len(rows) if weight_R is None else weight_R[rows].sum()):
            raise BilectError("data: there are no documents to draw batches from")

    def __next__(self) -> Batch:
        while len(self._queue) < self.batch_size:
            self._queue = np.concatenate([self._queue, one_pass(self.rows, self.weight_R, self._generator)])
        self.drawn, self._queue = self._queue[: self.batch_size], self._queue[self.batch_size :]
        return self.batch(self.drawn)

    def batch(self, rows: np.ndarray) -> Batch:
        """This rank's part of a global batch of these rows: the one of ``drawn`` again, for example."""
        return make_batch(self.store.rows(np.asarray(own_part(rows.tolist()))), self.pad_id).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank."""
        return {"generator": json.dumps(self._generator.bit_generator.state), "queue": torch.from_numpy(self._queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._generator.bit_generator.state = json.loads(state["generator"])
        self._queue = state["queue"].cpu().numpy()


class SetStream(Iterator[Batch]):
    """Endless batches of one or several upper sets, each with its fixed part of every batch.

    The parts are proportional to the weights, at least one document per set and rank; a set that is smaller than its
    part gives all it has. A single set is a ``BatchStream``.

    Args:
        stores: of the sets.
        weights: of the sets.
        batch_size: documents of the global batch.
        pad_id: padding token.
        seed: of the shuffles; equal on all ranks.
        device: where the batches are put.
        rows: documents of each set; None: all.

    Raises:
        BilectError: a batch has no room for every set.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        batch_size: int,
        pad_id: int,
        seed: int,
        device: torch.device,
        rows: Sequence[np.ndarray] | None = None,
    ) -> None:
        least = world_size() if len(stores) > 1 else 1
        if batch_size < least * len(stores):
            raise BilectError(f"upper_batch_size: {batch_size} documents are too few for {len(stores)} upper sets "
                              f"on {world_size()} ranks")  # fmt: skip
        sizes = _parts(batch_size, weights, least)
        self.pad_id = pad_id
        rows = [np.arange(len(store)) for store in stores] if rows is None else rows
        self._streams = [
            BatchStream(store, own, min(size, max(len(own), least)), pad_id, seed + number, device)
            for number, (store, own, size) in enumerate(zip(stores, rows, sizes, strict=True))
        ]

    def __next__(self) -> Batch:
        batches = [next(stream) for stream in self._streams]
        return batches[0] if len(batches) == 1 else join_batches(batches, self.pad_id)

    @property
    def mean_length(self) -> float:
        """Tokens of a document, on average over a batch."""
        sizes = [stream.batch_size for stream in self._streams]
        return float(np.average([stream.store.length_R.mean() for stream in self._streams], weights=sizes))

    def batches_of(self, documents: int) -> int:
        """As many as hold so many documents, or at most as many as it takes to have drawn all of each set."""
        every = max(-(-len(stream.rows) // stream.batch_size) for stream in self._streams)
        return min(-(-documents // sum(stream.batch_size for stream in self._streams)), every)

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank."""
        return {str(number): stream.state_dict() for number, stream in enumerate(self._streams)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        for number, stream in enumerate(self._streams):
            stream.load_state_dict(state[str(number)])


class UpperBatches:
    """Endless batches of upper sets in the convention of transformers, the same from the start in every pass.

    Args:
        stores: of the sets.
        weights: of the sets.
        batch_size: documents of the batch of all ranks; this rank has its part.
        pad_id: padding token.
        seed: of the shuffles; equal on all ranks.

    Attributes:
        tokens: of a batch, on average, padding not counted.
    """

    def __init__(
        self, stores: Sequence[TokenStore], weights: Sequence[float], batch_size: int, pad_id: int, seed: int
    ) -> None:
        self._stream = lambda: SetStream(stores, weights, batch_size, pad_id, seed, torch.device("cpu"))
        self.tokens = batch_size * self._stream().mean_length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._stream():
            labels_BT = torch.full_like(batch.target_BT, IGNORE)
            labels_BT[:, 1:] = batch.target_BT[:, :-1]
            yield {"input_ids": batch.input_ids_BT, "labels": labels_BT, "attention_mask": batch.mask_BT}


def _parts(total: int, weights: Sequence[float], least: int) -> list[int]:
    """``total`` split in proportion to ``weights`` by largest remainders, each part at least ``least``."""
    spare = total - least * len(weights)
    exact = np.asarray(weights) / sum(weights) * spare
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: spare - parts.sum()]] += 1
    return (parts + least).tolist()


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


class PackedWindows(Dataset[dict[str, Any]]):
    """Documents laid end to end in random order and cut into windows of ``context`` tokens: no padding is trained on.

    Pass after pass, each in a new order, until ``n_windows`` are full; so arms that keep different amounts of text
    still train on exactly equal numbers of tokens.

    Args:
        store: of the documents.
        rows: documents to train on.
        context: tokens per window.
        n_windows: length of the dataset.
        seed: of the orders.
        weight_R: how often a pass has each row of the store, see ``one_pass``.
        label_sources: name, in ``source``, the source that most of a window comes from.

    Attributes:
        passes: over the rows, as many as it takes (with weights: on average).
        sources: names of the documents' sources, where windows are labelled.

    Raises:
        BilectError: nothing to train on.
    """

    def __init__(
        self,
        store: TokenStore,
        rows: np.ndarray,
        context: int,
        n_windows: int,
        seed: int,
        weight_R: np.ndarray | None = None,
        label_sources: bool = False,
    ) -> None:
        self.store, self.context, self.n_windows = store, context, n_windows
        self.sources, self._source_R = list[str](), np.empty(0, dtype=np.int32)
        if label_sources:
            names, code = np.unique(np.array(store.sources(rows), dtype=np.str_), return_inverse=True)
            self.sources, self._source_R = names.tolist(), np.zeros(len(store), dtype=np.int32)
            self._source_R[rows] = code
        generator = np.random.default_rng(seed)
        needed = n_windows * context
        length = store.length_R[rows]
        per_pass = float((length if weight_R is None else length * weight_R[rows]).sum())
        if not per_pass:
            raise BilectError("training: there is no text to train on")
        orders, drawn = [], 0
        while drawn < needed:
            orders.append(one_pass(rows, weight_R, generator))
            drawn += int(store.length_R[orders[-1]].sum())
        self.order = np.concatenate(orders)
        self.ends = np.cumsum(store.length_R[self.order])
        self.passes = needed / per_pass

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.n_windows:
            raise IndexError(index)
        first = index * self.context
        last = first + self.context
        ids, labels, parts = [], [], []
        k = int(np.searchsorted(self.ends, first, side="right"))
        while k < len(self.order) and self.ends[k] - self.store.length_R[self.order[k]] < last:
            row, given = self.store.row(self.order[k])
            begin = int(self.ends[k]) - len(row)
            learned = row.clone()
            if isinstance(given, Tensor):
                learned[1:][~given[1:]] = IGNORE
            else:
                learned[1:given] = IGNORE  # a document's first token is learned as the end of the one before
            part = slice(max(first - begin, 0), max(last - begin, 0))
            ids.append(row[part])
            labels.append(learned[part])
            parts.append(self.order[k])
            k += 1
        window: dict[str, Any] = {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}
        window["labels"][0] = IGNORE  # nothing precedes it
        if self.sources:
            longest = max(range(len(ids)), key=lambda i: len(ids[i]))
            window["source"] = self.sources[self._source_R[parts[longest]]]
        return window
