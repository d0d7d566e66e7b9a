"""What an exporter is given: the kept documents of a selection, and their tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bilect.data.store import TokenStore
from bilect.data.tables import KEPT, database, kept_table
from bilect.errors import BilectError

__all__ = ["Kept"]

BATCH = 1 << 14  # documents at a time


@dataclass(frozen=True)
class Kept:
    """The kept documents of a selection, best first, read a batch at a time.

    Attributes:
        file: ``kept.parquet`` or ``kept.jsonl.zst``.
        store: token files with these documents among others, or None.
        tokenizer: folder of the tokenizer that made the tokens, or None.

    Raises:
        BilectError: on reading: text or tokens are asked for, and there are none.
    """

    file: Path
    store: TokenStore | None = None
    tokenizer: Path | None = None

    def batches(self, text: bool = True) -> Iterator[pa.RecordBatch]:
        """``doc_id, source, n_tokens, score, rank``, and ``text``."""
        if text and not self._has_text:
            raise BilectError(f"export: {self.file} holds no text; select from a run, or from what "
                              "`bilect score --data` wrote")  # fmt: skip
        with database() as db:
            yield from self._select(db, [*KEPT, *["text"] * text]).to_arrow_reader(BATCH)

    def tokens(self) -> Iterator[tuple[str, np.ndarray]]:
        """Source and token ids (T,), the start token first, of each document."""
        if self.store is None:
            raise BilectError(f"export: there are no token files beside {self.file}; name their folder (--tokens)")
        first = 0
        for batch in self.batches(text=False):
            rows = self._row_K[first : first + len(batch)]
            for source, (ids_T, _) in zip(batch["source"].to_pylist(), self.store.rows(rows), strict=True):
                yield source, ids_T.numpy()
            first += len(batch)

    @property
    def vocabulary(self) -> int:
        """Tokens that there are, or one more than the greatest that occurs."""
        if self.tokenizer is not None:
            note = json.loads((self.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
            added = [int(token["id"]) for token in note.get("added_tokens", [])]
            vocabulary = note["model"].get("vocab", {})
            ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
            return 1 + max([*added, *map(int, ids)], default=-1)
        return 1 + max((int(ids_T.max()) for _, ids_T in self.tokens()), default=-1)

    def by_source(self) -> list[tuple[str, int, int]]:
        """Source, documents and tokens, the most tokens first."""
        with database() as db:
            self._select(db, list(KEPT)).create_view("kept")
            return db.execute(
                "SELECT source, count(*), sum(n_tokens)::BIGINT AS n FROM kept GROUP BY 1 ORDER BY n DESC, source"
            ).fetchall()

    @cached_property
    def _has_text(self) -> bool:
        return self.file.suffix != ".parquet" or "text" in pq.read_schema(self.file).names

    @cached_property
    def _row_K(self) -> np.ndarray:
        """Row in the store of each document."""
        store = self.store
        assert store is not None
        rows = np.setdiff1d(np.arange(len(store)), store.excluded)

        def ids() -> Iterator[pa.RecordBatch]:
            for first in range(0, len(rows), BATCH):
                part = rows[first : first + BATCH]
                yield pa.record_batch([store.take("doc_id", part), pa.array(part)], schema=schema)

        schema = pa.schema([("doc_id", pa.string()), ("row", pa.int64())])
        with database() as db:
            db.register("rows", pa.RecordBatchReader.from_batches(schema, ids()))
            self._select(db, ["doc_id", "rank"]).create_view("kept")
            found = db.sql(
                'SELECT doc_id, "row" FROM kept LEFT JOIN rows USING (doc_id) ORDER BY rank'
            ).to_arrow_table()
        if missing := found["row"].null_count:
            first = found.filter(found["row"].is_null())["doc_id"][0].as_py()
            raise BilectError(f"export: {missing} of the kept documents, {first!r} for one, are not in the token "
                              "files; name the folder of those that were scored")  # fmt: skip
        return found["row"].to_numpy()

    def _select(self, db: Any, columns: list[str]) -> Any:
        """In the order of the file, which is that of rank; no type is guessed, and no column read off a folder."""
        return db.sql(f"SELECT {', '.join(columns)} FROM {kept_table(self.file, {'text': 'VARCHAR'})}")
