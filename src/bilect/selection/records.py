"""The kept documents with their text, as Parquet or JSONL.zst, out of core."""

import os
from pathlib import Path
from typing import Any, Literal

import duckdb

from bilect.data.tokens import TokenStore
from bilect.selection.ranking import quoted

__all__ = ["attach_text", "extremes", "kept_ids"]

_FORMATS = {"parquet": "FORMAT parquet, COMPRESSION zstd", "jsonl.zst": "FORMAT json, COMPRESSION zstd"}


def attach_text(selected: Path, store: TokenStore, form: Literal["parquet", "jsonl.zst"] = "parquet") -> Path:
    """Put the text beside every row of ``selected/kept.parquet``; returns the file, which replaces it.

    Args:
        selected: folder of a selection.
        store: token files with the documents; may hold more than was selected.
        form: ``kept.parquet`` (best first), or ``kept.jsonl.zst`` with one object per line.
    """
    kept, final = selected / "kept.parquet", selected / f"kept.{form}"
    draft = selected / f".{final.name}.partial"
    with duckdb.connect() as db:
        db.execute(f"SET temp_directory = {quoted(selected / '.duckdb')}")
        db.register("texts", store.reader(["doc_id", "text"]))
        db.execute(
            f"""COPY (SELECT k.*, t.text FROM read_parquet({quoted(kept)}) k JOIN texts t USING (doc_id) ORDER BY rank)
                TO {quoted(draft)} ({_FORMATS[form]})"""
        )
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
    files = ", ".join(quoted(selected / name) for name in ("kept.parquet", "dropped.parquet"))
    names = ("doc_id", "source", "n_tokens", "score")
    with duckdb.connect() as db:
        db.execute(
            f"CREATE VIEW ranked AS SELECT {', '.join(names)}, rank FROM read_parquet([{files}], union_by_name=true)"
        )
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
    file = next(selected / f"kept.{form}" for form in _FORMATS if (selected / f"kept.{form}").is_file())
    reader = "read_parquet" if file.suffix == ".parquet" else "read_json"
    with duckdb.connect() as db:
        return [row[0] for row in db.execute(f"SELECT doc_id FROM {reader}({quoted(file)}) ORDER BY rank").fetchall()]
