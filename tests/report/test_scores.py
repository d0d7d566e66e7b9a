"""The streamed score histograms against numpy on the whole table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilect.report.scores import MAX_SOURCES, summarise_scores


def test_score_summary_against_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = rng.choice(["a", "b", "c"], 5000)
    score = (
        rng.normal({"a": 0.0, "b": 2.0, "c": -1.0}[str(source[0])], 1.0, 5000) + 2.0 * (source == "b") - (source == "c")
    )
    half = 2500
    for i, part in enumerate((slice(0, half), slice(half, None))):
        pq.write_table(pa.table({"source": source[part], "score": score[part]}), tmp_path / f"{i}.parquet")
    summary = summarise_scores(tmp_path)
    assert summary is not None and summary.documents == 5000 and summary.left_out == 0
    assert [s.name for s in summary.sources] == ["b", "a", "c"]
    width = np.ptp(score) / 4096
    for found in summary.sources:
        own = score[source == found.name]
        assert found.documents == len(own)
        for q in (0.05, 0.5, 0.95):
            assert found.quantile(q) == pytest.approx(np.quantile(own, q), abs=8 * width)
        grid = np.linspace(score.min() - 2, score.max() + 2, 400)
        assert np.trapezoid(found.density(grid), grid) == pytest.approx(1, abs=1e-3)


def test_scores_null_constant_and_of_many_sources(tmp_path: Path) -> None:
    assert summarise_scores(tmp_path) is None
    pq.write_table(pa.table({"source": [None, "x", "x"], "score": [0.5, 0.5, None]}), tmp_path / "0.parquet")
    summary = summarise_scores(tmp_path)
    assert summary is not None and (summary.documents, summary.left_out) == (2, 1)
    assert {s.name for s in summary.sources} == {"(no source)", "x"}
    assert all(s.median == pytest.approx(0.5, abs=1e-5) for s in summary.sources)
    pq.write_table(
        pa.table({"source": [f"s{i}" for i in range(40)], "score": np.linspace(0, 1, 40)}), tmp_path / "0.parquet"
    )
    summary = summarise_scores(tmp_path)
    assert summary is not None and len(summary.sources) == MAX_SOURCES
    assert sum(s.documents for s in summary.sources) == 40 and summary.folded == 40 - MAX_SOURCES + 1
