"""Selection against sorting in Python."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilect.config import SelectionConfig
from bilect.errors import BilectError
from bilect.selection import select_top


def write(folder, rows, files=2):
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = pa.table(
            {
                "doc_id": [rows[i][0] for i in part],
                "source": [rows[i][1] for i in part],
                "n_tokens": pa.array([rows[i][2] for i in part], pa.int32()),
                "score": pa.array([rows[i][3] for i in part], pa.float32()),
            }
        )
        pq.write_table(table, folder / f"part-{number:05d}.parquet")


row = st.tuples(st.sampled_from("ab"), st.integers(1, 50), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@settings(max_examples=25, deadline=None)
@given(st.lists(row, min_size=1, max_size=30), st.floats(0.05, 1.0))
def test_matches_a_sort_with_ties_by_doc_id(tmp_path_factory, values, ratio):
    folder = tmp_path_factory.mktemp("s")
    rows = [(f"d{i:02d}", s, n, x) for i, (s, n, x) in enumerate(values)]
    write(folder / "scores", rows)
    chosen = select_top(folder / "scores", folder / "kept.parquet", SelectionConfig(keep_ratio=ratio).budget)
    total = sum(r[2] for r in rows)
    expected, used = [], 0
    for r in sorted(rows, key=lambda r: (-r[3], r[0])):
        if used >= ratio * total:
            break
        expected.append(r)
        used += r[2]
    assert chosen.doc_ids == [r[0] for r in expected]
    assert (chosen.tokens, chosen.pool_tokens, chosen.threshold) == (used, total, min(r[3] for r in expected))
    assert pq.read_table(folder / "kept.parquet")["rank"].to_pylist() == list(range(1, len(expected) + 1))
    for source in {r[1] for r in rows}:
        mine = [r for r in rows if r[1] == source]
        kept = [r for r in expected if r[1] == source]
        assert chosen.kept_fraction[source] == pytest.approx(len(kept) / len(mine))
        assert chosen.kept_share[source] == pytest.approx(sum(r[2] for r in kept) / used)
        assert chosen.pool_share[source] == pytest.approx(sum(r[2] for r in mine) / total)


def test_budget_in_tokens(tmp_path):
    write(tmp_path / "scores", [("a", "s", 10, 0.9), ("b", "s", 10, 0.8), ("c", "s", 10, 0.7)])
    budget = SelectionConfig(budget_tokens=11).budget
    assert select_top(tmp_path / "scores", tmp_path / "k.parquet", budget).doc_ids == ["a", "b"]
    budget = SelectionConfig(budget_tokens=10).budget
    assert select_top(tmp_path / "scores", tmp_path / "k.parquet", budget).doc_ids == ["a"]


def test_scores_that_are_not_finite_are_refused(tmp_path):
    write(tmp_path / "scores", [("a", "s", 10, float("nan")), ("b", "s", 10, 0.8)])
    with pytest.raises(BilectError, match=r"1 scores .* not finite"):
        select_top(tmp_path / "scores", tmp_path / "k.parquet", SelectionConfig().budget)
    assert not (tmp_path / "k.parquet").exists()
    with pytest.raises(BilectError, match="no score files"):
        select_top(tmp_path / "none", tmp_path / "k.parquet", SelectionConfig().budget)
