"""A run of a million scored documents: its page stays small and opens at once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilect.report import write_report
from tests.browser.conftest import Opened
from tests.report import synthetic

ROWS = 1_000_000


def write_large(folder: Path, rows: int) -> Path:
    """A run whose round has so many scores, of which a fifth is kept, and as many texts."""
    run = synthetic.write_online(synthetic.write_run(folder, rounds=1), rounds=1)
    here, rng = run / "round-1", np.random.default_rng(0)
    for part in (here / "scores", here / "selected", run / "tokens"):
        shutil.rmtree(part)
    (here / "scores").mkdir()
    names = np.array(list(synthetic.SOURCES))
    for n, at in enumerate(np.array_split(np.arange(rows), 8)):
        columns = {
            "doc_id": [f"document-{i}" for i in at],
            "source": names[rng.integers(0, len(names), len(at))],
            "n_tokens": rng.integers(20, 2048, len(at)),
            "score": pa.array(rng.normal(size=len(at)), pa.float32()),
        }
        pq.write_table(pa.table(columns), here / "scores" / f"{n:05d}.parquet")
    synthetic.write_selection(run, here, cut=0.84)  # a fifth of a normal distribution lies above
    return run


@pytest.mark.slow
def test_a_million_documents_open_within_two_seconds(browser: Opened, tmp_path: Path) -> None:
    run = write_large(tmp_path / "run", ROWS)
    begun = time.perf_counter()
    page = write_report(run)
    written = time.perf_counter() - begun
    size = page.stat().st_size
    opened = []
    for _ in range(3):
        begun = time.perf_counter()
        shown = browser.open(page.as_uri())
        shown.locator(".lists tbody tr").first.wait_for()  # the explorer has its documents
        opened.append(time.perf_counter() - begun)
    counted = shown.locator("main").inner_text()
    print(f"written in {written:.1f} s, {size / 1e6:.2f} MB, open after {[round(s, 2) for s in opened]} s")
    assert f"{ROWS:,}" in counted
    assert size < 5_000_000 and max(opened) < 2 and browser.complaints == []
