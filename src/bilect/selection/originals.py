"""The kept records as they came: whole, with all their fields, in the format of their files, found by file and place.

Lines of JSON, elements of an array and files of text are copied byte for byte, rows of Parquet under their schema. Of a
document that was cut into pieces (``data.long_documents: chunk``), each kept piece is a record of its own: the fields
are the record's, the text is the piece's.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bilect.data import formats
from bilect.data.input import Input
from bilect.data.sources import places
from bilect.data.store import Part
from bilect.data.tokens import TokenStore, hash64
from bilect.engines import Engine, Here
from bilect.errors import BilectError, explain, reason
from bilect.selection.records import kept_rows

__all__ = ["write_records"]

_AT_ONCE = 4096  # kept rows that are looked up at a time


def write_records(
    selected: Path,
    store: TokenStore,
    inputs: Sequence[Input],
    on_records: Callable[[int], None] = lambda n: None,
    engine: Engine | None = None,
) -> int:
    """Write ``selected/records/``, the kept records in files called like those they are from; returns their number.

    Files are laid out as the inputs are below the folder that all of them share, records are in the order of the input.
    ``records/`` appears when it is complete and can be read as a pool. Memory: 8 bytes for each kept record.

    Args:
        selected: folder of a selection.
        store: the pool's token files.
        inputs: of each token file, in order, see ``pipeline.texts.pool_inputs``.
        on_records: called with the number of records just written.
        engine: where files are written, each by one process.

    Raises:
        BilectError: an input cannot be read, or is not what was tokenised.
    """
    rows, out, draft = kept_rows(selected, store), selected / "records", selected / ".records.partial"
    shutil.rmtree(draft, ignore_errors=True)
    written = 0
    try:
        files = zip(store.parts, inputs, places(inputs), strict=True)
        parts = ((source, draft / place, _within(rows, part)) for part, source, place in files)
        for count in (engine or Here()).map(_Copy(store), (part for part in parts if len(part[2]))):
            on_records(count)
            written += count
        shutil.rmtree(out, ignore_errors=True)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def _within(rows: np.ndarray, part: Part) -> np.ndarray:
    return rows[np.searchsorted(rows, part.rows.start) : np.searchsorted(rows, part.rows.stop)]


@dataclass
class _Copy:
    """Writes the kept records of one input to a file; returns their number."""

    store: TokenStore

    def __call__(self, part: tuple[Input, Path, np.ndarray]) -> int:
        source, out, rows = part
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            count = formats.get(source.format).copy(source, _Wanted(self.store, rows), out)
        except BilectError:
            raise
        except Exception as error:
            if explain(error):  # a full disk, for one
                raise
            raise BilectError(f"select: cannot copy records of {source.where}: {reason(error)}") from error
        if count != len(rows):
            raise BilectError(f"select: {count:,} of {len(rows):,} kept records are found in {source.where}: it is "
                              "not what was tokenised")  # fmt: skip
        return count


class _Wanted:
    """Places of the kept records of one input, and the texts of pieces; asked for in order."""

    def __init__(self, store: TokenStore, rows: np.ndarray) -> None:
        self._store, self._rows = store, rows
        self._coming = self._all()
        self._next = next(self._coming, None)

    def at(self, place: int) -> list[tuple[str, str] | None]:
        """What is wanted of the record at a place: None for all of it, or number and text of a piece."""
        found = []
        while self._next is not None and self._next[0] <= place:
            if self._next[0] == place:
                found.append(self._next[1])
            self._next = next(self._coming, None)
        return found

    @property
    def place(self) -> int | None:
        """Of the next record; None where nothing more is wanted."""
        return None if self._next is None else self._next[0]

    def _all(self) -> Iterator[tuple[int, tuple[str, str] | None]]:
        for first in range(0, len(self._rows), _AT_ONCE):
            rows = self._rows[first : first + _AT_ONCE]
            records, hashes = (
                self._store.take("record", rows).to_pylist(),
                self._store.take("id_hash", rows).to_pylist(),
            )
            for row, record, id_hash, name in zip(rows, records, hashes, self._store.given_ids(rows), strict=True):
                piece = hash64(name) != id_hash  # `id#2`, of the document `id`
                yield record, (name.rpartition("#")[2], self._store.texts([row])[0]) if piece else None
