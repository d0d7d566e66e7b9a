"""Score files in order of rank, out of core: DuckDB reads and checks, numpy sorts integers, strings move once.

Sorting rows that carry a string each is what costs most, so rows are not sorted. A scan appends every column to a file
of its own; the keys alone are sorted, packed with their row numbers into 64-bit integers; the other columns are then
gathered a chunk at a time, in order, from the mapped files. Above ``BUCKET_ROWS`` documents the scan splits them by
ranges of the key first, and each range is treated so in its turn. Memory: 8 bytes for every document (the search for
duplicates), and what one bucket needs.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bilect.errors import BilectError, reason

__all__ = ["RankedScores", "quoted"]

COLUMNS = ("doc_id", "source", "n_tokens", "score")
BUCKET_ROWS, CHUNK_ROWS, SCAN_ROWS = 1 << 25, 1 << 19, 1 << 19
AHEAD = 2  # chunks that are gathered beforehand
SAMPLE_ROWS = 1 << 16  # from which the ranges of the buckets are read off


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
        best_N: doc_id of the best of its cluster for each surplus document; None without ``clusters``.

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
            db.execute("SET preserve_insertion_order = false; SET arrow_large_buffer_size = true")
            unit = f"(('0x' || md5('{seed}/' || doc_id::VARCHAR)[:13])::BIGINT + 0.5::DOUBLE) / {2**52}::DOUBLE"
            noise = f" + {temperature!r}::DOUBLE * -ln(-ln({unit}))" if self.noisy else ""
            db.execute(
                f"""CREATE VIEW pool AS SELECT doc_id::VARCHAR AS doc_id, source::VARCHAR AS source,
                      n_tokens::INTEGER AS n_tokens, score::FLOAT AS score, (score::DOUBLE{noise})::FLOAT AS key
                    FROM read_parquet([{", ".join(map(quoted, files))}])"""
            )
            try:
                self._account(db)
                self.best_N = None if clusters is None else _find_surplus(db, clusters, cap)
                self._buckets = self._scan(db)
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

    def _scan(self, db: duckdb.DuckDBPyConnection) -> list["_Bucket"]:
        """Write every document into the bucket of its key, from the highest keys to the lowest; refuse duplicates."""
        documents = int(self.documents_S.sum())
        edges = np.empty(0, np.float32)
        if documents > BUCKET_ROWS:
            sample = db.execute(f"SELECT key FROM pool USING SAMPLE {SAMPLE_ROWS} ROWS").fetchnumpy()["key"]
            count = -(-documents // BUCKET_ROWS)
            edges = np.unique(-np.quantile(sample, np.arange(1, count) / count, method="nearest"))
        more = [name for name, has in (("key", self.noisy), ("surplus", self.best_N is not None)) if has]
        buckets = [_Bucket(self._scratch / f"bucket-{i}", more) for i in range(len(edges) + 1)]
        names = ", ".join(map(quoted, self.sources))
        hashes, done = np.empty(documents, np.uint64), 0
        columns = ["doc_id", f"source::ENUM({names}) AS source", "n_tokens", "score", "hash(doc_id) AS hash"]
        columns += ["coalesce(surplus, -1)::INTEGER AS surplus" if name == "surplus" else name for name in more]
        joined = " LEFT JOIN surplus USING (doc_id)" if "surplus" in more else ""
        query = f"SELECT {', '.join(columns)} FROM pool{joined}"
        for batch in db.sql(query).to_arrow_reader(SCAN_ROWS):
            if batch["doc_id"].null_count:
                raise BilectError(f"select: {batch['doc_id'].null_count} documents lack their doc_id")
            hashes[done : done + len(batch)] = batch["hash"].to_numpy()
            done += len(batch)
            if not len(edges):
                buckets[0].append(batch)
                continue
            at = np.searchsorted(edges, -batch["key" if self.noisy else "score"].to_numpy())
            batch, ends = batch.take(pa.array(np.argsort(at, kind="stable"))), np.cumsum(np.bincount(at))
            for bucket, begin, end in zip(buckets, [0, *ends], ends, strict=False):
                bucket.append(batch.slice(begin, end - begin))
        for bucket in buckets:
            bucket.close()
        hashes.sort()
        if (hashes[1:] == hashes[:-1]).any():  # equal documents, or (once in 10^5 pools of 20 million) different ones
            count, example = db.execute(
                "SELECT count(*), min(doc_id) FROM (SELECT doc_id FROM pool GROUP BY doc_id HAVING count(*) > 1)"
            ).fetchall()[0]
            if count:
                raise BilectError(f"select: {count} doc_ids were scored more than once, {example!r} for one")
        return buckets

    def chunks(self) -> Iterator[pa.Table]:
        """``doc_id, source, n_tokens, score, rank`` (and ``key`` where it is not the score), ranks 1 ... N in order.

        With clusters also ``surplus``, an index into ``best_N`` or -1: the document is behind ``cap`` others of its
        cluster. The source is dictionary-encoded, with ``sources`` for its dictionary.
        """
        rank = 1
        with ThreadPoolExecutor(AHEAD) as executor:  # chunks are gathered while the caller is busy with one
            for bucket in self._buckets:
                coming = deque[Future[pa.Table]]()
                for make in bucket.chunks(self.sources):
                    coming.append(executor.submit(make))
                    if len(coming) > AHEAD:
                        table = coming.popleft().result()
                        yield _ranked(table, rank)
                        rank += len(table)
                while coming:
                    table = coming.popleft().result()
                    yield _ranked(table, rank)
                    rank += len(table)


def _find_surplus(db: duckdb.DuckDBPyConnection, clusters: Path, cap: int) -> pa.Array:
    """Number the documents behind ``cap`` others of their cluster (table ``surplus``); return the best of each's."""
    db.execute(
        f"""CREATE TABLE surplus AS SELECT doc_id, best, row_number() OVER (ORDER BY doc_id) - 1 AS surplus FROM (
              SELECT doc_id, any_value(best) AS best FROM (
                SELECT doc_id, row_number() OVER ranked AS place, first_value(doc_id) OVER ranked AS best
                FROM pool JOIN read_parquet({quoted(clusters)}) USING (doc_id)
                WINDOW ranked AS (PARTITION BY cluster ORDER BY key DESC, doc_id))
              WHERE place > {cap} GROUP BY doc_id)"""  # grouped: a doc_id that was scored twice is found out later
    )
    return db.sql("SELECT best FROM surplus ORDER BY surplus").to_arrow_table()["best"].combine_chunks()


