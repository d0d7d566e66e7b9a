"""Score files in order of rank, in memory that does not grow with them: DuckDB reads and checks, numpy sorts integers.

A scan splits the documents by ranges of the key into buckets on the disk, and their hashed ids by ranges of the hash. A
bucket at a time is then read and sorted, and so are the hashes, among which equal ones betray a doc_id that was scored
twice. Within a bucket, rows are not sorted either, since moving strings is what costs most: the keys alone are, packed
with their row numbers into 64-bit integers, and the columns follow in one step.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bilect.data.tables import parquet_table, quoted
from bilect.errors import BilectError, reason
from bilect.selection.spill import Hashes, Rows, split

__all__ = ["RankedScores"]

COLUMNS = ("doc_id", "source", "n_tokens", "score")
BUCKET_ROWS, CHUNK_ROWS, SCAN_ROWS = 1 << 21, 1 << 19, 1 << 18
SAMPLE_ROWS = 1 << 16, 1 << 8  # from which the ranges of the buckets are read off: in all, and for each of many
THREADS = 8  # of DuckDB: each holds pages of its own


class RankedScores:
    """Scored documents by key descending, ties by doc_id ascending (in the order of code points).

    The key is the score; at a temperature T > 0 it is ``score + T * g`` in single precision, with standard Gumbel noise

        g = -ln(-ln u),   u = (m + 1/2) / 2^52,   m = the first 13 hexadecimal digits of md5("<seed>/<doc_id>"),

    a function of seed and doc_id alone. The document i is then first with probability proportional to exp(score_i / T),
    and so on among those that remain (Gumbel-max): a sample without replacement.

    Args:
        scores: folder of Parquet files, or the files: ``doc_id, source, n_tokens, score``.
        scratch: existing folder for temporary files; the caller removes it.
        temperature: T.
        seed: of the noise.
        clusters: file of near-duplicates (``doc_id, cluster``), of these documents among others.
        cap: documents of a cluster that are no surplus, by rank; with ``clusters``.

    Attributes:
        sources: in alphabetical order; S below is an index into it.
        documents_S: scored, of each source.
        tokens_S: scored, of each source.

    Raises:
        BilectError: no files, a file that cannot be read or lacks a column, a score that is missing or not finite, any
            other value that is missing, no documents, or a doc_id that occurs twice.
    """

    def __init__(
        self, scores: Path | Sequence[Path], scratch: Path, temperature: float = 0.0, seed: int = 0,
        clusters: Path | None = None, cap: int = 1,
    ) -> None:  # fmt: skip
        files = sorted(scores.glob("*.parquet")) if isinstance(scores, Path) else list(scores)
        if not files:
            raise BilectError(f"select: no score files in {scores}" if isinstance(scores, Path)
                              else "select: no score files")  # fmt: skip
        for file in files:
            _check_columns(file)
        self.noisy, self._scratch = temperature > 0, scratch
        with duckdb.connect() as db:
            db.execute(f"SET memory_limit = '1GB'; SET temp_directory = {quoted(scratch / 'duckdb')}")
            db.execute(f"SET threads = {min(os.cpu_count() or 1, THREADS)}; SET enable_progress_bar = false")
            db.execute("SET enable_external_file_cache = false")  # the score files, read three times: the system's task
            db.execute("SET preserve_insertion_order = false; SET arrow_large_buffer_size = true")
            unit = f"(('0x' || md5('{seed}/' || doc_id::VARCHAR)[:13])::BIGINT + 0.5::DOUBLE) / {2**52}::DOUBLE"
            noise = f" + {temperature!r}::DOUBLE * -ln(-ln({unit}))" if self.noisy else ""
            db.execute(
                f"""CREATE VIEW pool AS SELECT doc_id::VARCHAR AS doc_id, source::VARCHAR AS source,
                      n_tokens::INTEGER AS n_tokens, score::FLOAT AS score, (score::DOUBLE{noise})::FLOAT AS key
                    FROM {parquet_table(*files)}"""
            )
            try:
                self._account(db)
                if clusters is not None:
                    _find_surplus(db, clusters, cap)
                self._buckets = self._scan(db, surplus=clusters is not None)
            except duckdb.Error:
                for file in files:  # a damaged page: its file is not named
                    _read_through(file)
                raise

    def _account(self, db: duckdb.DuckDBPyConnection) -> None:
        infinite, absent = db.execute(
            """SELECT count(*) FILTER (score IS NULL OR NOT isfinite(score)),
                 count(*) FILTER (source IS NULL OR n_tokens IS NULL) FROM pool"""
        ).fetchall()[0]
        if infinite:
            first = db.execute("SELECT min(doc_id) FROM pool WHERE score IS NULL OR NOT isfinite(score)").fetchall()
            raise BilectError(f"select: scores of {infinite} documents are not finite, {first[0][0]!r} for one")
        if absent:
            raise BilectError(f"select: {absent} documents lack their source or n_tokens")
        rows = db.execute("SELECT source, count(*), sum(n_tokens) FROM pool GROUP BY source ORDER BY source").fetchall()
        if not rows:
            raise BilectError("select: no documents in the score files")
        self.sources = [r[0] for r in rows]
        self.documents_S = np.array([r[1] for r in rows], np.int64)
        self.tokens_S = np.array([int(r[2]) for r in rows], np.int64)

    def _scan(self, db: duckdb.DuckDBPyConnection, surplus: bool) -> list[Rows]:
        """Write every document into the bucket of its key, from the highest keys to the lowest; refuse duplicates."""
        documents = int(self.documents_S.sum())
        edges = _edges(db, documents)
        key = "key" if self.noisy else "score"
        names = ", ".join(map(quoted, self.sources))
        columns = ["doc_id", f"source::ENUM({names}) AS source", "n_tokens", "score"]
        columns += ["key"] * self.noisy + ["best"] * surplus
        query = f"SELECT {', '.join(columns)}, hash(doc_id) AS hash FROM pool"
        buckets = [Rows(self._scratch / f"bucket-{i}") for i in range(len(edges) + 1)]
        hashes = Hashes(self._scratch / "hashes", documents)
        for batch in db.sql(query + " LEFT JOIN surplus USING (doc_id)" * surplus).to_arrow_reader(SCAN_ROWS):
            if batch["doc_id"].null_count:
                raise BilectError(f"select: {batch['doc_id'].null_count} documents lack their doc_id")
            hashes.append(batch["hash"].to_numpy())
            batch = batch.drop_columns("hash").set_column(1, "source", batch["source"].indices.cast(pa.int32()))
            at_D = _bucket_of(edges, batch[key].to_numpy(), batch["doc_id"])
            order_D, ends = split(at_D, len(buckets))
            batch = batch.take(pa.array(order_D)) if edges else batch
            for bucket, begin, end in zip(buckets, [0, *ends], ends, strict=False):
                bucket.append(batch.slice(begin, end - begin))
        if len(repeated := hashes.repeated()):  # equal doc_ids, or (once in 40 pools of a billion) different ones
            db.register("repeated", pa.table({"hash": repeated}))
            count, example = db.execute(
                """SELECT count(*), min(doc_id) FROM (SELECT doc_id FROM pool WHERE hash(doc_id) IN (FROM repeated)
                   GROUP BY doc_id HAVING count(*) > 1)"""
            ).fetchall()[0]
            if count:
                raise BilectError(f"select: {count} doc_ids were scored more than once, {example!r} for one")
        return buckets

    def chunks(self) -> Iterator[pa.Table]:
        """``doc_id, source, n_tokens, score, rank`` (and ``key`` where it is not the score), ranks 1 ... N in order.

        ``CHUNK_ROWS`` documents each but for the last. With clusters also ``best``: null, or the best document of its
        cluster where the document is surplus, that is behind ``cap`` others of it. The source is dictionary-encoded,
        with ``sources`` for its dictionary.
        """
        rank = 1
        for table in _cut(self._in_order(), CHUNK_ROWS):
            yield table.add_column(4, "rank", pa.array(np.arange(rank, rank + len(table))))
            rank += len(table)

    def _in_order(self) -> Iterator[pa.Table]:
        """Each bucket, from its best document to its worst."""

        def read(bucket: Rows) -> pa.Table:
            table = bucket.read()
            packed = _packed(table["key" if self.noisy else "score"].to_numpy())
            table = table.take(pa.array(_ties_by_doc_id(packed, table["doc_id"].chunk(0))))
            source = pa.DictionaryArray.from_arrays(table["source"].chunk(0), pa.array(self.sources))
            return table.set_column(1, "source", source)

        filled = [bucket for bucket in self._buckets if bucket.count]
        with ThreadPoolExecutor(1) as executor:  # the next is sorted while the caller is busy with one
            coming = executor.submit(read, filled[0])
            for following in [*filled[1:], None]:
                table = coming.result()
                if following is not None:
                    coming = executor.submit(read, following)
                yield table


def _find_surplus(db: duckdb.DuckDBPyConnection, clusters: Path, cap: int) -> None:
    """The documents behind ``cap`` others of their cluster, and the best of it: the table ``surplus``."""
    db.execute(
        f"""CREATE TABLE surplus AS SELECT doc_id, any_value(best) AS best FROM (
              SELECT doc_id, row_number() OVER ranked AS place, first_value(doc_id) OVER ranked AS best
              FROM pool JOIN {parquet_table(clusters)} USING (doc_id)
              WINDOW ranked AS (PARTITION BY cluster ORDER BY key DESC, doc_id))
            WHERE place > {cap} GROUP BY doc_id"""  # grouped: a doc_id that was scored twice is found out later
    )


Edge = tuple[float, str]  # minus the key, and a doc_id: pairs rise with the rank


def _edges(db: duckdb.DuckDBPyConnection, documents: int) -> list[Edge]:
    """First documents, about, of all buckets but the first: equal keys alone must not fill one."""
    count = -(-documents // BUCKET_ROWS)
    if count == 1:
        return []
    size = max(SAMPLE_ROWS[0], SAMPLE_ROWS[1] * count)
    sample = db.execute(f"SELECT -key, doc_id FROM pool WHERE doc_id IS NOT NULL USING SAMPLE {size} ROWS").fetchall()
    sample.sort()
    return sorted({sample[len(sample) * i // count] for i in range(1, count)}) if sample else []


def _bucket_of(edges: list[Edge], key_D: np.ndarray, doc_id: pa.LargeStringArray) -> np.ndarray:
    edge_E = np.array([edge[0] for edge in edges], np.float32)
    at_D, upto_D = (np.searchsorted(edge_E, -key_D, side) for side in ("left", "right"))
    if len(equal := np.flatnonzero(at_D < upto_D)):  # to the key of an edge
        pairs = zip((-key_D[equal]).tolist(), doc_id.take(pa.array(equal)).to_pylist(), strict=True)
        at_D[equal] = [bisect_right(edges, pair) for pair in pairs]
    return at_D


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of equal length, whatever the buckets were."""
    parts: list[pa.Table] = []
    missing = rows
    for table in tables:
        while len(table):
            parts.append(table.slice(0, missing))
            missing, table = missing - len(parts[-1]), table.slice(missing)
            if not missing:
                yield pa.concat_tables(parts).combine_chunks()
                parts, missing = [], rows
    if parts:
        yield pa.concat_tables(parts).combine_chunks()


