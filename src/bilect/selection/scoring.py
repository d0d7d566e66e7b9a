"""Score token rows: one Parquet file with ``doc_id, source, n_tokens, score`` per token file, written atomically.

``n_tokens`` counts the tokens beyond the context too: what a record brings to a training, and what budgets count.

A file is made of blocks of ``ROWS_AT_ONCE`` rows, one row group each. What is there, file or block, is not scored
again, so an interrupted run goes on at the first block that is missing. Memory does not depend on the corpus's size.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bilect.data.batch import make_batch
from bilect.data.loading import length_bucketed
from bilect.data.tokens import TokenStore
from bilect.engines import Engine, Together
from bilect.models.score_model import ScoreModel
from bilect.runtime import distributed
from bilect.runtime.device import autocast
from bilect.runtime.files import draft_of

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
    scores, parts, found = np.empty(len(rows), dtype=np.float32), list[np.ndarray](), list[torch.Tensor]()
    length_M = store.length_R[rows]
    for part in length_bucketed(length_M, np.arange(len(rows)), batch_tokens):
        batch = make_batch(store.rows(rows[part]), pad_id).to(score_model.device)
        with autocast(score_model.device, bf16):
            score_B = score_model(batch.input_ids_BT, batch.mask_BT, right_padded=True).scores
        parts.append(part)
        found.append(score_B.float())  # fetched at the end: a GPU goes on while the next batch is made
        on_tokens(int(length_M[part].sum()))
    if parts:
        scores[np.concatenate(parts)] = torch.cat(found).cpu().numpy()
    return scores


def write_scores(
    score: Callable[[np.ndarray], np.ndarray],
    store: TokenStore,
    rows: np.ndarray,
    folder: Path,
    on_tokens: Callable[[int], None] = lambda n: None,
    engine: Engine | None = None,
) -> list[Path]:
    """Score rows into one file per token file of the store, ``folder/00000-STEM.parquet``; returns the files.

    Several ranks call it with the same rows, and share the blocks.

    Args:
        score: scores of some rows of the store, in their order; higher means keep. Pickled where there are workers.
        store: of the documents.
        rows: which of them, sorted.
        folder: of the score files; those that are there already are kept.
        on_tokens: called with the number of tokens just scored, or found scored.
        engine: where blocks are scored; by default all ranks.
    """
    drafts = folder / ".blocks"
    drafts.mkdir(parents=True, exist_ok=True)
    files, missing = [folder / f"{part.name}.parquet" for part in store.parts], list[_File]()
    for part, file in zip(store.parts, files, strict=True):
        own = rows[np.searchsorted(rows, part.rows.start) : np.searchsorted(rows, part.rows.stop)]
        if file.exists():
            on_tokens(int(store.length_R[own].sum()))
        else:
            missing.append(_File(file, [_Block(drafts / f"{part.name}-{n:06d}.parquet", some) for n, some in
                                          enumerate(_pieces(own, ROWS_AT_ONCE))]))  # fmt: skip
    made = (engine or Together()).map(_Score(score, store), (block for one in missing for block in one.blocks))
    for one in missing:
        for _ in one.blocks:
            on_tokens(next(made))
        if distributed.is_main():
            _join(one)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(drafts)
    return files


def _join(one: "_File") -> None:
    draft = one.path.with_suffix(".partial")
    with pq.ParquetWriter(draft, _SCHEMA) as writer:
        for block in one.blocks:
            writer.write_table(pq.read_table(block.file))
    os.replace(draft, one.path)
    for block in one.blocks:
        block.file.unlink()


@dataclass(frozen=True)
class _Block:
    file: Path
    rows: np.ndarray


@dataclass(frozen=True)
class _File:
    path: Path
    blocks: list[_Block]


@dataclass
class _Score:
    """Scores a block, unless that is done; returns its tokens."""

    score: Callable[[np.ndarray], np.ndarray]
    store: TokenStore

    def __call__(self, block: _Block) -> int:
        store, rows = self.store, block.rows
        if not block.file.is_file():
            scores = np.asarray(self.score(rows), dtype=np.float32)
            columns = [store.doc_ids(rows), store.sources(rows), store.whole_R[rows], scores]
            with draft_of(block.file) as draft:
                pq.write_table(pa.table(columns, schema=_SCHEMA), draft)
        return int(store.length_R[rows].sum())


def _pieces(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