def _ranked(table: pa.Table, first: int) -> pa.Table:
    return table.add_column(4, "rank", pa.array(np.arange(first, first + len(table))))


class _Bucket:
    """Documents of one range of keys, each column in a file of its own."""

    def __init__(self, folder: Path, more: list[str]) -> None:
        folder.mkdir()
        self._key = "key" if "key" in more else "score"
        self._types = {
            "end": np.int64,
            "doc_id": np.uint8,
            "source": np.int32,
            "n_tokens": np.int32,
            "score": np.float32,
        }
        self._types |= {name: np.float32 if name == "key" else np.int32 for name in more}
        self._paths = {name: folder / name for name in self._types}
        self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._paths.items()}
        self._bytes = 0

    def append(self, batch: pa.RecordBatch) -> None:
        doc_id = batch["doc_id"]
        _, ends, data = doc_id.buffers()
        ends_B = np.frombuffer(ends, np.int64)[doc_id.offset : doc_id.offset + len(batch) + 1]
        self._files["end"].write((ends_B[1:] - ends_B[0] + self._bytes).data)
        if data is not None:
            self._files["doc_id"].write(memoryview(data)[ends_B[0] : ends_B[-1]])
        self._bytes += int(ends_B[-1] - ends_B[0])
        self._files["source"].write(batch["source"].indices.to_numpy().astype(np.int32).data)
        for name in list(self._types)[3:]:
            self._files[name].write(np.ascontiguousarray(batch[name].to_numpy()).data)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def chunks(self, sources: list[str]) -> Iterator[Callable[[], pa.Table]]:
        """What makes the tables of about ``CHUNK_ROWS`` documents each, in order; for any thread."""
        if not self._paths["end"].stat().st_size:
            return
        column = {n: np.memmap(p, self._types[n], "r") for n, p in self._paths.items() if p.stat().st_size}
        ends = np.concatenate([[0], column.pop("end")])
        data = pa.py_buffer(column.pop("doc_id", np.empty(0, np.uint8)))
        doc_id = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), data)
        packed = _packed(column[self._key])

        def table(begin: int, end: int) -> pa.Table:
            rows = _ties_by_doc_id(packed[begin:end], doc_id)
            values = {n: pa.array(c.take(rows)) for n, c in column.items()}  # unlike c[rows], without Python's lock
            values["source"] = pa.DictionaryArray.from_arrays(values["source"], pa.array(sources))
            return pa.table({"doc_id": doc_id.take(pa.array(rows)), **values})

        begin = 0
        while begin < len(packed):
            last = min(begin + CHUNK_ROWS, len(packed)) - 1
            end = int(np.searchsorted(packed, ((packed[last] >> 32) + np.uint64(1)) << 32))  # ties stay together
            yield partial(table, begin, end)
            begin = end


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


def quoted(text: str | Path) -> str:
    """A string for SQL."""
    return "'" + str(text).replace("'", "''") + "'"


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
