"""Selection against the rule spelt out in Python."""

import hashlib
import math
import shutil
import subprocess
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilect.config import SelectionConfig
from bilect.errors import BilectError
from bilect.selection import ranking as selection_order
from bilect.selection.select import BELOW_THE_CUT, NEAR_DUPLICATE, SOURCE_FULL, select
from bilect.selection.spill import Hashes


def write(folder, rows, files=2):
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = pa.table(
            {
                "doc_id": pa.array([rows[i][0] for i in part], pa.string()),
                "source": pa.array([rows[i][1] for i in part], pa.string()),
                "n_tokens": pa.array([rows[i][2] for i in part], pa.int32()),
                "score": pa.array([rows[i][3] for i in part], pa.float32()),
            }
        )
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    return folder


def read(folder):
    return tuple(pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("kept", "dropped"))


def write_clusters(file, cluster_of):
    """In the format of ``cluster_file``; documents without a cluster are not in it."""
    rows = sorted((doc_id, cluster) for doc_id, cluster in cluster_of.items() if cluster is not None)
    doc_ids, clusters = pa.array([r[0] for r in rows], pa.string()), pa.array([r[1] for r in rows], pa.int32())
    pq.write_table(pa.table({"doc_id": doc_ids, "cluster": clusters}), file)
    return file


def ids(folder):
    return [r["doc_id"] for r in read(folder)[0]]


def key(row, temperature, seed):
    """Score plus the documented noise."""
    if not temperature:
        return row[3]
    uniform = (int(hashlib.md5(f"{seed}/{row[0]}".encode()).hexdigest()[:13], 16) + 0.5) / 2**52
    return float(np.float32(row[3] - temperature * math.log(-math.log(uniform))))


def expected(rows, config, seed=0, cluster_of=None):
    """(row, rank, reason or None) in order of rank."""
    cluster_of, members = cluster_of or {}, {}
    ranked = sorted(rows, key=lambda r: (-key(r, config.temperature, seed), r[0]))
    size = (lambda r: 1) if config.top_k else (lambda r: r[2])
    if config.keep_ratio is not None:
        budget = config.keep_ratio * sum(r[2] for r in rows)
    else:
        budget = config.top_k or config.budget_tokens
    reserved, eligible, counted, reasons = [], [], {}, {}
    for r in ranked:
        if (cluster := cluster_of.get(r[0])) is not None and config.max_per_cluster is not None:
            better = members.setdefault(cluster, [])
            better.append(r[0])
            if len(better) > config.max_per_cluster:
                reasons[r[0]] = f"{NEAR_DUPLICATE} {better[0]}"
                continue
        before = counted.get(r[1], 0)
        counted[r[1]] = before + size(r)
        most = config.max_share.get(r[1], config.max_share.get("*"))
        if most is None or counted[r[1]] <= round(most * budget, 6):
            eligible.append(r)
            if before < round(config.min_share.get(r[1], 0.0) * budget, 6):
                reserved.append(r)
    taken, used = [], 0
    for r in reserved + [r for r in eligible if r not in reserved]:
        if used < budget:
            taken.append(r)
            used += size(r)
    out, cut = [], False
    for rank, r in enumerate(ranked, 1):
        cut = cut or (r in eligible and r not in taken)
        why = reasons.get(r[0]) or (BELOW_THE_CUT if cut else SOURCE_FULL)
        out.append((r, rank, None if r in taken else why))
    return out


row = st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.5, 1.0]))
shares = st.fixed_dictionaries(
    {},
    optional={
        "min_share": st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.1, 0.25, 0.33]), max_size=3),
        "max_share": st.dictionaries(st.sampled_from("abc*"), st.sampled_from([0.33, 0.4, 0.7, 1.0]), max_size=4),
    },
)
budgets = st.one_of(
    st.floats(0.05, 1.0).map(lambda x: {"keep_ratio": x}),
    st.integers(1, 600).map(lambda x: {"budget_tokens": x}),
    st.integers(1, 40).map(lambda x: {"top_k": x}),
)


near = st.tuples(st.sampled_from([None, 1, 2]), st.lists(st.sampled_from([None, 0, 1, 2]), min_size=30, max_size=30))


