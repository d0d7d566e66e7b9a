"""Score distributions per source, streamed: two passes over the Parquet files, memory independent of their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

BINS = 4096
MAX_SOURCES = 16
NO_SOURCE = "(no source)"


@dataclass(frozen=True)
class SourceScores:
    """One source's scores as a histogram over the edges shared by all sources."""

    name: str
    documents: int
    counts: FloatArray
    edges: FloatArray

    def quantile(self, q: float) -> float:
        """The q-quantile, exact to one bin: 1/4096 of the range of all scores."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)]) / self.counts.sum()
        return float(np.interp(q, cumulative, self.edges))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def density(self, grid: FloatArray) -> FloatArray:
        """Gaussian kernel density on `grid`, bandwidth by Silverman's rule, from the histogram."""
        centres = (self.edges[:-1] + self.edges[1:]) / 2
        share = self.counts / self.counts.sum()
        mean = float(share @ centres)
        spread = min(
            float(np.sqrt(share @ (centres - mean) ** 2)), (self.quantile(0.75) - self.quantile(0.25)) / 1.34 or np.inf
        )
        width = max(0.9 * spread * self.documents**-0.2, float(grid[1] - grid[0]), 1e-12)
        used = share > 0
        kernel = np.exp(-0.5 * ((grid[:, None] - centres[used]) / width) ** 2)
        return np.asarray(kernel @ share[used] / (width * np.sqrt(2 * np.pi)), dtype=np.float64)


@dataclass(frozen=True)
class ScoreSummary:
    """Sources ordered by median score, highest first; the smallest ones beyond MAX_SOURCES are folded into one."""

    sources: list[SourceScores]
    documents: int
    left_out: int  # documents without a finite score
    folded: int  # sources folded into "N smaller sources"


def summarise_scores(folder: Path) -> ScoreSummary | None:
    """Summarise `folder/*.parquet` (columns score and, optionally, source); None where there is nothing to show."""
    files = sorted(folder.glob("*.parquet"))
    low, high, total, left_out = np.inf, -np.inf, 0, 0
    documents: dict[str, int] = {}
    for names, index, score in _batches(files):
        finite = np.isfinite(score)
        left_out += int((~finite).sum())
        if not finite.any():
            continue
        low, high = min(low, float(score[finite].min())), max(high, float(score[finite].max()))
        total += int(finite.sum())
        for name, count in zip(names, np.bincount(index[finite], minlength=len(names)), strict=True):
            if count:
                documents[name] = documents.get(name, 0) + int(count)
    if not total:
        return None
    if high <= low:
        pad = max(abs(low), 1.0) * 1e-3
        low, high = low - pad, high + pad

    ranked = sorted(documents, key=lambda name: (-documents[name], name))
    folded = len(ranked) - (MAX_SOURCES - 1) if len(ranked) > MAX_SOURCES else 0
    shown = ranked[: len(ranked) - folded] + ([f"{folded} smaller sources"] if folded else [])
    row_of = {name: min(i, len(shown) - 1) for i, name in enumerate(ranked)}

    edges = np.linspace(low, high, BINS + 1)
    counts = np.zeros((len(shown), BINS))
    for names, index, score in _batches(files):
        finite = np.isfinite(score)
        rows = np.array([row_of.get(name, 0) for name in names], dtype=np.int64)[index[finite]]
        bins = np.clip(((score[finite] - low) / (high - low) * BINS).astype(np.int64), 0, BINS - 1)
        counts += np.bincount(rows * BINS + bins, minlength=counts.size).reshape(counts.shape)

    sources = [SourceScores(n, int(c.sum()), c, edges) for n, c in zip(shown, counts, strict=True)]
    sources.sort(key=lambda source: (-source.median, source.name))
    return ScoreSummary(sources, total, left_out, folded)


def _batches(files: list[Path]) -> Iterator[tuple[list[str], npt.NDArray[np.int64], FloatArray]]:
    """(source names, each document's index into them, each document's score), batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        with pq.ParquetFile(path) as file:
            columns = [name for name in ("source", "score") if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1 << 17, columns=columns):
                score = batch.column("score").cast(pa.float64()).to_numpy(zero_copy_only=False)
                if "source" not in columns:
                    yield ["all documents"], np.zeros(len(score), dtype=np.int64), score
                    continue
                source: Any = batch.column("source").cast(pa.string()).fill_null(NO_SOURCE).dictionary_encode()
                index = source.indices.to_numpy(zero_copy_only=False).astype(np.int64)
                yield source.dictionary.to_pylist(), index, score
