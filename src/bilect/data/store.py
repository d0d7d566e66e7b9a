"""Rows of token files, read through the memory map: a row costs a few bytes of memory, however long its text."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bilect.data.batch import Row
from bilect.errors import BilectError

__all__ = ["Naming", "Part", "TokenStore"]

Rows = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Naming:
    """What is put before the ids of a file, so that no two documents of a store have the same.

    Attributes:
        prefix: name of the input, with a slash; empty where the ids are unique as they are.
        numbered: whether the place of the record follows it: ids repeat within the file.
    """

    prefix: str = ""
    numbered: bool = False


@dataclass(frozen=True)
class Part:
    """The rows of one file.

    Attributes:
        name: stem of the file.
        rows: from the first to the one after the last.
    """

    name: str
    rows: range


class TokenStore:
    """One or several token files as one sequence of rows.

    Args:
        paths: a token file, a folder of them (in the order of their names), or several files in their order.
        weights: of the files; 1 by default.
        excluded: rows that are never used, such as documents that repeat a text.
        naming: of the files; as the ids are by default.

    Attributes:
        paths: the files.
        length_R: tokens of each row.
        whole_R: tokens of what each row stands for, with those beyond the context.
        weight_R: weight of the file of each row; None where all are 1.
        parts: the rows of each file.
        excluded: as given.

    Raises:
        BilectError: a file is missing or damaged.
    """

    def __init__(
        self,
        paths: Path | Sequence[Path],
        weights: Sequence[float] | None = None,
        excluded: Rows = (),
        naming: Sequence[Naming] = (),
    ) -> None:
        if isinstance(paths, Path):
            paths = sorted(paths.glob("*.arrow")) if paths.is_dir() else [paths]
        self.paths, self.excluded = list(paths), np.asarray(excluded, dtype=np.int64)
        self._given_weights, self._given_naming = weights, naming
        self.parts: list[Part] = []
        self._batches: list[pa.RecordBatch] = []
        self._naming: list[Naming] = []  # of each batch
        counts: list[int] = []
        for number, path in enumerate(self.paths):
            batches = [b for b in _open(path) if len(b)]
            first = self.parts[-1].rows.stop if self.parts else 0
            self.parts.append(Part(path.stem, range(first, first + sum(map(len, batches)))))
            self._batches += batches
            self._naming += [naming[number] if naming else Naming()] * len(batches)
            counts += map(len, batches)
        self._starts = np.cumsum([0, *counts])  # of the batches
        self._firsts: list[int] = self._starts.tolist()  # for single rows
        lists = [b.column("input_ids") for b in self._batches]
        self._offsets = [a.offsets.to_numpy() for a in lists]
        self._values = [a.values.to_numpy() for a in lists]
        self._given = [b.column("n_given").to_numpy() for b in self._batches]
        flips = [b.column("flips") if "flips" in b.schema.names else None for b in self._batches]
        self._flips = [None if f is None or not len(f.flatten()) else f for f in flips]
        self.length_R = np.concatenate([np.zeros(0, np.int32), *(np.diff(o) for o in self._offsets)])
        whole = [b.column("n_tokens").to_numpy() if "n_tokens" in b.schema.names else np.diff(o)
                 for b, o in zip(self._batches, self._offsets, strict=True)]  # fmt: skip
        self.whole_R = np.concatenate([np.zeros(0, np.int32), *whole])
        self.weight_R: np.ndarray | None = None
        if weights is not None and any(w != 1 for w in weights):
            self.weight_R = np.repeat(np.asarray(weights, dtype=np.float64), [len(p.rows) for p in self.parts])

    def __len__(self) -> int:
        return len(self.length_R)

    def __reduce__(self) -> tuple[Any, ...]:
        """A store is sent to a worker as the names of its files, which are opened there."""
        return TokenStore, (self.paths, self._given_weights, self.excluded, self._given_naming)

    def row(self, index: int) -> Row:
        """Token ids of a row, and what of them is given."""
        batch, i = self._find(index)
        offsets = self._offsets[batch]
        ids = self._values[batch][offsets[i] : offsets[i + 1]]
        row, given, flips = torch.from_numpy(ids.astype(np.int64)), int(self._given[batch][i]), self._flips[batch]
        if flips is None or not len(at := flips[i].values):
            return row, given
        learned = torch.zeros(len(row), dtype=torch.bool)
        bounds = [given, *at.to_pylist(), len(row)]
        for begin, end in zip(bounds[::2], bounds[1::2], strict=False):
            learned[begin:end] = True
        return row, learned

    def rows(self, indices: Rows) -> list[Row]:
        """``row`` of several."""
        return [self.row(int(i)) for i in indices]

    def doc_id(self, index: int) -> str:
        """Name of a row."""
        batch, i = self._find(index)
        return str(self._column(batch, "doc_id", pa.array([i]))[0].as_py())

    def doc_ids(self, indices: Rows) -> list[str]:
        """Names of some rows."""
        return self.take("doc_id", indices).to_pylist()

    def sources(self, indices: Rows) -> list[str]:
        """Labels of some rows."""
        return self.take("source", indices).to_pylist()

    def texts(self, indices: Rows) -> list[str]:
        """Texts of some rows."""
        return self.take("text", indices).to_pylist()

    def take(self, column: str, indices: Rows) -> pa.Array:
        """Some rows of a column, batch by batch: Arrow's own ``take`` would join the whole column first."""
        rows = np.asarray(indices, dtype=np.int64)
        if not len(rows):
            return pa.array([], pa.string())
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        batch_of = np.searchsorted(self._starts, sorted_rows, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(batch_of)) + 1), len(rows)]
        parts = [
            self._column(b := int(batch_of[i]), column, pa.array(sorted_rows[i:j] - self._starts[b]))
            for i, j in pairwise(cuts)
        ]
        place = np.empty(len(rows), dtype=np.int64)
        place[order] = np.arange(len(rows))
        return pa.concat_arrays(parts).take(pa.array(place))

    def reader(self, columns: Sequence[str]) -> pa.RecordBatchReader:
        """All rows of some columns but the excluded ones, a batch at a time; ``row`` is their number in the store."""

        def values(number: int, first: int, column: str) -> pa.Array:
            size = len(self._batches[number])
            return pa.array(np.arange(first, first + size)) if column == "row" else self._column(number, column)

        def batches() -> Iterator[pa.RecordBatch]:
            for number, (first, batch) in enumerate(zip(self._firsts, self._batches, strict=False)):
                own = self.excluded[(self.excluded >= first) & (self.excluded < first + len(batch))] - first
                part = pa.RecordBatch.from_arrays([values(number, first, c) for c in columns], schema=schema)
                yield part.filter(pa.array(~np.isin(np.arange(len(batch)), own))) if len(own) else part

        schema = pa.schema(
            [pa.field(c, pa.int64()) if c == "row" else self._batches[0].schema.field(c) for c in columns]
        )
        return pa.RecordBatchReader.from_batches(schema, batches())

    def column_R(self, column: str) -> np.ndarray:
        """A numeric column: ``record``, ``id_hash`` or ``text_hash``."""
        return np.concatenate([b.column(column).to_numpy() for b in self._batches] or [np.zeros(0, np.int64)])

    @property
    def has_prompts(self) -> bool:
        """Whether any row has given tokens beyond its start."""
        return any(bool((given > 1).any()) for given in self._given)

    def given_ids(self, indices: Rows) -> list[str]:
        """Names of some rows as their records, or their texts, gave them."""
        found = [self._find(int(i)) for i in indices]
        return [str(self._batches[b].column("doc_id")[i].as_py()) for b, i in found]

    def _column(self, batch: int, column: str, places: pa.Array | None = None) -> pa.Array:
        """A column of a batch, or some places of it; ids with what is put before them."""
        naming, table = self._naming[batch], self._batches[batch]

        def taken(name: str) -> pa.Array:
            values = table.column(name)
            return values if places is None else values.take(places)

        if column != "doc_id" or not naming.prefix:
            return taken(column)
        parts = [naming.prefix, *([taken("record").cast(pa.string()), "/"] if naming.numbered else []), taken(column)]
        return pc.binary_join_element_wise(*parts, "")

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = bisect_right(self._firsts, index) - 1
        return batch, int(index) - self._firsts[batch]


def _open(path: Path) -> list[pa.RecordBatch]:
    if not path.is_file():
        raise BilectError(f"tokens: no file {path}")
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all().to_batches()
    except (pa.ArrowException, OSError) as error:
        raise BilectError(f"tokens: {path} is damaged; start the run anew in another directory") from error
