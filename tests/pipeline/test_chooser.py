"""What a run has fitted scores any text as it has scored the pool."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

import bilect
from bilect.errors import BilectError
from tests.corpus import write_corpus
from tests.pipeline.test_choose import SMALL


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module", params=["dsir", "excess"])
def kept(corpus, tmp_path_factory, request):
    out = tmp_path_factory.mktemp("choose") / "kept"
    bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", out, keep=0.25, method=request.param, settings=SMALL)
    return out


def pool_of(corpus):
    return [json.loads(line) for line in (corpus / "pool.jsonl").read_text(encoding="utf-8").splitlines()]


def scores_of(kept):
    table = pq.ParquetDataset(kept / "round-1" / "scores", partitioning=None).read().to_pylist()
    return {row["doc_id"]: row["score"] for row in table}


def test_texts_of_the_pool_get_their_scores_in_any_order_and_number(kept, corpus):
    known, chooser = scores_of(kept), bilect.Chooser(kept)
    records = [record for record in pool_of(corpus) if record["id"] in known][:40][::-1]
    want = np.array([known[record["id"]] for record in records])
    assert np.ptp(want) > 0.01
    np.testing.assert_allclose(chooser.score([r["text"] for r in records]), want, atol=1e-5)
    np.testing.assert_allclose(chooser.score([records[3]["text"]]), want[3:4], atol=1e-5)
    assert chooser.score(["", records[3]["text"]])[0] == -np.inf and len(chooser.score([])) == 0


def test_the_cut_is_the_least_score_kept_and_a_chooser_can_be_sent(kept):
    chooser = bilect.Chooser(kept)
    assert chooser.cut == pytest.approx(min(pq.read_table(kept / "round-1/selected/kept.parquet")["score"].to_pylist()))
    text = "sum root prime " * 5
    score = chooser.score([text])
    assert pickle.loads(pickle.dumps(chooser)).score([text]) == pytest.approx(score, abs=1e-6)


def test_pieces_of_a_long_text_count_by_their_tokens(corpus, tmp_path):
    settings = {**SMALL, "data.long_documents": "chunk", "data.context": 24}
    out = tmp_path / "kept"
    bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", out, keep=0.25, method="dsir", settings=settings)
    scores = pq.ParquetDataset(out / "round-1" / "scores", partitioning=None).read().to_pylist()
    pieces: dict[str, list[tuple[float, int]]] = {}
    for row in scores:
        pieces.setdefault(row["doc_id"].partition("#")[0], []).append((row["score"], row["n_tokens"]))
    record = next(r for r in pool_of(corpus) if len(pieces.get(r["id"], [])) > 1)
    own = pieces[record["id"]]
    want = sum(s * n for s, n in own) / sum(n for _, n in own)
    assert bilect.Chooser(out).score([record["text"]]) == pytest.approx(want, abs=1e-5)


def test_nothing_fitted_is_one_line(tmp_path):
    with pytest.raises(BilectError, match="has fitted nothing to score by yet"):
        bilect.Chooser(tmp_path)
