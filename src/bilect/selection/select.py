"""Keep the top of the scored documents, or a sample that favours it, within a budget and shares of the sources."""

import difflib
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bilect.config import SelectionConfig
from bilect.errors import BilectError
from bilect.selection.ranking import RankedScores

__all__ = ["BELOW_THE_CUT", "NEAR_DUPLICATE", "SOURCE_FULL", "Selected", "select"]

BELOW_THE_CUT, SOURCE_FULL = "below the cut", "its source is at its maximum share"
NEAR_DUPLICATE = "near-duplicate of"  # and a doc_id


@dataclass(frozen=True)
class Selected:
    """What a selection kept.

    Attributes:
        documents: kept.
        tokens: kept.
        pool_documents: scored in all.
        pool_tokens: scored in all.
        budget: what was to be kept, in units of ``unit``.
        unit: "documents" under top_k, else "tokens".
        threshold: lowest score kept.
        kept_share: source -> share of the kept tokens.
        pool_share: source -> share of the scored tokens.
        kept_fraction: source -> share of its documents that was kept.
        near_duplicates: documents left out because their cluster has better ones.
    """

    documents: int
    tokens: int
    pool_documents: int
    pool_tokens: int
    budget: float
    unit: Literal["tokens", "documents"]
    threshold: float
    kept_share: dict[str, float]
    pool_share: dict[str, float]
    kept_fraction: dict[str, float]
    near_duplicates: int = 0

    @property
    def note(self) -> str:
        """One line where the budget was not reached, else empty."""
        kept = self.tokens if self.unit == "tokens" else self.documents
        if kept >= self.budget:
            return ""
        if self.documents == self.pool_documents:
            why = "there are no more"
        elif self.documents + self.near_duplicates == self.pool_documents:
            why = "the others are near-duplicates"
        else:
            why = "max_share allows no more"
        return f"kept {kept:,} of a budget of {self.budget:,.0f} {self.unit}: {why}"


