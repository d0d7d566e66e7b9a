"""The kept documents as a table, with their text as the models saw it, out of core; how they came: ``originals``."""

import os
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow.parquet as pq

from bilect.data.tables import kept_file, kept_table, parquet_table, quoted
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError

__all__ = ["attach_text", "extremes", "kept_ids", "kept_rows"]

_FORMATS = {"parquet": "FORMAT parquet, COMPRESSION zstd", "jsonl.zst": "FORMAT json, COMPRESSION zstd"}


def attach_text(selected: Path, store: TokenStore, form: Literal["parquet", "jsonl.zst"] = "parquet") -> Path:
    """Put the text beside every row of ``selected/kept.parquet``; returns the file, which replaces it.

    Args:
        selected: folder of a selection.
        store: token files with the documents; may hold more than was selected.
        form: ``kept.parquet`` (best first), or ``kept.jsonl.zst`` with one object per line.

    Raises:
        BilectError: documents of the selection are not in the store.
    """
    kept, final = selected / "kept.parquet", selected / f"kept.{form}"
    draft = selected / f".{final.name}.partial"
    with _connected(selected) as db:
        db.register("texts", store.reader(["doc_id", "text"]))
        found = db.execute(
            f"""COPY (SELECT k.*, t.text FROM {parquet_table(kept)} k JOIN texts t USING (doc_id) ORDER BY rank)
                TO {quoted(draft)} ({_FORMATS[form]})"""
        ).fetchall()[0][0]
    _check_count(found, pq.read_metadata(kept).num_rows)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, final)
    for other in _FORMATS:
        if other != form:
            (selected / f"kept.{other}").unlink(missing_ok=True)
    return final


def extremes(selected: Path, store: TokenStore, documents: int, characters: int) -> dict[str, list[dict[str, Any]]]:
    """The ``best`` and the ``worst`` documents of a selection, the best and the worst first, with their text.

    Args:
        selected: folder of a selection, before ``attach_text``.
        store: token files with the documents.
        documents: how many of each.
        characters: of the text that are shown.
    """
    names = ("doc_id", "source", "n_tokens", "score")
    with _connected(selected) as db:
        tables = [f"SELECT {', '.join(names)}, rank FROM {parquet_table(selected / f'{n}.parquet')}" for n in _PARTS]
        db.execute(f"CREATE VIEW ranked AS {' UNION ALL '.join(tables)}")
        rows = {
            name: db.execute(f"SELECT * EXCLUDE (rank) FROM ranked ORDER BY rank {order} LIMIT {documents}").fetchall()
            for name, order in (("best", "ASC"), ("worst", "DESC"))
        }
        ids = [row[0] for part in rows.values() for row in part]
        db.register("texts", store.reader(["doc_id", "text"]))
        texts = dict(db.execute("SELECT doc_id, text FROM texts WHERE doc_id IN (SELECT unnest(?))", [ids]).fetchall())
    return {
        name: [{**dict(zip(names, row, strict=True)), "text": texts[row[0]][:characters]} for row in part]
        for name, part in rows.items()
    }


def kept_ids(selected: Path) -> list[str]:
    """Ids of the kept documents, best first."""
    with _connected(selected) as db:
        return [row[0] for row in db.execute(f"SELECT doc_id FROM {_kept(selected)} ORDER BY rank").fetchall()]


def kept_rows(selected: Path, store: TokenStore, *, in_order: bool = False) -> np.ndarray:
    """Rows of the kept documents in a store: (D,) integers, in the order of the store or of their ranks.

    Raises:
        BilectError: documents of the selection are not in the store.
    """
    with _connected(selected) as db:
        db.register("rows", store.reader(["doc_id", "row"]))
        order = "k.rank" if in_order else "r.row"
        query = f"SELECT r.row FROM {_kept(selected)} k JOIN rows r USING (doc_id) ORDER BY {order}"
        found = db.execute(query).fetchnumpy()["row"]
        (wanted,) = db.execute(f"SELECT count(*) FROM {_kept(selected)}").fetchall()[0]
    _check_count(len(found), wanted)
    return np.asarray(found)


_PARTS = ("kept", "dropped")


def _connected(selected: Path) -> duckdb.DuckDBPyConnection:
    db = duckdb.connect()
    scratch = selected / ".duckdb"
    db.execute(f"SET temp_directory = {quoted(scratch)}")
    return db


def _kept(selected: Path) -> str:
    file = kept_file(selected)
    if file is None:
        raise BilectError(f"{selected}: there are no kept documents (kept.parquet or kept.jsonl.zst)")
    return kept_table(file)


def _check_count(found: int, wanted: int) -> None:
    if found != wanted:
        raise BilectError(f"select: {found:,} of the {wanted:,} kept documents are found in the token files; the "
                          "scores are of other files")  # fmt: skip
