"""A pool with copies: what the cap keeps, in a run, in its random control and in a selection afterwards."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.config import parse_config
from bilect.pipeline.choosing import documents_of
from bilect.pipeline.context import RunContext
from bilect.pipeline.reuse import select_again
from bilect.pipeline.stages import run
from bilect.runtime.progress import SilentProgress
from tests.corpus import tiny_settings, write_corpus, write_jsonl


def original(doc_id):
    return doc_id.split("-")[0]


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """Run directory and config, up to the selection, of 120 documents of which a third have two copies each."""
    folder = tmp_path_factory.mktemp("copies")
    write_corpus(folder, pool=120)
    pool = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    copies = [{**r, "id": f"{r['id']}-{k}", "text": r["text"].upper() + " " * k} for r in pool[:40] for k in (1, 2)]
    write_jsonl(folder / "pool.jsonl", pool + copies)
    settings = tiny_settings(folder, selection={"keep_ratio": 0.5, "max_per_cluster": 1}, controls=["random", "full"])
    settings["data"] |= {"vocab_size": 400, "context": 64}  # capitals too need room
    for part in (settings["fit"], *settings["warmup"].values()):
        part["steps"] = 2
    config = parse_config(settings)
    run(config, folder / "run", command="select")
    return folder / "run", config


def test_a_run_keeps_one_of_each_cluster(selected):
    out, _ = selected
    table = pq.read_table(out / "tokens" / "near-duplicates-0.8.parquet").to_pylist()
    assert len(table) == 120 and len({r["cluster"] for r in table}) == 40
    kept, dropped = (
        pq.read_table(out / "round-1" / "selected" / f"{n}.parquet").to_pylist() for n in ("kept", "dropped")
    )
    names = [original(r["doc_id"]) for r in kept]
    assert len(names) == len(set(names))
    near = [r for r in dropped if r["reason"].startswith("near-duplicate of ")]
    assert len(kept) > 40 and len(near) > 20
    best = {}
    for r in sorted(kept + dropped, key=lambda r: r["rank"]):
        best.setdefault(original(r["doc_id"]), r["doc_id"])
    assert all(r["reason"] == f"near-duplicate of {best[original(r['doc_id'])]}" for r in near)
    figures = json.loads((out / "run.json").read_text())["stages"]["round 1: select bliss"]
    assert figures["near_duplicates"] == len(near)


def test_the_random_control_has_the_same_cap_and_budget(selected):
    out, config = selected
    context = RunContext(out, config, SilentProgress())
    pool = context.pool()
    shard = documents_of(context, "full", 1)
    scores = pq.read_table(next((out / "controls" / "random" / "round-1" / "scores").glob("*.parquet"))).to_pylist()
    place = {r["doc_id"]: -r["score"] for r in scores}
    order = shard[np.argsort([place[d] for d in pool.doc_ids(shard)])]
    assert sorted(place.values()) == list(range(len(shard)))
    first = {}
    for row, doc_id in zip(order.tolist(), pool.doc_ids(order), strict=True):
        first.setdefault(original(doc_id), row)
    wanted, budget = [], 0.5 * pool.length_R[order].sum()
    for row in first.values():
        if pool.length_R[wanted].sum() < budget:
            wanted.append(row)
    assert len(wanted) < len(first) < len(order)
    assert documents_of(context, "random", 1).tolist() == wanted  # in the order of the draw


def test_a_later_selection_uses_the_same_clusters(selected, tmp_path):
    out, _ = selected
    file = out / "tokens" / "near-duplicates-0.8.parquet"
    before = file.stat().st_mtime_ns
    call = ["select", str(out), "--keep", "0.9", "--max-per-cluster", "2", "--out", str(tmp_path / "two")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    chosen, _ = select_again(out, tmp_path / "again", {"keep_ratio": 0.9, "max_per_cluster": 2})
    assert f"{chosen.near_duplicates:,} documents are near-duplicates of better ones" in result.output
    names = [original(d) for d in pq.read_table(tmp_path / "two" / "kept.parquet")["doc_id"].to_pylist()]
    assert max(names.count(n) for n in names) == 2
    assert file.stat().st_mtime_ns == before
