"""DSIR: importance weights of documents from hashed words and word pairs.

    score_i = sum_b c_ib ( log(p_b + eps) - log(q_b + eps) )

with c_ib the count of hash bucket b in document i, p the distribution of the buckets in the upper data and q in the
candidates. Xie et al., arXiv 2302.03169, section 3. The score is the log importance weight itself: Gumbel noise, which
makes a top-k a sample by weight, is ``selection.temperature`` (1 in the paper).

Being a sum, it gives long documents the extreme scores. The paper cuts its pool into equal pieces; where lengths
differ widely the score sorts by length as much as by content, and ``length=mean`` (ours), the sum divided by the
document's n-grams, is the better choice (docs/methods.md has figures).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer

from bilect.data.tokens import TokenStore
from bilect.methods.contract import DocumentMethod, Figures, MethodConfig
from bilect.runtime.progress import Task

__all__ = ["Dsir", "DsirConfig"]

ROWS_AT_ONCE, ROWS_OF_BLOCK = 1024, 1 << 14  # in memory; counted by one process


class DsirConfig(MethodConfig):
    """The features."""

    buckets: PositiveInt = Field(10_000, description="of the hash (paper: 10,000)")
    ngrams: PositiveInt = Field(2, description="longest run of words (paper: 2)")
    length: Literal["sum", "mean"] = Field("sum", description="over the n-grams of a document (paper: sum)")
    epsilon: PositiveFloat = Field(1e-8, description="added to every probability, as in the published code")


class Dsir(DocumentMethod[DsirConfig]):
    """See the module."""

    name = "dsir"
    summary = "importance weights of hashed word n-grams, target over pool (arXiv 2302.03169)"
    Config = DsirConfig
    uses_proxy = False
    log_ratio_H = np.zeros(0)  # log(p + eps) - log(q + eps), H buckets

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Log importance weights, of documents or per n-gram."""
        return np.concatenate([np.zeros(0), *map(self._weights, _counts(self.config, store, rows))])

    def _weights(self, counts: csr_matrix) -> np.ndarray:
        sum_B = counts @ self.log_ratio_H
        if self.config.length == "sum":
            return sum_B
        return sum_B / np.maximum(np.asarray(counts.sum(axis=1))[:, 0], 1)

    def _fit(self, task: Task) -> Figures:
        inputs, epsilon = self.inputs, self.config.epsilon
        weights = np.array([weight for _, weight, _ in inputs.upper])
        sets = [self._distribution(store, np.arange(len(store))) for _, _, store in inputs.upper]
        target_H = np.average(sets, axis=0, weights=weights)
        pool_H = self._distribution(inputs.pool, inputs.rows)
        self.log_ratio_H = np.log(target_H + epsilon) - np.log(pool_H + epsilon)
        return {"flops": 0.0}  # hashing only

    def _distribution(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        blocks = [rows[first : first + ROWS_OF_BLOCK] for first in range(0, len(rows), ROWS_OF_BLOCK)]
        total_H = sum(self.inputs.engine.map(_Total(self.config, store), blocks))  # whole numbers: in any order
        return total_H / max(np.sum(total_H), 1.0)

    def _write(self, folder: Path) -> None:
        np.save(folder / "log_ratio.npy", self.log_ratio_H)

    def _read(self, folder: Path) -> None:
        self.log_ratio_H = np.load(folder / "log_ratio.npy")


@dataclass
class _Total:
    """Counts of every bucket over a block of documents."""

    config: DsirConfig
    store: TokenStore

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return sum(np.asarray(counts.sum(axis=0))[0] for counts in _counts(self.config, self.store, rows))


def _counts(config: DsirConfig, store: TokenStore, rows: np.ndarray) -> Iterator[csr_matrix]:
    vectorizer = HashingVectorizer(
        n_features=config.buckets,
        ngram_range=(1, config.ngrams),
        token_pattern=r"\w+|[^\w\s]+",  # words and runs of punctuation, as the published code cuts them
        alternate_sign=False,
        norm=None,
    )
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield vectorizer.transform(store.texts(rows[first : first + ROWS_AT_ONCE]))
