"""Controls that choose their documents by other methods, within a run."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilect import methods
from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.methods.dsir import _counts
from bilect.pipeline.context import open_pool
from bilect.pipeline.stages import run
from tests.corpus import tiny_settings
from tests.killing import END, KillingProgress, in_fork, run_watched

ARMS = ["random", "dsir", "perplexity"]


def settings(corpus, **changes):
    values = tiny_settings(corpus, **{"controls": ARMS, "methods": {"dsir": {"length": "mean"}}, **changes})
    for part in (*values["warmup"].values(), values["training"]):
        part |= {"steps": 4, "decay_steps": 0}
    values["fit"] |= {"steps": 3}
    return values


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("methods") / "run"
    return out, run(parse_config(settings(corpus)), out)


def test_each_method_chooses_from_the_same_shard_by_the_same_rules(finished):
    out, summary = finished
    ours = pq.read_table(next((out / "round-1" / "scores").glob("*.parquet")))["doc_id"].to_pylist()
    for arm in ("dsir", "perplexity"):
        folder = out / "controls" / arm / "round-1"
        table = pq.read_table(next((folder / "scores").glob("*.parquet")))
        assert table["doc_id"].to_pylist() == ours
        kept = pq.read_table(folder / "selected" / "kept.parquet").to_pylist()
        best = sorted(table.to_pylist(), key=lambda r: (-r["score"], r["doc_id"]))[: len(kept)]
        assert [r["doc_id"] for r in kept] == [r["doc_id"] for r in best] and all(r["text"] for r in kept)
        tokens = sum(r["n_tokens"] for r in kept)
        assert tokens - kept[-1]["n_tokens"] < 0.2 * sum(table["n_tokens"].to_pylist()) <= tokens
    chosen = pq.read_table(out / "controls" / "dsir" / "round-1" / "selected" / "kept.parquet")
    assert set(chosen["source"].to_pylist()) == {"maths"}  # the target's
    assert not list(out.rglob(".fit*")) and not list(out.rglob(".method*"))
    assert len({summary["tokens"][arm] for arm in ("bliss", *ARMS)}) == 1 and set(ARMS) < set(summary["heldout_loss"])


def test_scores_are_the_methods_own(finished):
    out, _ = finished
    pool = open_pool(out / "tokens")
    table = pq.read_table(next((out / "controls" / "dsir" / "round-1" / "scores").glob("*.parquet")))
    place = {d: i for i, d in enumerate(pool.doc_ids(np.arange(len(pool))))}
    rows = np.array([place[d] for d in table["doc_id"].to_pylist()])
    from bilect.data.tokens import TokenStore

    upper = [("upper", 1.0, TokenStore(out / "tokens" / "upper" / "upper.arrow"))]
    method = methods.make("dsir", {"length": "mean"})
    counted = [np.asarray(sum(c.sum(axis=0) for c in _counts(method.config, s, r)))[0]
               for s, r in ((upper[0][2], np.arange(len(upper[0][2]))), (pool, rows))]  # fmt: skip
    ratio = np.log(counted[0] / counted[0].sum() + 1e-8) - np.log(counted[1] / counted[1].sum() + 1e-8)
    counts = next(_counts(method.config, pool, rows))
    expected = (counts @ ratio) / np.asarray(counts.sum(axis=1))[:, 0]
    np.testing.assert_allclose(table["score"].to_numpy(), expected, rtol=1e-5)


def test_what_choosing_costs_is_told(finished):
    out, summary = finished
    records = json.loads((out / "run.json").read_text())["stages"]
    flops = summary["cost"]["flops"]
    assert flops["choosing dsir"] == 0.0  # hashing, no proxy
    assert flops["choosing perplexity"] == pytest.approx(
        records["warm up proxy"]["flops"]
        + sum(records[f"round 1: {what} perplexity"]["flops"] for what in ("fit", "score"))
    )
    assert records["round 1: score perplexity"]["flops"] > 0


def test_killed_and_started_again(corpus, finished, tmp_path):
    _, summary = finished
    config, log = parse_config(settings(corpus)), tmp_path / "log"
    for stage, at in (("round 1: fit dsir", END), ("round 1: score dsir", END), ("round 1: score perplexity", 1)):
        assert in_fork(lambda s=stage, a=at: run_watched(config, tmp_path / "run", KillingProgress(log, s, a))) == -9
    again = run(config, tmp_path / "run")
    assert again["heldout_loss"] == summary["heldout_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": ["dsri"], "methods": {}}, "no method 'dsri'; did you mean 'dsir'"),
        ({"controls": ["bliss"], "methods": {}}, "bliss is what the run itself is about"),
        ({"methods": {"less": {}}}, "settings of 'less', which is neither the method nor one of the controls"),
        ({"method": "dsri", "methods": {}}, "method: there is no method 'dsri'; did you mean 'dsir'"),
        (
            {"method": "blade", "methods": {}},
            "blade does not choose documents; to train with it, set online.method=blade",
        ),
        ({"method": "full", "controls": [], "methods": {}}, "method: full does not choose documents"),
        ({"methods": {"dsir": {"bukets": 3}}}, "dsir: unknown key 'bukets'; did you mean 'buckets'"),
    ],
)
def test_wrong_settings_are_one_line_and_nothing_is_written(corpus, tmp_path, changes, message):
    with pytest.raises(BilectError, match=message) as error:
        run(parse_config(settings(corpus, **changes)), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
