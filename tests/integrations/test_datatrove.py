"""A fitted chooser as a filter of datatrove, in its own executor."""

import json

import numpy as np
import pytest

import bilect
from bilect.errors import BilectError
from tests.corpus import write_corpus
from tests.pipeline.test_choose import SMALL

pytest.importorskip("datatrove")
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from bilect.integrations.datatrove import ChooserFilter


class Lengths:
    cut = None

    def score(self, texts):
        return np.array([float(len(text)) for text in texts])


def read(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_it_keeps_what_scores_at_least_the_cut_and_says_why_it_drops(tmp_path):
    write_corpus(tmp_path)
    bilect.choose(tmp_path / "pool.jsonl", tmp_path / "upper.jsonl", tmp_path / "kept", keep=0.25, method="dsir",
                  settings=SMALL)  # fmt: skip
    chooser = bilect.Chooser(tmp_path / "kept")
    dropped = JsonlWriter(str(tmp_path / "dropped"), output_filename="${rank}.jsonl", compression=None)
    step = ChooserFilter(chooser, exclusion_writer=dropped, batch_size=32)
    out = JsonlWriter(str(tmp_path / "out"), output_filename="${rank}.jsonl", compression=None)
    source = JsonlReader(str(tmp_path), glob_pattern="pool.jsonl", doc_progress=False)
    LocalPipelineExecutor([source, step, out], logging_dir=str(tmp_path / "logs")).run()
    pool = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = dict(zip((r["id"] for r in pool), chooser.score([r["text"] for r in pool]), strict=True))
    kept = {r["id"]: r["metadata"]["bilect_score"] for r in read(tmp_path / "out")}
    assert kept == pytest.approx({name: s for name, s in scores.items() if s >= chooser.cut})
    left_out = read(tmp_path / "dropped")
    assert len(kept) + len(left_out) == len(pool) and 20 < len(kept) < len(pool) / 2
    assert {r["metadata"]["filter_reason"] for r in left_out} == {"low_score"}


def test_a_cut_of_ones_own_or_an_error():
    from datatrove.data import Document

    step = ChooserFilter(Lengths(), cut=4, batch_size=2)
    assert [step.filter(Document(text, text)) for text in ("abc", "abcd")] == [(False, "low_score"), True]
    with pytest.raises(BilectError, match="cut: the run has kept nothing yet"):
        ChooserFilter(Lengths())
