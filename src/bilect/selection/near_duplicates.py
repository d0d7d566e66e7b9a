"""Near-duplicates of a pool: MinHash signatures (rensa), compared within LSH bands, joined into clusters.

The similarity of two documents is the Jaccard index J = |A & B| / |A | B| of their sets of word 5-grams (words are in
lower case, between white space; a document of fewer is one shingle). Two signatures of 128 values agree in that share
of them on average (Broder 1997), with deviation sqrt(J (1 - J) / 128): 0.035 at J = 0.8. Pairs are looked for among
documents that agree in a whole band of the signature (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4).
Languages written without spaces have long "words": there, little more than equal texts is found.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import rensa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bilect.data.cache import file_hash
from bilect.data.store import TokenStore
from bilect.engines import Engine, Here
from bilect.runtime.files import content_hash

__all__ = ["band_rows", "cluster_file", "signatures"]

VALUES, WORDS, SEED = 128, 5, 0
RECALL = 0.99  # of the bands: chance that a pair just at the similarity is looked at
REACH = 64  # neighbours that a document is compared with in a bucket: a bucket of any size takes linear time
PAIRS = 1 << 14  # compared at a time
DOCUMENTS, AT_ONCE = 1 << 14, 1000  # of a block that is hashed by one process; in its memory at a time
_FORMAT = 1  # of the files; another one makes all of them anew
_ODD = np.random.default_rng(SEED).integers(0, 1 << 63, VALUES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def cluster_file(
    store: TokenStore,
    file: Path,
    similarity: float,
    on_documents: Callable[[int], None] = lambda n: None,
    engine: Engine | None = None,
) -> Path:
    """Write the clusters of a pool, unless ``file`` holds those of the same rows at the same similarity.

    Pairs whose estimated similarity reaches ``similarity`` are joined, and so are their clusters: two documents of one
    cluster need not be near-duplicates themselves where others lie between them. Neither the order of the documents nor
    that of the files matters. Memory: about 60 bytes per document, and 20 and its id for each in a cluster; scratch on
    the disk: 512 bytes per document.

    Args:
        store: of the pool; excluded rows belong to no cluster.
        file: Parquet, ``doc_id`` (ascending) and ``cluster`` (numbered in the order of their first ids), one row for
            each document of a cluster of two or more.
        similarity: least estimated Jaccard index of a pair.
        on_documents: called with the number of documents just hashed.
        engine: where they are hashed.
    """
    made_by = [_FORMAT, version("rensa"), similarity, store.excluded.tolist(), [file_hash(p) for p in store.paths]]
    key = content_hash(made_by).encode()
    if _key(file) == key:
        return file
    rows = np.setdiff1d(np.arange(len(store)), store.excluded)
    with tempfile.TemporaryDirectory(prefix=f".{file.stem}-", dir=file.parent) as scratch:
        out = Path(scratch) / "signatures"
        with out.open("wb") as whole:
            whole.truncate(len(rows) * VALUES * 4)
        blocks = pairwise([*range(0, len(rows), DOCUMENTS), len(rows)])
        for done in (engine or Here()).map(_Sign(store, rows, out), blocks):
            on_documents(done)
        label_D = _labels(np.memmap(out, np.uint32, "r", shape=(len(rows), VALUES)), similarity)
        clustered = np.flatnonzero(np.bincount(label_D)[label_D] > 1)
        doc_id = store.take("doc_id", rows[clustered])
        order = pc.sort_indices(doc_id)
        cluster = pa.array(label_D[clustered]).take(order).dictionary_encode().indices  # by first occurrence
        table = pa.table({"doc_id": doc_id.take(order), "cluster": cluster}).replace_schema_metadata({"key": key})
        pq.write_table(table, draft := Path(scratch) / "clusters")
        os.replace(draft, file)
    return file


@dataclass
class _Sign:
    """Writes the signatures of a block of documents to their place in a file."""

    store: TokenStore
    rows: np.ndarray
    file: Path

    def __call__(self, bounds: tuple[int, int]) -> int:
        first, stop = bounds
        with self.file.open("r+b") as out:
            out.seek(first * VALUES * 4)
            for some in _blocks(self.rows[first:stop], AT_ONCE):
                out.write(signatures(self.store.take("text", some)).data)
        return stop - first


def signatures(text: pa.StringArray) -> np.ndarray:
    """MinHash signatures of some texts, (D, 128) unsigned 32-bit integers; each a function of its text alone."""
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(text)))
    count_D = np.asarray(pc.list_value_length(words))
    encoded = words.flatten().dictionary_encode()
    hashes = rensa.RMinHash.hash_token_sets([encoded.dictionary.to_pylist()])[0]  # each word of the batch once
    word_W = np.array(hashes, dtype=np.uint64)[np.asarray(encoded.indices)]
    document_W = np.repeat(np.arange(len(text)), count_D)
    shingle_W, full_W = word_W * _ODD[0], np.zeros(len(word_W), bool)
    for k in range(1, WORDS):
        inside = document_W[k:] == document_W[:-k]
        shingle_W[: len(inside)] += word_W[k:] * _ODD[k] * inside
    full_W[: len(inside)] = inside
    end_D = np.cumsum(count_D)
    full_W[(end_D - count_D)[count_D > 0]] = True  # the first shingle of a short document is all of it
    ends = np.concatenate([[0], np.cumsum(np.bincount(document_W[full_W], minlength=len(text)))])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingle_W[full_W], ends.astype(np.uint64), VALUES, SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32)


def band_rows(similarity: float) -> int:
    """Values r of a band: the most for which a pair at the similarity s shares one of the b = 128 // r bands with
    probability 1 - (1 - s^r)^b of ``RECALL`` or more."""
    fit = [r for r in range(1, VALUES + 1) if 1 - (1 - similarity**r) ** (VALUES // r) >= RECALL]
    return max(fit, default=1)


def _labels(signature_DV: np.ndarray, similarity: float) -> np.ndarray:
    """Number of each document's cluster; documents of equal signatures are one from the start."""
    whole_D = np.concatenate([np.zeros(0, np.uint64), *(_hash(part) for part in _blocks(signature_DV))])
    # in the order of their content, so that nothing below depends on the order of the documents
    _, first_U, unique_D = np.unique(whole_D, return_index=True, return_inverse=True)
    label_U = np.arange(len(first_U))
    r = band_rows(similarity)
    for low in range(0, VALUES - r + 1, r):
        band_U = np.concatenate([_hash(p) for p in _blocks(signature_DV[:, low : low + r])] or [whole_D])[first_U]
        a, b = _pairs(signature_DV, first_U, band_U, label_U, similarity)
        if len(a):
            graph = coo_array((np.ones(len(a), bool), (label_U[a], label_U[b])), shape=(label_U.max() + 1,) * 2)
            label_U = connected_components(graph, directed=False)[1][label_U]
    return label_U[unique_D]


