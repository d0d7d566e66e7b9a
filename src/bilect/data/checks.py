"""What a set of documents must not hold: a text twice, an id twice, or a text of another set."""

from collections.abc import Sequence

import numpy as np

from bilect.data.store import Naming, TokenStore

__all__ = ["DocumentIndex"]


class DocumentIndex:
    """The documents whose rows, or pieces, a store holds; found by 64-bit hashes, a few bytes per document.

    Args:
        store: of the rows.

    Attributes:
        first_D: first row of each document.
        kept_D: False for documents that were left out.
    """

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        new_R = np.ones(len(store), dtype=bool)
        new_R[1:] = np.diff(store.column_R("record")) != 0
        new_R[[p.rows.start for p in store.parts if len(p.rows)]] = True
        self.first_D = np.flatnonzero(new_R)
        self.kept_D = np.ones(len(self.first_D), dtype=bool)
        self._id_hash_D = store.column_R("id_hash")[self.first_D]
        self._text_hash_D = store.column_R("text_hash")[self.first_D]

    def rows(self, documents: np.ndarray) -> np.ndarray:
        """All rows of some documents."""
        ends = np.append(self.first_D, len(self._store))
        counts = ends[documents + 1] - ends[documents]
        before = np.cumsum(counts) - counts
        return np.repeat(ends[documents] - before, counts) + np.arange(counts.sum())

    def leave_out(self, rows: np.ndarray) -> None:
        """Mark the documents of some rows as no part of the set."""
        self.kept_D[np.searchsorted(self.first_D, rows, side="right") - 1] = False

    def repeated(self) -> np.ndarray:
        """(D', 2): documents with the text of an earlier one that is part of the set, in order, and that one."""
        inside = np.flatnonzero(self.kept_D)
        hash_D = self._text_hash_D[inside]
        order = np.argsort(hash_D, kind="stable")
        new = np.append(True, hash_D[order[1:]] != hash_D[order[:-1]]) if len(order) else np.zeros(0, dtype=bool)
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        pairs = np.stack([inside[order[~new]], inside[first[~new]]], axis=1)
        return pairs[np.argsort(pairs[:, 0])]

    def naming(self, names: Sequence[str]) -> list[Naming]:
        """What makes the ids of the set unique: nothing where they are, else the names of the files that share some.

        Equal hashes of different ids (one pair in 10^5 pools of 20 million) are treated as equal ids.

        Args:
            names: of the files of the store.
        """
        starts = np.array([part.rows.start for part in self._store.parts], dtype=np.int64)
        stops = np.array([part.rows.stop for part in self._store.parts], dtype=np.int64)
        inside = np.flatnonzero(self.kept_D)
        part_D = np.searchsorted(stops, self.first_D[inside], side="right")
        hash_D = self._id_hash_D[inside]
        order = np.argsort(hash_D, kind="stable")  # of equal ids, those of one file are neighbours
        same = hash_D[order[1:]] == hash_D[order[:-1]]
        a, b = part_D[order[:-1][same]], part_D[order[1:][same]]
        shared, within = np.zeros(len(starts), dtype=bool), np.zeros(len(starts), dtype=bool)
        shared[a] = shared[b] = True
        within[a[a == b]] = True
        return [Naming(f"{name}/" if shared[n] else "", bool(within[n])) for n, name in enumerate(names)]

    def with_texts_of(self, other: "DocumentIndex") -> np.ndarray:
        """Documents whose text is that of a document of another store; those left out count on neither side."""
        return np.flatnonzero(np.isin(self._text_hash_D, other._text_hash_D[other.kept_D]) & self.kept_D)
