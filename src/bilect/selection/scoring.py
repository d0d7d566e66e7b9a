"""Score token rows: one Parquet file with ``doc_id, source, n_tokens, score`` per token file, written atomically.

``n_tokens`` counts the tokens beyond the context too: what a record brings to a training, and what budgets count.

A file that is there is not scored again, so an interrupted run goes on at the first missing one. Memory depends on
``ROWS_AT_ONCE``, not on the size of the corpus.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bilect.data.batch import make_batch
from bilect.data.loading import length_bucketed
from bilect.data.tokens import TokenStore
from bilect.models.score_model import ScoreModel
from bilect.runtime import distributed
from bilect.runtime.device import autocast

__all__ = ["ROWS_AT_ONCE", "score_rows", "write_scores"]

ROWS_AT_ONCE = 16_384  # documents that are sorted by length together; a row group of the score file

_SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("source", pa.string()), ("n_tokens", pa.int32()), ("score", pa.float32())]
)


@torch.no_grad()
def score_rows(
    score_model: ScoreModel,
    store: TokenStore,
    rows: np.ndarray,
    pad_id: int,
    *,
    batch_tokens: int = 8192,
    bf16: bool = False,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Scores in the order of ``rows``; higher means keep. Batching and padding never change a score.

    Args:
        score_model: in evaluation mode.
        store: of the documents.
        rows: which of them.
        pad_id: padding token.
        batch_tokens: padded tokens per batch.
        bf16: matrix products in bfloat16.
        on_tokens: called with the number of tokens just scored.
    """
    score_model.eval()
    scores = np.empty(len(rows), dtype=np.float32)
    length_M = store.length_R[rows]
    for part in length_bucketed(length_M, np.arange(len(rows)), batch_tokens):
        batch = make_batch(store.rows(rows[part]), pad_id).to(score_model.device)
        with autocast(score_model.device, bf16):
            score_B = score_model(batch.input_ids_BT, batch.mask_BT).scores
        scores[part] = score_B.float().cpu().numpy()
        on_tokens(int(length_M[part].sum()))
    return scores


def write_scores(
    score: Callable[[np.ndarray], np.ndarray],
    store: TokenStore,
    rows: np.ndarray,
    folder: Path,
    on_found: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Score rows into one file per token file of the store, ``folder/00000-STEM.parquet``; returns the files.

    Of several ranks, each takes every so-manieth file.

    Args:
        score: scores of some rows of the store, in their order; higher means keep.
        store: of the documents.
        rows: which of them, sorted.
        folder: of the score files; those that are there already are kept.
        on_found: called with the number of tokens found scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, part in enumerate(store.parts):
        own = rows[np.searchsorted(rows, part.rows.start) : np.searchsorted(rows, part.rows.stop)]
        files.append(folder / f"{part.name}.parquet")
        if number % distributed.world_size() != distributed.rank():
            continue
        if files[-1].exists():
            on_found(int(store.length_R[own].sum()))
            continue
        draft = files[-1].with_suffix(".partial")
        with pq.ParquetWriter(draft, _SCHEMA) as writer:
            for some in _pieces(own, ROWS_AT_ONCE):
                scores = np.asarray(score(some), dtype=np.float32)
                columns = [store.doc_ids(some), store.sources(some), store.whole_R[some], scores]
                writer.write_table(pa.table(columns, schema=_SCHEMA))
        os.replace(draft, files[-1])
    distributed.barrier()
    return files


def _pieces(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
