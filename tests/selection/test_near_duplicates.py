"""Signatures against exact Jaccard indices; clusters of exact and near-duplicates, whatever the order."""

import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilect.data.store import TokenStore
from bilect.selection import near_duplicates
from bilect.selection.near_duplicates import band_rows, cluster_file, signatures

VOCABULARY = [f"w{i}" for i in range(500)]


def text(seed, words=200):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def changed(base, *places):
    """Each changed word, away from the ends and from the others, changes 5 of the shingles."""
    words = base.split()
    for place in places:
        words[place] = "NEW"
    return " ".join(words)


def jaccard(a, b):
    a, b = ({tuple(w[i : i + 5]) for i in range(max(len(w) - 4, 1))} for w in (a.lower().split(), b.lower().split()))
    return len(a & b) / len(a | b)


def store_of(folder, texts, files=1, batch=1000, excluded=()):
    """Token files with (doc_id, text) rows; of the tokens themselves nothing is read."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(texts)), files)):
        rows = [texts[i] for i in part]
        columns = {"doc_id": [r[0] for r in rows], "text": [r[1] for r in rows], "n_given": pa.array([1] * len(rows))}
        table = pa.table({**columns, "input_ids": pa.array([[1]] * len(rows), pa.list_(pa.int32()))})
        with pa.ipc.new_stream(str(folder / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
    return TokenStore(folder, excluded=excluded)


def clusters_of(store, file, similarity=0.8):
    table = pq.read_table(cluster_file(store, file, similarity)).to_pydict()
    return dict(zip(table["doc_id"], table["cluster"], strict=True))


BASE, OTHER = text(1), text(2)
POOL = [
    ("other", OTHER),
    ("same-2", BASE),
    ("same-1", "  " + re.sub(" ", "\n", BASE).upper()),  # equal but for white space and case
    ("near", changed(BASE, 100)),  # J = 191 / 201
    ("far", changed(BASE, 20, 40, 60, 80, 100, 120, 140)),  # J = 161 / 231: 0.70
    ("short-1", "hello there"),
    ("short-2", "hello  there\n"),
    ("longer", "hello there you"),
    ("tail", OTHER + " " + text(3, 400)),  # all of another document, but a third of this one
]


def test_exact_and_near_duplicates_are_clusters(tmp_path):
    assert jaccard(BASE, POOL[3][1]) == 191 / 201 and jaccard(BASE, POOL[4][1]) == 161 / 231
    found = clusters_of(store_of(tmp_path / "pool", POOL), tmp_path / "clusters.parquet")
    assert found == {"near": 0, "same-1": 0, "same-2": 0, "short-1": 1, "short-2": 1}
    assert list(found) == sorted(found)
    looser = clusters_of(TokenStore(tmp_path / "pool"), tmp_path / "looser.parquet", 0.5)
    assert {d for d, c in looser.items() if c == looser["far"]} == {"far", "near", "same-1", "same-2"}


def test_excluded_documents_are_in_no_cluster(tmp_path):
    store = store_of(tmp_path / "pool", POOL, batch=2, excluded=[1, 2, 3, 5])
    assert clusters_of(store, tmp_path / "clusters.parquet") == {}
    store = TokenStore(tmp_path / "pool", excluded=[0, 1])
    assert clusters_of(store, tmp_path / "clusters.parquet") == {"near": 0, "same-1": 0, "short-1": 1, "short-2": 1}


def test_neither_order_nor_files_nor_batches_matter(tmp_path):
    rng = random.Random(0)
    pool = [(f"{n}-{k}", changed(text(n), *rng.sample(range(200), 2 * k))) for n in range(12) for k in range(4)]
    first = clusters_of(store_of(tmp_path / "a", pool), tmp_path / "a.parquet")
    assert len(first) > 24 and {d.split("-")[0] for d in first} == {str(n) for n in range(12)}
    rng.shuffle(pool)
    assert clusters_of(store_of(tmp_path / "b", pool, files=3, batch=5), tmp_path / "b.parquet") == first


def test_a_bucket_larger_than_the_reach_is_one_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "REACH", 2)
    monkeypatch.setattr(near_duplicates, "PAIRS", 7)  # several blocks of pairs
    pool = [(f"{n:02d}", changed(BASE, n)) for n in range(5, 45)]
    assert clusters_of(store_of(tmp_path / "pool", pool), tmp_path / "c.parquet") == {d: 0 for d, _ in pool}


def test_the_file_is_made_once_for_its_rows_and_similarity(tmp_path):
    store, file = store_of(tmp_path / "pool", POOL), tmp_path / "clusters.parquet"
    hashed = []
    for similarity in (0.8, 0.8, 0.9):
        cluster_file(store, file, similarity, hashed.append)
    assert hashed == [9, 9]
    cluster_file(TokenStore(tmp_path / "pool", excluded=[0]), file, 0.9, hashed.append)
    file.write_bytes(b"damaged")
    cluster_file(TokenStore(tmp_path / "pool", excluded=[0]), file, 0.9, hashed.append)
    assert hashed == [9, 9, 8, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clusters.parquet", "pool"]


def test_signatures_estimate_the_jaccard_index():
    # 40 pairs at 6 indices: the mean error of each 40 is within 4 deviations, and so is the spread
    for changes in (0, 2, 5, 9, 14, 20):
        pairs = [(text(s), changed(text(s), *range(8, 8 + 8 * changes, 8))) for s in range(40)]
        true = np.array([jaccard(*p) for p in pairs])
        a, b = (signatures(pa.array([p[i] for p in pairs])) for i in (0, 1))
        error = (a == b).mean(axis=1) - true
        deviation = np.sqrt(true * (1 - true) / 128).mean()
        assert abs(error.mean()) <= 4 * deviation / np.sqrt(40)
        assert error.std() == pytest.approx(deviation, rel=0.5)
    assert (signatures(pa.array([BASE]))[0] == signatures(pa.array(["x y", "", BASE, OTHER]))[2]).all()


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95, 1.0])
def test_bands_find_a_pair_at_the_similarity(similarity):
    r = band_rows(similarity)
    b = near_duplicates.VALUES // r
    assert 1 - (1 - similarity**r) ** b >= 0.99
    if r < near_duplicates.VALUES:
        assert 1 - (1 - similarity ** (r + 1)) ** (near_duplicates.VALUES // (r + 1)) < 0.99
    assert band_rows(0.8) == 6
