"""Losses of single held-out documents, where a run recorded them: what a paired interval is made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bilect.report.inputs import RunFiles

__all__ = ["DocumentLosses", "document_losses"]

FILE = "eval-documents.parquet"


@dataclass(frozen=True)
class DocumentLosses:
    """Of each held-out document: its set, summed loss in nats and predicted tokens, in the order of the sets."""

    set_N: np.ndarray
    loss_N: np.ndarray
    tokens_N: np.ndarray

    @staticmethod
    def paired(a: DocumentLosses, b: DocumentLosses) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Difference of the mean losses, tokens and set of each document; None where the two are not of the same."""
        same = np.array_equal(a.set_N, b.set_N) and np.array_equal(a.tokens_N, b.tokens_N)
        if not same or len(a.loss_N) < 2:
            return None
        tokens_N = np.maximum(a.tokens_N, 1).astype(np.float64)
        group_N = np.unique(a.set_N, return_inverse=True)[1]
        return (a.loss_N - b.loss_N) / tokens_N, tokens_N, group_N


def document_losses(run: RunFiles, arm: str, number: int) -> DocumentLosses | None:
    """Of an arm's target after a round; None where they were not recorded or cannot be read."""
    import pyarrow.parquet as pq

    path = run.root / run.folder(arm, number) / FILE
    try:
        table = pq.read_table(path, columns=["set", "loss", "tokens"])
    except (OSError, ValueError, KeyError):  # pyarrow's errors derive from these
        return None
    set_N, loss_N, tokens_N = (table[name].to_numpy() for name in ("set", "loss", "tokens"))
    sound = len(loss_N) > 0 and np.isfinite(loss_N).all()
    return DocumentLosses(set_N, loss_N.astype(np.float64), tokens_N) if sound else None