def _packed(key: np.ndarray) -> np.ndarray:
    """Sorted 64-bit integers: the key in 32 bits, the higher the key the lower they are, above the row number."""
    bits = (key + np.float32(0)).view(np.uint32)  # -0 becomes +0, which it equals
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))  # IEEE floats sort like sign and magnitude
    packed = falling.astype(np.uint64) << 32
    packed |= np.arange(len(key), dtype=np.uint64)
    packed.sort()
    return packed


def _ties_by_doc_id(packed: np.ndarray, doc_id: pa.LargeStringArray) -> np.ndarray:
    """Row numbers in order of rank."""
    rows, key = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64), packed >> 32
    same = key[1:] == key[:-1]
    if same.any():
        tied = np.flatnonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))
        batch = pa.record_batch({"key": key[tied], "doc_id": doc_id.take(pa.array(rows[tied]))})
        rows[tied] = rows[tied][pc.sort_indices(batch, [("key", "ascending"), ("doc_id", "ascending")])]
    return rows


def _check_columns(file: Path) -> None:
    try:
        names = pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise BilectError(f"select: {file} is not a readable Parquet file: {reason(error)}") from error
    for name in COLUMNS:
        if name not in names:
            raise BilectError(f"select: {file} has no column {name!r}")


def _read_through(file: Path) -> None:
    try:
        for _ in pq.ParquetFile(file).iter_batches(columns=list(COLUMNS)):
            pass
    except (pa.ArrowException, OSError) as error:
        raise BilectError(f"select: {file} is damaged: {reason(error)}") from error