@settings(max_examples=40, deadline=None)
@given(st.lists(row, min_size=1, max_size=30), budgets, shares, st.sampled_from([0.0, 0.0, 0.7]), st.booleans(), near)
def test_matches_the_rule(tmp_path_factory, values, budget, shares, temperature, small, near):
    rows = [(f"d{i * 37 % 31:02d}" + "é" * (i % 3), *v) for i, v in enumerate(values)]
    cap, clusters = near
    cluster_of = {"elsewhere": 0, **dict(zip([r[0] for r in rows], clusters, strict=False))}
    known = {"*", *(r[1] for r in rows)}
    shares = {kind: {s: x for s, x in of.items() if s in known} for kind, of in shares.items()}
    config = SelectionConfig(**budget, **shares, temperature=temperature, max_per_cluster=cap)
    wanted = expected(rows, config, 5, cluster_of)
    kept = [(r, rank) for r, rank, reason in wanted if reason is None]
    folder = tmp_path_factory.mktemp("s")
    write(folder / "scores", rows)
    options = {"seed": 5, "clusters": write_clusters(folder / "clusters.parquet", cluster_of)}
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several buckets, chunks and batches, as in a large pool
            for name, value in {"BUCKET_ROWS": 7, "CHUNK_ROWS": 3, "SCAN_ROWS": 5}.items():
                patch.setattr(selection_order, name, value)
        if not kept:
            with pytest.raises(BilectError, match="nothing to keep"):
                select(folder / "scores", folder / "out", config, **options)
            return
        chosen = select(folder / "scores", folder / "out", config, **options)
    got_kept, got_dropped = read(folder / "out")
    columns = ("doc_id", "source", "n_tokens", "score", "rank")
    assert [tuple(r[c] for c in columns) for r in got_kept] == [(*r, rank) for r, rank in kept]
    assert [(*(r[c] for c in columns), r["reason"]) for r in got_dropped] == [
        (*r, rank, reason) for r, rank, reason in wanted if reason
    ]
    for r in got_kept + got_dropped:
        assert r.get("key") == (
            pytest.approx(key([r[c] for c in columns], temperature, 5), rel=1e-6) if temperature else None
        )
    assert chosen.near_duplicates == sum((reason or "").startswith(NEAR_DUPLICATE) for *_, reason in wanted)
    for cluster in (0, 1, 2):
        assert sum(cluster_of[r["doc_id"]] == cluster for r in got_kept) <= (cap or len(rows))
    tokens, total = sum(r[2] for r, _ in kept), sum(r[2] for r in rows)
    assert (chosen.documents, chosen.pool_documents) == (len(kept), len(rows))
    assert (chosen.tokens, chosen.pool_tokens, chosen.threshold) == (tokens, total, min(r[3] for r, _ in kept))
    assert bool(chosen.note) == ((len(kept) if config.top_k else tokens) < chosen.budget)
    for source in {r[1] for r in rows}:
        mine, mine_kept = [r for r in rows if r[1] == source], [r for r, _ in kept if r[1] == source]
        assert chosen.kept_fraction[source] == pytest.approx(len(mine_kept) / len(mine))
        assert chosen.kept_share[source] == pytest.approx(sum(r[2] for r in mine_kept) / tokens)
        assert chosen.pool_share[source] == pytest.approx(sum(r[2] for r in mine) / total)


POOL = [(f"a{i}", "a", 10, 1 - i / 100) for i in range(6)] + [(f"b{i}", "b", 10, 0.5 - i / 100) for i in range(4)]


def test_budget_in_tokens(tmp_path):
    scores = write(tmp_path / "scores", [("a", "s", 10, 0.9), ("b", "s", 10, 0.8), ("c", "s", 10, 0.7)])
    for tokens, kept in ((11, ["a", "b"]), (10, ["a"])):
        select(scores, tmp_path / "out", SelectionConfig(budget_tokens=tokens))
        assert ids(tmp_path / "out") == kept


def test_minus_zero_ties_with_zero(tmp_path):
    scores = write(tmp_path / "scores", [("b", "s", 1, 0.0), ("a", "s", 1, -0.0), ("c", "s", 1, -1e-30)])
    select(scores, tmp_path / "out", SelectionConfig(top_k=2))
    assert ids(tmp_path / "out") == ["a", "b"]


def test_shares_by_hand(tmp_path):
    scores = write(tmp_path / "scores", POOL)
    chosen = select(scores, tmp_path / "out", SelectionConfig(top_k=5, max_share={"a": 0.4}))
    kept, dropped = read(tmp_path / "out")
    assert [(r["doc_id"], r["rank"]) for r in kept] == [("a0", 1), ("a1", 2), ("b0", 7), ("b1", 8), ("b2", 9)]
    assert [r["reason"] for r in dropped] == [SOURCE_FULL] * 4 + [BELOW_THE_CUT]
    assert (chosen.budget, chosen.unit, chosen.note, chosen.tokens) == (5.0, "documents", "", 50)
    select(scores, tmp_path / "out", SelectionConfig(budget_tokens=50, min_share={"b": 0.21}))
    assert ids(tmp_path / "out") == ["a0", "a1", "a2", "b0", "b1"]
    many = write(tmp_path / "many", [(f"{i:03d}", "a", 1, -i) for i in range(200)])
    assert select(many, tmp_path / "out", SelectionConfig(top_k=100, max_share={"*": 0.29})).documents == 29


