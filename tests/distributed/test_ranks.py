"""Two and three gloo processes against one: the same weights, hypergradients, score model and proxy.

Five documents a batch, so the ranks hold unequal parts, padded to unequal widths.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import fit_on_ranks
from tests.distributed.fit_on_ranks import LEARNING_RATE, SCENARIOS, STEPS

SCRIPT = fit_on_ranks
LIMIT = 200  # seconds, for a machine that does much else; it takes about 20

# Everything is float64, so that what a sum over ranks must not change is told from what rounding does. The largest
# rounding error is that of central differences: eps / step = 2.2e-16 / 1e-6 = 2.2e-10 of the vector multiplied, per
# product; the float32 norms of a llama score model round its gradients, of order 0.1, by 6e-8 of themselves. One
# tolerance for all: more than a hundred times either, and far below what a wrong share of one document would change.
TOLERANCE = 1e-6


@cache
def one_rank(scenario: str) -> dict[str, Any]:
    return fit_on_ranks.run(scenario)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_equal_one_rank(ranks: list[dict[str, Any]], scenario: str) -> None:
    one, many = one_rank(scenario), ranks[0][scenario]
    assert len(many["steps"]) == STEPS
    for a, b in zip(one["steps"], many["steps"], strict=True):
        assert a["weight"].shape == b["weight"].shape == (5,)
        for figure in ("score", "weight", "d", "score_gradient"):
            assert largest(a[figure], b[figure]) <= TOLERANCE, figure
        assert a["score_gradient"].abs().max() > 0.1  # standardised d: of order one, so that the bounds mean something
    for a, b in zip(one["gradients"], many["gradients"], strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert largest(a[k], b[k]) <= TOLERANCE, k
    for part in ("score_model", "proxy"):
        for k, p in one[part].items():
            # Adam's steps are at most the learning rate, 1e-5, however small the gradient
            assert largest(p, many[part][k]) <= 1e-3 * LEARNING_RATE, (part, k)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_stay_together_exactly(ranks: list[dict[str, Any]], scenario: str) -> None:
    first, *others = (result[scenario] for result in ranks)
    for other in others:
        for part in ("score_model", "proxy"):
            for k, p in first[part].items():
                assert torch.equal(p, other[part][k]), (part, k)
        assert other["figures"] == first["figures"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_figures_are_of_the_global_batch(ranks: list[dict[str, Any]], scenario: str) -> None:
    for a, b in zip(one_rank(scenario)["figures"], ranks[0][scenario]["figures"], strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert b[k] == (pytest.approx(a[k], rel=TOLERANCE, abs=TOLERANCE) if isinstance(a[k], float) else a[k]), k


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_scenario_moves_things(scenario: str) -> None:
    """The comparison would be empty if nothing was trained."""
    one = one_rank(scenario)
    first, *_, last = one["steps"]
    assert largest(first["d"], last["d"]) > 1e-3
    assert all(max(float(g.abs().max()) for g in gradients.values()) > 1e-2 for gradients in one["gradients"])
    assert {len(s["weight"].unique()) for s in one["steps"]} == {5}


def test_primitives(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    total = sum(range(world))
    for rank, result in enumerate(r["collectives"] for r in ranks):
        assert result["world"] == world and result["main"] == (rank == 0)
        assert result["rows"] == [float(r) for r in range(world) for _ in range(r)]  # rank 0 has none
        assert result["own"]
        assert result["a"] == [[float(total + world)] * 3] * 2 and result["b"] == 10.0 * total
        assert result["sum"] == total + 0.5 * world
    for at, n in enumerate((0, 1, 5, 7)):
        parts = [r["collectives"]["parts"][at] for r in ranks]
        assert [i for p in parts for i in p] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
