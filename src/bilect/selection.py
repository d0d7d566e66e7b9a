"""Keep the top of the scored documents, by share of the tokens or by a token budget, with DuckDB on the score files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb

from bilect.errors import BilectError

__all__ = ["Selected", "select_top"]


@dataclass(frozen=True)
class Selected:
    """What a selection kept.

    Attributes:
        doc_ids: in order of rank.
        tokens: kept.
        pool_tokens: scored in all.
        threshold: lowest score kept.
        kept_share: source -> share of the kept tokens.
        pool_share: source -> share of the scored tokens.
        kept_fraction: source -> share of its documents that was kept.
    """

    doc_ids: list[str]
    tokens: int
    pool_tokens: int
    threshold: float
    kept_share: dict[str, float]
    pool_share: dict[str, float]
    kept_fraction: dict[str, float]


def select_top(scores: Path, kept_file: Path, budget: Callable[[int], float]) -> Selected:
    """Write the kept documents (``doc_id, source, n_tokens, score, rank``) and account for them.

    Documents are ranked by descending score, ties by doc_id, and taken until the budget is reached: the last one may
    pass over it by less than its own length.

    Args:
        scores: folder of score files.
        kept_file: Parquet file to write.
        budget: tokens to keep, from the number of tokens scored.

    Raises:
        BilectError: no score files, a score that is not finite, or no documents.
    """
    if not list(scores.glob("*.parquet")):
        raise BilectError(f"select: no score files in {scores}")
    pattern = str(scores / "*.parquet").replace("'", "''")
    with duckdb.connect() as db:
        db.execute(f"CREATE VIEW pool AS SELECT * FROM read_parquet('{pattern}')")
        broken, documents, pool_tokens = db.execute(
            "SELECT count(*) FILTER (NOT isfinite(score)), count(*), coalesce(sum(n_tokens), 0) FROM pool"
        ).fetchall()[0]
        if broken:
            raise BilectError(f"select: {broken} scores in {scores} are not finite")
        if not documents:
            raise BilectError(f"select: no documents in {scores}")
        db.execute(
            """CREATE TABLE kept AS
               SELECT doc_id, source, n_tokens, score, rank FROM (
                 SELECT *, row_number() OVER w AS rank, coalesce(sum(n_tokens) OVER (w
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
                 FROM pool WINDOW w AS (ORDER BY score DESC, doc_id))
               WHERE before < ? ORDER BY rank""",
            [budget(int(pool_tokens))],
        )
        kept_file.parent.mkdir(parents=True, exist_ok=True)
        target = str(kept_file).replace("'", "''")
        db.execute(f"COPY (SELECT * FROM kept ORDER BY rank) TO '{target}' (FORMAT parquet)")
        doc_ids = [r[0] for r in db.execute("SELECT doc_id FROM kept ORDER BY rank").fetchall()]
        tokens, threshold = db.execute("SELECT sum(n_tokens), min(score) FROM kept").fetchall()[0]
        by_source = db.execute(
            """SELECT p.source, p.n, p.t, coalesce(k.n, 0), coalesce(k.t, 0) FROM
                 (SELECT source, count(*) AS n, sum(n_tokens) AS t FROM pool GROUP BY source) p
                 LEFT JOIN (SELECT source, count(*) AS n, sum(n_tokens) AS t FROM kept GROUP BY source) k USING (source)
               ORDER BY p.source"""
        ).fetchall()
    return Selected(
        doc_ids,
        int(tokens),
        int(pool_tokens),
        float(threshold),
        {s: float(kt) / float(tokens) for s, _, _, _, kt in by_source},
        {s: float(pt) / float(pool_tokens) for s, _, pt, _, _ in by_source},
        {s: float(kn) / float(pn) for s, pn, _, kn, _ in by_source},
    )