def test_a_budget_out_of_reach_is_reported(tmp_path):
    scores = write(tmp_path / "scores", POOL)
    chosen = select(scores, tmp_path / "out", SelectionConfig(budget_tokens=80, max_share={"*": 0.25}))
    assert (chosen.tokens, chosen.budget) == (40, 80.0)
    assert chosen.note == "kept 40 of a budget of 80 tokens: max_share allows no more"
    chosen = select(scores, tmp_path / "out", SelectionConfig(top_k=11))
    assert chosen.note == "kept 10 of a budget of 11 documents: there are no more"
    assert read(tmp_path / "out")[1] == []


def test_near_duplicates_by_hand(tmp_path):
    scores = write(tmp_path / "scores", POOL)
    clusters = write_clusters(tmp_path / "c.parquet", {"a0": 0, "a1": 0, "a2": 0, "a4": 1, "b0": 1, "elsewhere": 1})
    chosen = select(scores, tmp_path / "out", SelectionConfig(top_k=4, max_per_cluster=1), clusters=clusters)
    kept, dropped = read(tmp_path / "out")
    assert [(r["doc_id"], r["rank"]) for r in kept] == [("a0", 1), ("a3", 4), ("a4", 5), ("a5", 6)]
    assert [r["reason"] for r in dropped[:3]] == ["near-duplicate of a0"] * 2 + ["near-duplicate of a4"]
    assert [r["reason"] for r in dropped[3:]] == [BELOW_THE_CUT] * 3
    assert (chosen.near_duplicates, chosen.note, set(dropped[0])) == (3, "", {*kept[0], "reason"})
    within = SelectionConfig(budget_tokens=50, max_per_cluster=1, max_share={"a": 0.4})
    select(scores, tmp_path / "out", within, clusters=clusters)
    assert ids(tmp_path / "out") == ["a0", "a3", "b1", "b2", "b3"]  # a1 and a2 take nothing of the share of a
    chosen = select(scores, tmp_path / "out", SelectionConfig(top_k=9, max_per_cluster=1), clusters=clusters)
    assert chosen.note == "kept 7 of a budget of 9 documents: the others are near-duplicates"
    rows = [(f"{i:02d}", "a", 1, float(i)) for i in range(20)]
    clusters = write_clusters(tmp_path / "c.parquet", {r[0]: 0 for r in rows})
    noisy = SelectionConfig(top_k=5, max_per_cluster=1, temperature=100.0)
    select(write(tmp_path / "noisy", rows), tmp_path / "out", noisy, clusters=clusters)
    best = max(rows, key=lambda r: key(r, 100.0, 0))[0]
    assert ids(tmp_path / "out") == [best] != ["19"]  # the best by the noisy score, not by the score
    with pytest.raises(BilectError, match="max_per_cluster compares texts, and there are none beside these scores"):
        select(scores, tmp_path / "none", SelectionConfig(max_per_cluster=1))


def test_a_source_that_was_not_scored_is_named_with_the_nearest(tmp_path):
    scores = write(tmp_path / "scores", [("a", "books", 1, 0.0), ("b", "web", 1, 0.0)])
    for share in ("min_share", "max_share"):
        with pytest.raises(BilectError, match=r"no source 'book' was scored; did you mean 'books'\?"):
            select(scores, tmp_path / "out", SelectionConfig(**{share: {"book": 0.5}}))


def test_a_sample_does_not_depend_on_the_files(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"doc-{i}", "ab"[i % 2], i % 9 + 1, float(np.float32(x))) for i, x in enumerate(rng.standard_normal(300))]
    config = SelectionConfig(keep_ratio=0.3, temperature=1.0)
    select(write(tmp_path / "one", rows, files=1), tmp_path / "out", config, seed=1)
    one = [(tmp_path / "out" / f"{name}.parquet").read_bytes() for name in ("kept", "dropped")]
    files = sorted(write(tmp_path / "many", [rows[i] for i in rng.permutation(300)], files=7).iterdir())
    select(files[::-1], tmp_path / "out", config, seed=1)
    assert one == [(tmp_path / "out" / f"{name}.parquet").read_bytes() for name in ("kept", "dropped")]
    first = set(ids(tmp_path / "out"))
    select(files, tmp_path / "out", config, seed=2)
    second = set(ids(tmp_path / "out"))
    assert 0.2 * len(first) < len(first & second) < 0.8 * len(first)


