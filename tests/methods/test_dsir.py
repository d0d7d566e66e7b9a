"""DSIR against a count by hand and against the published code."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bilect import methods
from bilect.methods.contract import Inputs, UpperSet
from tests.methods.planted import SOURCES, Counted, store_of, text_of


def fit(tmp_path: Path, raw: list[str], sets: list[tuple[float, list[str]]], **settings: Any) -> tuple[Any, Inputs]:
    upper: list[UpperSet] = [
        (f"u{k}", weight, store_of(tmp_path / f"u{k}.arrow", [("", t) for t in texts]))
        for k, (weight, texts) in enumerate(sets)
    ]
    pool = store_of(tmp_path / "pool.arrow", [("", t) for t in raw])
    inputs = Inputs(pool, np.arange(len(pool)), upper, tmp_path, tmp_path / "scratch", 0, 0, torch.device("cpu"))
    method = methods.make("dsir", settings)
    method.fit(inputs, Counted())
    return method, inputs


def grams(text: str) -> Counter[str]:
    words = text.lower().split()
    return Counter([*words, *(" ".join(pair) for pair in pairwise(words))])


def test_against_a_count_by_hand(tmp_path: Path) -> None:
    raw = ["w1 w2 w1", "w3 W4", "w2 w2 w5 w1", "w9"]
    sets = [(1.0, ["w1 w2", "w1"]), (3.0, ["w4 w9 w4"])]
    method, inputs = fit(tmp_path, raw, sets)

    def share(texts: list[str]) -> dict[str, float]:
        counts = sum((grams(t) for t in texts), Counter[str]())
        return {g: n / counts.total() for g, n in counts.items()}

    q, p = share(raw), [(weight / 4, share(texts)) for weight, texts in sets]
    expected = [
        sum(
            n * (np.log(sum(w * s.get(g, 0.0) for w, s in p) + 1e-8) - np.log(q[g] + 1e-8)) for g, n in grams(t).items()
        )
        for t in raw
    ]
    assert method.score(inputs.pool, np.arange(4)) == pytest.approx(expected, rel=1e-12)
    assert expected[0] != expected[3]


def test_the_score_is_a_sum_over_the_document(tmp_path: Path) -> None:
    method, inputs = fit(tmp_path, ["w1", "w2", "w1 w1 w1"], [(1.0, ["w1 w1 w2"])], ngrams=1)
    once, other, thrice = method.score(inputs.pool, np.arange(3))
    assert thrice == pytest.approx(3 * once) and once != other
    method, inputs = fit(tmp_path, ["w1", "w2", "w1 w1 w1"], [(1.0, ["w1 w1 w2"])], ngrams=1, length="mean")
    assert method.score(inputs.pool, np.arange(3)) == pytest.approx([once, other, once])


def punctuated(source: int, rng: random.Random) -> str:
    words = text_of(source, rng).split()
    return "".join(
        w.upper() + rng.choice([" ", ", ", ". ", " (", "; "]) if rng.random() < 0.3 else w + " " for w in words
    )


@pytest.mark.parametrize(("buckets", "least"), [(10_000, 0.95), (500_000, 0.995)])
def test_against_the_published_code(buckets: int, least: float, tmp_path: Path) -> None:
    """They hash by SHA-256, we by MurmurHash3: with fewer collisions the difference goes."""
    data_selection = pytest.importorskip("data_selection")
    rng = random.Random(0)
    raw = [punctuated(i % SOURCES, rng) for i in range(150)]
    target = [punctuated(2, rng) for _ in range(60)]
    for name, texts in (("raw", raw), ("target", target)):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    paths = ([str(tmp_path / f"{name}.jsonl")] for name in ("raw", "target"))
    theirs = data_selection.HashedNgramDSIR(*paths, str(tmp_path / "cache"), num_proc=1, num_buckets=buckets)
    theirs.fit_importance_estimator(num_tokens_to_fit="all")
    their_scores = [float(theirs.importance_estimator(theirs.featurizer(t))) for t in raw]
    method, inputs = fit(tmp_path, raw, [(1.0, target)], buckets=buckets)
    assert [t.strip() for t in inputs.pool.texts(inputs.rows)] == [t.strip() for t in raw]  # nothing was cut
    correlation = spearmanr(method.score(inputs.pool, inputs.rows), their_scores).statistic
    print(f"{buckets} buckets: rank correlation {correlation:.5f}")
    assert correlation > least