def select(
    scores: Path | Sequence[Path], out: Path, config: SelectionConfig, *, seed: int = 0, clusters: Path | None = None
) -> Selected:
    """Write ``kept.parquet`` and ``dropped.parquet`` into ``out`` and account for them.

    Documents are ranked by score, or by score plus Gumbel noise at a temperature: ``RankedScores`` has the rule. The
    budget T is in tokens, or in documents under top_k, where a document counts as 1 in all that follows. Of each
    cluster of near-duplicates, the documents behind its first max_per_cluster are *surplus*: they are not taken and
    count for nothing. Within each source, the others are counted in order of rank:

    - one is *reserved* if those of its source before it come to less than min_share T;
    - one is *eligible* if those of its source up to and including it come to no more than max_share T.

    Eligible documents are taken in order of rank, the reserved ones before all others, until T is reached: the last may
    pass over it by less than its own length. A share of T is rounded to six decimals, so that 0.29 of 100 is 29.

    Both files hold ``doc_id, source, n_tokens, score, rank`` (at a temperature also ``key``, the noisy score) in order
    of rank. In dropped.parquet ``reason`` is ``BELOW_THE_CUT`` from the first eligible document on that was not taken,
    and ``SOURCE_FULL`` before; that of a surplus document is ``NEAR_DUPLICATE`` and the best of its cluster. Both
    appear when they are complete; files of these names are replaced.

    Args:
        scores: as RankedScores.
        out: folder to write.
        config: the settings.
        seed: of the noise.
        clusters: the near-duplicates (``data.near_duplicates.cluster_file``), needed for max_per_cluster.

    Raises:
        BilectError: as RankedScores; max_per_cluster without clusters; shares of a source that was not scored;
            nothing to keep.
    """
    cap = config.max_per_cluster
    if cap is not None and clusters is None:
        raise BilectError("select: max_per_cluster compares texts, and there are none beside these scores; select from "
                          "a run, or from what `bilect score --data` wrote")  # fmt: skip
    made = not out.parent.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        ranked = RankedScores(scores, scratch, config.temperature, seed, clusters if cap else None, cap or 1)
        selected = _write(ranked, _Taking(config, ranked), scratch)
        out.mkdir(exist_ok=True)
        for name in ("dropped.parquet", "kept.parquet"):
            os.replace(scratch / name, out / name)
    except BaseException:
        if made:
            shutil.rmtree(out.parent, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return selected


def _write(ranked: RankedScores, taking: "_Taking", folder: Path) -> Selected:
    size = len(ranked.sources)
    documents_S, tokens_S, threshold = np.zeros(size, np.int64), np.zeros(size, np.int64), np.inf
    near_duplicates = 0
    with ExitStack() as stack:

        def writer(name: str, like: pa.Table) -> pq.ParquetWriter:
            # ids, scores and ranks do not repeat: dictionaries and statistics of them would be costly and of no use,
            # and squeezing ids by a third takes an eighth of the whole time
            options = {
                "compression": {name: "none" if name == "doc_id" else "snappy" for name in like.column_names},
                "use_dictionary": ["source", "reason"],
                "write_statistics": ["rank", "score"],
                "column_encoding": {"rank": "DELTA_BINARY_PACKED"},
                "store_schema": False,
            }
            return stack.enter_context(pq.ParquetWriter(folder / name, like.schema, **options))

        kept_file = dropped_file = None
        pool, writes = stack.enter_context(ThreadPoolExecutor(1)), list[Future[None]]()
        for chunk in ranked.chunks():
            taken, full = taking.step(chunk)
            reason = _reasons(chunk, full)
            if "best" in chunk.column_names:
                near_duplicates += len(chunk) - chunk["best"].null_count
                chunk = chunk.drop_columns("best")
            kept, dropped = _filter(chunk, taken), _filter(chunk.append_column("reason", reason), ~taken)
            kept_file = kept_file or writer("kept.parquet", kept)
            dropped_file = dropped_file or writer("dropped.parquet", dropped)
            for write in writes:  # one chunk is written while the next is sorted out
                write.result()
            parts = ((dropped_file, dropped), (kept_file, kept))
            writes = [pool.submit(file.write_table, part) for file, part in parts if len(part)]
            if len(kept):
                source, n_tokens = _source(kept), kept["n_tokens"].to_numpy()
                documents_S += np.bincount(source, minlength=size)
                tokens_S += np.bincount(source, weights=n_tokens, minlength=size).astype(np.int64)
                threshold = min(threshold, float(kept["score"].to_numpy().min()))
        for write in writes:
            write.result()
    tokens, pool_tokens = int(tokens_S.sum()), int(ranked.tokens_S.sum())
    if not tokens:
        raise BilectError(f"select: nothing to keep of {pool_tokens} tokens: raise the budget or max_share")
    return Selected(
        int(documents_S.sum()),
        tokens,
        int(ranked.documents_S.sum()),
        pool_tokens,
        taking.budget,
        taking.unit,
        threshold,
        _by_source(ranked, tokens_S / tokens),
        _by_source(ranked, ranked.tokens_S / pool_tokens),
        _by_source(ranked, documents_S / ranked.documents_S),
        near_duplicates,
    )


class _Taking:
    """The rule of ``select``, over chunks of documents in order of rank (index D in a chunk, S over sources)."""

    def __init__(self, config: SelectionConfig, ranked: RankedScores) -> None:
        sources, pool_tokens = ranked.sources, int(ranked.tokens_S.sum())
        self.unit: Literal["tokens", "documents"] = "tokens" if config.top_k is None else "documents"
        self.budget = config.budget(pool_tokens) if config.top_k is None else float(config.top_k)
        for name in [*config.min_share, *config.max_share]:
            if name != "*" and name not in sources:
                near = difflib.get_close_matches(name, sources, n=1, cutoff=0.0)[0]
                raise BilectError(f"select: no source {name!r} was scored; did you mean {near!r}?")
        others = config.max_share.get("*")
        least, most = config.min_share, {s: config.max_share.get(s, others) for s in sources}
        self._least_S = np.array([round(least.get(s, 0.0) * self.budget, 6) for s in sources])
        self._most_S = np.array([np.inf if (m := most[s]) is None else round(m * self.budget, 6) for s in sources])
        self._counted_S = np.zeros(len(sources))
        self._reserved = self._other = 0.0  # counted so far, of the eligible
        self._cut, self._shares = False, bool(config.min_share or config.max_share)
        self._all_reserved = self._count_reserved(ranked) if least else 0.0

    def step(self, chunk: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Which of the next documents are taken, and which of the others are left because their source is full."""
        if self._cut and not self._shares:  # nothing more is taken: most of a pool, at no cost
            return np.zeros(len(chunk), bool), np.zeros(len(chunk), bool)
        size_D, reserved_D, eligible_D = self._within_sources(chunk)
        first_D, then_D = size_D * (eligible_D & reserved_D), size_D * (eligible_D & ~reserved_D)
        before_first_D = self._reserved + np.cumsum(first_D) - first_D
        before_then_D = self._all_reserved + self._other + np.cumsum(then_D) - then_D
        taken_D = eligible_D & (np.where(reserved_D, before_first_D, before_then_D) < self.budget)
        self._reserved += first_D.sum()
        self._other += then_D.sum()
        below_D = np.logical_or.accumulate(eligible_D & ~taken_D) | self._cut
        self._cut = bool(below_D[-1])
        return taken_D, ~taken_D & ~below_D

    def _within_sources(self, chunk: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(size, reserved, eligible), advancing the count of each source."""
        tokens = self.unit == "tokens"
        size_D = chunk["n_tokens"].to_numpy().astype(np.float64) if tokens else np.ones(len(chunk))
        running_D = np.ones(len(chunk), bool)
        if "best" in chunk.column_names:
            running_D = chunk["best"].is_null().to_numpy()
            size_D *= running_D
        if not self._shares:
            return size_D, np.zeros(len(chunk), bool), running_D
        source_D = _source(chunk)
        order = np.argsort(source_D, kind="stable")
        sum_S = np.bincount(source_D, weights=size_D, minlength=len(self._counted_S))
        earlier_S = np.cumsum(sum_S) - sum_S  # of the sources before it in this order
        upto_D = np.empty(len(size_D))
        upto_D[order] = np.cumsum(size_D[order]) + (self._counted_S - earlier_S)[source_D[order]]
        self._counted_S += sum_S
        eligible_D = running_D & (upto_D <= self._most_S[source_D])
        return size_D, upto_D - size_D < self._least_S[source_D], eligible_D

    def _count_reserved(self, ranked: RankedScores) -> float:
        total = 0.0
        for chunk in ranked.chunks():
            size_D, reserved_D, eligible_D = self._within_sources(chunk)
            total += size_D[reserved_D & eligible_D].sum()
            if (self._counted_S >= self._least_S).all():
                break
        self._counted_S[:] = 0.0
        return total


def _reasons(chunk: pa.Table, full_D: np.ndarray) -> pa.DictionaryArray:
    """Why each document is dropped, if it is."""
    if "best" not in chunk.column_names:
        return pa.DictionaryArray.from_arrays(pa.array(full_D.astype(np.int8)), [BELOW_THE_CUT, SOURCE_FULL])
    surplus_D, code_D = chunk["best"].is_valid().to_numpy(), full_D.astype(np.int32)
    best = chunk["best"].drop_null().combine_chunks().dictionary_encode()
    code_D[surplus_D] = np.asarray(best.indices) + 2
    near = [f"{NEAR_DUPLICATE} {doc_id}" for doc_id in best.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(pa.array(code_D), [BELOW_THE_CUT, SOURCE_FULL, *near])


def _source(table: pa.Table) -> np.ndarray:
    return table["source"].combine_chunks().indices.to_numpy()


def _filter(table: pa.Table, which: np.ndarray) -> pa.Table:
    return table if which.all() else table.filter(pa.array(which)) if which.any() else table.slice(0, 0)


def _by_source(ranked: RankedScores, values_S: np.ndarray) -> dict[str, float]:
    return dict(zip(ranked.sources, values_S.tolist(), strict=True))
