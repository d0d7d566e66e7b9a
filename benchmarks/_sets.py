"""A set, not a list: choices in which what is taken already counts. For benchmarks/choosing.py.

Pieces are compared by the cosine of their words and word pairs, weighted by tf-idf over the candidates.
"""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

AT_ONCE, LOOK = 64, 256  # taken between two looks at redundancy; nearest pieces that an example may fall back on


def features(candidates: list[str], others: list[str] | None = None) -> tuple[csr_matrix, csr_matrix]:
    """Rows of norm 1 for the candidates, and for other texts on the same scale."""
    vectorizer = HashingVectorizer(n_features=1 << 16, ngram_range=(1, 2), alternate_sign=False, norm=None,
                                   token_pattern=r"\w+|[^\w\s]+")  # fmt: skip
    scale = TfidfTransformer(sublinear_tf=True).fit(vectorizer.transform(candidates))

    def scaled(texts: list[str]) -> csr_matrix:
        return csr_matrix(scale.transform(vectorizer.transform(texts)))

    return scaled(candidates), scaled(others or [""])


def in_turn(candidates: list[str], examples: list[str], wanted: int, seed: int) -> np.ndarray:
    """Target examples take, in turn, the candidate nearest to each that is still there."""
    near_N, near_U = features(candidates, examples)
    order = np.random.default_rng(seed).permutation(len(examples))
    nearest = [first_of((near_U[u] @ near_N.T).toarray()[0]) for u in order]
    taken = set[int]()
    places = np.zeros(len(nearest), dtype=int)
    while len(taken) < wanted:
        before = len(taken)
        for k, list_L in enumerate(nearest):
            while places[k] < len(list_L) and int(list_L[places[k]]) in taken:
                places[k] += 1
            if places[k] < len(list_L) and len(taken) < wanted:
                taken.add(int(list_L[places[k]]))
        if len(taken) == before:
            raise ValueError(f"the nearest {LOOK} pieces of {len(examples)} examples are {before}, not {wanted}")
    return np.array(sorted(taken))


def first_of(similarity_N: np.ndarray) -> np.ndarray:
    return np.argsort(-similarity_N, kind="stable")[:LOOK]


def without_redundancy(
    candidates: list[str], score_N: np.ndarray, wanted: int, weight: float, say: Callable[[str], None] = print
) -> np.ndarray:
    """Greedily the best standardised score less ``weight`` times the greatest cosine with what is taken."""
    near_N, _ = features(candidates)
    utility_N = (score_N - score_N.mean()) / score_N.std()
    cosine_N, free_N = np.zeros(len(score_N)), np.ones(len(score_N), dtype=bool)
    while (left := wanted - int((~free_N).sum())) > 0:
        value_N = np.where(free_N, utility_N - weight * cosine_N, -np.inf)
        some = np.argsort(-value_N, kind="stable")[: min(AT_ONCE, left)]
        free_N[some] = False
        cosine_N = np.maximum(cosine_N, (near_N @ near_N[some].T).toarray().max(axis=1))
    plain = set(np.argsort(-score_N, kind="stable")[:wanted].tolist())
    taken = np.flatnonzero(~free_N)
    say(f"redundancy {weight}: {len(plain & set(taken.tolist())) / wanted:.2f} of the plain choice stays")
    return taken