def test_a_high_temperature_is_a_uniform_sample(tmp_path):
    rows = [(f"d{i:04d}", "s", 1, i / 1000) for i in range(4000)]
    scores = write(tmp_path / "scores", rows)
    select(scores, tmp_path / "out", SelectionConfig(top_k=1000, temperature=1e6))
    quarters = np.bincount([int(d[1:]) // 1000 for d in ids(tmp_path / "out")], minlength=4)
    assert quarters.sum() == 1000 and (abs(quarters - 250) < 4 * math.sqrt(1000 * 0.25 * 0.75)).all()


def test_the_first_document_follows_the_softmax():
    # the reference `key`, which test_matches_the_rule holds the files to, on many seeds
    rows = [("a", "s", 1, 0.0), ("b", "s", 1, 0.5), ("c", "s", 1, 1.0), ("d", "s", 1, -1.0)]
    temperature, draws = 0.8, 8000
    first = np.bincount([int(np.argmax([key(r, temperature, seed) for r in rows])) for seed in range(draws)])
    odds = np.exp(np.array([r[3] for r in rows]) / temperature)
    p = odds / odds.sum()
    assert (abs(first / draws - p) < 4 * np.sqrt(p * (1 - p) / draws)).all()


GOOD = [("a", "s", 10, 0.9), ("b", "s", 10, 0.8)]


def corrupt_footer(folder):
    (folder / "part-00001.parquet").write_bytes(b"PAR1 no footer")


def corrupt_page(folder):
    file = folder / "part-00001.parquet"
    data = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(0).column(3).data_page_offset
    data[start : start + 20] = b"\xff" * 20
    file.write_bytes(bytes(data))


def drop_column(folder):
    file = folder / "part-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["n_tokens"]), file)


def empty(folder):
    shutil.rmtree(folder)
    write(folder, [], files=1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"no score files in .*scores"),
        (corrupt_footer, r"part-00001\.parquet is not a readable Parquet file"),
        (corrupt_page, r"part-00001\.parquet is damaged"),
        (drop_column, r"part-00001\.parquet has no column 'n_tokens'"),
        (empty, "no documents"),
        (lambda f: write(f, [*GOOD, ("d", "s", 1, math.inf), ("c", "s", 1, math.nan)]),
         "scores of 2 documents are not finite, 'c' for one"),
        (lambda f: write(f, [*GOOD, ("c", "s", 1, None)]), "scores of 1 documents are not finite, 'c' for one"),
        (lambda f: write(f, [*GOOD, ("c", None, 1, 0.0)]), "1 documents lack their source"),
        (lambda f: write(f, [*GOOD, (None, "s", 1, 0.0)]), "1 documents lack their doc_id"),
        (lambda f: write(f, [*GOOD, ("b", "s", 1, 0.0), ("a", "t", 1, 0.9)]),
         "2 doc_ids were scored more than once, 'a' for one"),
        (lambda f: write(f, [*GOOD, *(("a", "t", 1, x) for x in (0.9, 0.8, 0.7))]), "1 doc_ids were scored more than"),
        (lambda f: write(f, [("a", "s", 0, 1.0)]), "nothing to keep"),
    ],
)  # fmt: skip
def test_a_failure_leaves_an_earlier_result_untouched(tmp_path, spoil, message):
    scores = write(tmp_path / "scores", GOOD)
    select(scores, tmp_path / "out", SelectionConfig())
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    spoil(scores)
    clusters = write_clusters(tmp_path / "clusters.parquet", {"a": 0, "b": 0})
    with pytest.raises(BilectError, match=message) as caught:
        select(scores, tmp_path / "out", SelectionConfig(max_per_cluster=1), clusters=clusters)
    assert "\n" not in str(caught.value)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {p.name for p in tmp_path.iterdir()} <= {"scores", "out", "clusters.parquet"}  # no temporary files


