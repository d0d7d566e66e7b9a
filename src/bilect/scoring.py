"""Score a shard of the pool: one Parquet file with ``doc_id, source, n_tokens, score`` per part of the shard."""

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
from bilect.runtime.device import autocast

__all__ = ["ROWS_PER_FILE", "score_rows", "write_scores"]

ROWS_PER_FILE = 16_384


@torch.no_grad()
def score_rows(
    score_model: ScoreModel,
    store: TokenStore,
    rows: np.ndarray,
    pad_id: int,
    *,
    batch_tokens: int = 8192,
    bf16: bool = False,
    on_documents: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Scores in the order of ``rows``; higher means keep. Batching and padding never change a score.

    Args:
        score_model: in evaluation mode.
        store: of the documents.
        rows: which of them.
        pad_id: padding token.
        batch_tokens: padded tokens per batch.
        bf16: matrix products in bfloat16.
        on_documents: called with the number of documents just scored.
    """
    score_model.eval()
    scores = np.empty(len(rows), dtype=np.float32)
    place = np.empty(len(store), dtype=np.int64)
    place[rows] = np.arange(len(rows))
    for part in length_bucketed(store.length_R, rows, batch_tokens):
        batch = make_batch(store.rows(part), pad_id).to(score_model.device)
        with autocast(score_model.device, bf16):
            score_B = score_model(batch.input_ids_BT, batch.mask_BT).scores
        scores[place[part]] = score_B.float().cpu().numpy()
        on_documents(len(part))
    return scores


def write_scores(
    score_model: ScoreModel,
    store: TokenStore,
    rows: np.ndarray,
    folder: Path,
    pad_id: int,
    *,
    batch_tokens: int = 8192,
    bf16: bool = False,
    on_documents: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Score rows part by part into ``folder/part-00000.parquet`` and so on; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, part in enumerate(_parts(rows, ROWS_PER_FILE)):
        scores = score_rows(
            score_model, store, part, pad_id, batch_tokens=batch_tokens, bf16=bf16, on_documents=on_documents
        )
        table = pa.table(
            {
                "doc_id": [store.doc_ids[i] for i in part],
                "source": [store.sources[i] for i in part],
                "n_tokens": pa.array(store.length_R[part], pa.int32()),
                "score": pa.array(scores, pa.float32()),
            }
        )
        files.append(folder / f"part-{number:05d}.parquet")
        pq.write_table(table, files[-1])
    return files


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
