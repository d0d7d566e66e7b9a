"""What a set of documents must not hold: a document twice, or a text of another set."""

import numpy as np

from bilect.data.documents import hash64
from bilect.data.store import TokenStore

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

    def id(self, document: int) -> str:
        """The document's id; those of its pieces are extensions of it."""
        name = self._store.doc_id(int(self.first_D[document]))
        return name if self._id_hash_D[document] == hash64(name) else name.rpartition("#")[0]

    def repeated(self) -> list[tuple[int, int]]:
        """Documents with the id of an earlier one, in order, each with the first of that id."""
        hash_D = self._id_hash_D
        order = np.argsort(hash_D, kind="stable")
        later = np.flatnonzero(hash_D[order[1:]] == hash_D[order[:-1]]) + 1
        found: list[tuple[int, int]] = []
        first: dict[str, int] = {}
        for place in later.tolist():
            earlier, document = int(order[place - 1]), int(order[place])
            if place < 2 or hash_D[order[place - 2]] != hash_D[document]:
                first = {self.id(earlier): earlier}  # a new run of equal hashes
            keeper = first.setdefault(self.id(document), document)  # equal hashes of different ids are no repetition
            if keeper != document:
                found.append((document, keeper))
        return sorted(found)

    def with_texts_of(self, other: "DocumentIndex") -> np.ndarray:
        """Documents whose text is that of a document of another store; those left out count on neither side."""
        return np.flatnonzero(np.isin(self._text_hash_D, other._text_hash_D[other.kept_D]) & self.kept_D)

    def has_hash_for_id(self, document: int) -> bool:
        """Whether a document's id is the hash of its text, because none was given."""
        return self.id(document) == f"{int(self._text_hash_D[document]):016x}"
