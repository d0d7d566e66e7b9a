"""What was chosen of one round, from its files alone: counted and sampled by DuckDB, out of core.

A selection is `kept.parquet` (or `kept.jsonl.zst`) and `dropped.parquet`; together they are all scored documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilect.data.tables import database, kept_file, kept_table, parquet_table

__all__ = ["Selection", "SourceCount", "opened", "read_selection", "view_of"]


BINS = 60
NEAR = "near-duplicate"


@dataclass(frozen=True)
class SourceCount:
    """Documents and tokens of one source, scored and kept."""

    name: str
    documents: int
    kept: int
    tokens: int
    kept_tokens: int


@dataclass(frozen=True)
class LengthBin:
    """Documents of about one length: the quantiles of their scores (5, 25, 50, 75 and 95%), and the share kept."""

    tokens: float
    documents: int
    kept: int
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Selection:
    """One selection in numbers."""

    documents: int
    kept: int
    tokens: int
    kept_tokens: int
    threshold: float | None
    sources: list[SourceCount]
    reasons: dict[str, int]
    deciles: list[float]  # the nine cuts between tenths of the scores
    histogram: list[tuple[float, float, int, int]]  # low, high, kept, left out
    lengths: list[LengthBin]


@contextmanager
def opened() -> Iterator[Any]:
    """A ``database`` that neither loads nor fetches extensions."""
    with database() as db:
        db.execute("SET autoinstall_known_extensions = false")
        db.execute("SET preserve_insertion_order = false")
        yield db


def view_of(db: Any, name: str, folder: Path) -> bool:
    """Make a view (doc_id, source, n_tokens, score, kept, reason) of a selection; False where there is none."""
    kept, dropped = kept_file(folder), folder / "dropped.parquet"
    if kept is None or not dropped.is_file():
        return False
    columns = "doc_id, coalesce(source, '(no source)') AS source, n_tokens, score"
    db.execute(
        f"""CREATE VIEW {name} AS
            SELECT {columns}, true AS kept, NULL::VARCHAR AS reason FROM {kept_table(kept)}
            UNION ALL
            SELECT {columns}, false, CASE WHEN starts_with(reason::VARCHAR, '{NEAR}') THEN '{NEAR}'
                                          ELSE reason::VARCHAR END FROM {parquet_table(dropped)}"""
    )
    return True


def read_selection(folder: Path) -> Selection | None:
    """Count a selection; None where there is none.

    Raises:
        duckdb.Error: a file is damaged.
    """
    with opened() as db:
        if not view_of(db, "chosen", folder):
            return None
        total = db.execute(
            """SELECT count(*), count(*) FILTER (kept), sum(n_tokens), sum(n_tokens) FILTER (kept),
                      min(score) FILTER (kept), min(score) FILTER (isfinite(score)),
                      max(score) FILTER (isfinite(score)) FROM chosen"""
        ).fetchone()
        documents, kept, tokens, kept_tokens, threshold, low, high = total
        if not documents:
            return None
        sources = db.execute(
            """SELECT source, count(*), count(*) FILTER (kept), sum(n_tokens),
                      coalesce(sum(n_tokens) FILTER (kept), 0) FROM chosen GROUP BY source ORDER BY 5 DESC, 4 DESC, 1"""
        ).fetchall()
        reasons = db.execute(
            "SELECT coalesce(reason, '(no reason)'), count(*) FROM chosen WHERE NOT kept GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
        histogram: list[tuple[float, float, int, int]] = []
        deciles: list[float] = []
        if low is not None:
            deciles = db.execute(
                f"SELECT quantile_disc(score, {[q / 10 for q in range(1, 10)]}) FROM chosen WHERE isfinite(score)"
            ).fetchone()[0]
            width = (high - low) / BINS or 1.0
            counted = db.execute(
                f"""SELECT least(floor((score - {low!r}) / {width!r})::INT, {BINS - 1}) AS bin, count(*) FILTER (kept),
                           count(*) FILTER (NOT kept) FROM chosen WHERE isfinite(score) GROUP BY bin ORDER BY bin"""
            ).fetchall()
            histogram = [(low + b * width, low + (b + 1) * width, k, d) for b, k, d in counted]
        lengths = db.execute(
            """SELECT pow(2, (floor(2 * log2(greatest(n_tokens, 1))) + 0.5) / 2) AS about, count(*),
                      count(*) FILTER (kept), quantile_cont(score, [0.05, 0.25, 0.5, 0.75, 0.95])
               FROM chosen WHERE isfinite(score) GROUP BY about ORDER BY about"""
        ).fetchall()
    return Selection(
        documents,
        kept,
        int(tokens or 0),
        int(kept_tokens or 0),
        threshold,
        [SourceCount(s, n, k, int(t or 0), int(kt)) for s, n, k, t, kt in sources],
        dict(reasons),
        list(deciles),
        histogram,
        [LengthBin(a, n, k, tuple(q)) for a, n, k, q in lengths],
    )