def _pairs(
    signature_DV: np.ndarray, first_U: np.ndarray, band_U: np.ndarray, label_U: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that agree in a band, lie in different clusters and reach the similarity."""
    order = np.argsort(band_U, kind="stable")
    band_U = band_U[order]
    found = [np.zeros((0, 2), np.int64)]
    at = np.arange(len(order))
    for distance in range(1, REACH + 1):
        at = at[at + distance < len(order)]
        at = at[band_U[at] == band_U[at + distance]]
        if not len(at):
            break
        pair_P2 = np.stack([order[at], order[at + distance]], axis=1)
        pair_P2 = pair_P2[label_U[pair_P2[:, 0]] != label_U[pair_P2[:, 1]]]
        for part in _blocks(pair_P2, PAIRS):
            a, b = (signature_DV[first_U[part[:, i]]] for i in (0, 1))
            found.append(part[(a == b).mean(axis=1) >= similarity])
    a_b = np.concatenate(found)
    return a_b[:, 0], a_b[:, 1]


def _hash(value_DV: np.ndarray) -> np.ndarray:
    return value_DV.astype(np.uint64) @ _ODD[: value_DV.shape[1]]


def _blocks(rows: np.ndarray, size: int = 1 << 16) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _key(file: Path) -> bytes | None:
    try:
        return (pq.read_schema(file).metadata or {}).get(b"key")
    except (pa.ArrowException, OSError):
        return None  # none there, or none that can be read