def test_a_full_disk_is_not_swallowed(tmp_path, monkeypatch):
    scores = write(tmp_path / "scores", GOOD)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        select(scores, tmp_path / "out", SelectionConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def test_duckdb_reads_what_is_written(tmp_path):
    select(write(tmp_path / "scores", POOL), tmp_path / "out", SelectionConfig(top_k=3))
    query = f"SELECT reason, count(*), min(rank), max(rank) FROM '{tmp_path / 'out' / 'dropped.parquet'}' GROUP BY 1"
    with duckdb.connect() as db:
        assert db.sql(query).fetchall() == [(BELOW_THE_CUT, 7, 4, 10)]


def test_equal_scores_do_not_fill_one_bucket(tmp_path, monkeypatch):
    for name, value in {"BUCKET_ROWS": 100, "CHUNK_ROWS": 70, "SCAN_ROWS": 64}.items():
        monkeypatch.setattr(selection_order, name, value)
    rows = [(f"d{i * 7919 % 2000:04d}", "ab"[i % 2], 1, 0.5) for i in range(2000)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ranked = selection_order.RankedScores(write(tmp_path / "scores", rows), scratch)
    filled = [bucket.count for bucket in ranked._buckets]
    assert sum(filled) == 2000 and max(filled) <= 100  # the sample is all of them, so the ranges are exact
    tables = list(ranked.chunks())
    assert [len(t) for t in tables] == [70] * 28 + [40]
    assert [d for t in tables for d in t["doc_id"].to_pylist()] == [f"d{i:04d}" for i in range(2000)]
    assert [r for t in tables for r in t["rank"].to_pylist()] == list(range(1, 2001))


def test_different_ids_of_one_hash_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(Hashes, "append", lambda self, hash_D: None)
    monkeypatch.setattr(Hashes, "repeated", lambda self: np.array([hash_of("a0"), 1], np.uint64))
    select(write(tmp_path / "scores", POOL), tmp_path / "out", SelectionConfig(top_k=3))
    assert ids(tmp_path / "out") == ["a0", "a1", "a2"]
    with pytest.raises(BilectError, match="1 doc_ids were scored more than once, 'a0' for one"):
        select(write(tmp_path / "more", [*POOL, POOL[0]]), tmp_path / "out", SelectionConfig(top_k=3))


def hash_of(doc_id):
    with duckdb.connect() as db:
        return db.execute("SELECT hash(?::VARCHAR)", [doc_id]).fetchone()[0]


def test_names_of_folders_are_no_columns(tmp_path):
    rows = [("a", "web", 1, 0.9), ("b", "web", 1, 0.8), ("c", "books", 1, 0.1)]
    plain = write(tmp_path / "scores", rows)
    clusters = write_clusters(tmp_path / "c.parquet", {"a": 0, "b": 0})
    config = SelectionConfig(top_k=2, max_per_cluster=1)
    select(plain, tmp_path / "out", config, clusters=clusters)
    hive = tmp_path / "source=c4" / "score=0" / "cluster=1" / "doc_id=7"
    scores = write(hive / "scores", rows)
    select(scores, hive / "out", config, clusters=write_clusters(hive / "c.parquet", {"a": 0, "b": 0}))
    for name in ("kept", "dropped"):
        assert (
            pq.ParquetFile(hive / "out" / f"{name}.parquet")
            .read()
            .equals(pq.ParquetFile(tmp_path / "out" / f"{name}.parquet").read())
        )


PEAK = """
import sys
from pathlib import Path
from bilect.config import SelectionConfig
from bilect.runtime.memory import peak_gb, reset_peak
from bilect.selection import ranking, spill
from bilect.selection.select import select
ranking.BUCKET_ROWS, ranking.CHUNK_ROWS, ranking.SCAN_ROWS, spill.HASH_ROWS = 1 << 15, 1 << 14, 1 << 14, 1 << 15
reset_peak()
select(Path(sys.argv[1]), Path(sys.argv[1]).parent / "out", SelectionConfig(top_k=1000))
print(peak_gb())
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    sizes = {"small": 600_000, "large": 2_400_000}  # of both all buffers fill
    for name, rows in sizes.items():
        rng = np.random.default_rng(rows)
        (tmp_path / name).mkdir()
        columns = {"doc_id": pa.array([f"document-{i:016x}" for i in rng.permutation(rows)]),
                   "source": pa.array(["web"] * rows), "n_tokens": pa.array(np.full(rows, 9, np.int32)),
                   "score": pa.array(rng.standard_normal(rows, np.float32))}  # fmt: skip
        pq.write_table(pa.table(columns), tmp_path / name / "0.parquet", row_group_size=1 << 14)
    peak = {}
    for name in sizes:  # a process each: what a library keeps of one selection, for the next, is up to its allocator
        command = [sys.executable, "-c", PEAK, str(tmp_path / name)]
        peak[name] = 1e9 * float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    grown = peak["large"] - peak["small"]
    assert grown / (sizes["large"] - sizes["small"]) < 16  # about 0; one column of these doc_ids is 25 bytes a row
