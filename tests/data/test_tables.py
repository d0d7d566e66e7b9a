"""Tables of scores and selections in folders whose names look like columns, and ids that look like something else."""

import json

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bilect.data.tables import KEPT, kept_file, kept_table
from bilect.report.choice import opened, view_of

ROWS = [
    {"doc_id": "2024-01-01", "source": "mine", "n_tokens": 3, "score": 0.5, "rank": 1, "text": "one"},
    {"doc_id": "12:30:00", "source": None, "n_tokens": 4, "score": 0.25, "rank": 2, "text": "two"},
]


@pytest.fixture(params=["kept.parquet", "kept.jsonl.zst"])
def kept(request, tmp_path):
    file = tmp_path / "source=c4" / "score=0" / "it's" / request.param
    file.parent.mkdir(parents=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return file


def test_kept_documents_are_read_as_they_were_written(kept):
    names = [*KEPT, "text"]
    with duckdb.connect() as db:
        rows = db.sql(f"SELECT {', '.join(names)} FROM {kept_table(kept, {'text': 'VARCHAR'})}").fetchall()
    assert [dict(zip(names, row, strict=True)) for row in rows] == ROWS
    assert kept_file(kept.parent) == kept and kept_file(kept.parent.parent) is None


def test_a_report_counts_them_under_their_own_sources(kept):
    dropped = [{"doc_id": "x", "source": "mine", "n_tokens": 5, "score": 0.1, "reason": "below the cut"}]
    pq.write_table(pa.Table.from_pylist(dropped), kept.parent / "dropped.parquet")
    with opened() as db:
        assert view_of(db, "chosen", kept.parent)
        rows = db.sql("SELECT doc_id, source, score, kept FROM chosen ORDER BY score DESC").fetchall()
    assert rows == [
        ("2024-01-01", "mine", 0.5, True),
        ("12:30:00", "(no source)", 0.25, True),
        ("x", "mine", 0.1, False),
    ]
