"""Choices in which what is taken already counts."""

import numpy as np
import pytest

from benchmarks._sets import in_turn, without_redundancy

POOL = ["a prime sum", "a prime sum of roots", "rain and wind", "rain and cloud", "a blue sky", "wind of storm"]


def test_examples_take_their_nearest_in_turn():
    """The first takes 0; the second, equal to it, what is nearest of the rest; the third the wind."""
    taken = in_turn(POOL, ["a prime sum", "a prime sum", "rain wind"], 3, seed=0)
    assert taken.tolist() == [0, 1, 2]
    assert set(in_turn(POOL, ["a prime sum", "a prime sum", "rain wind"], 5, seed=0)) > {0, 1, 2}
    with pytest.raises(ValueError, match="are 6, not 7"):
        in_turn(POOL, ["rain"], 7, seed=0)


def test_redundancy_costs_a_copy_its_place(monkeypatch):
    monkeypatch.setattr("benchmarks._sets.AT_ONCE", 1)
    said: list[str] = []
    score_N = np.array([3.0, 2.9, 1.0, 0.9, 2.8, 0.0])
    pool = [POOL[0], POOL[0], *POOL[2:]]
    assert without_redundancy(pool, score_N, 3, 0.0, said.append).tolist() == [0, 1, 4]
    assert without_redundancy(pool, score_N, 3, 5.0, said.append).tolist() == [0, 2, 4]
    assert said == ["redundancy 0.0: 1.00 of the plain choice stays", "redundancy 5.0: 0.67 of the plain choice stays"]
