"""The oracle against brute force and linear programming; the gradient against autograd of the penalised problem."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from bilect.functional.frank_wolfe import (
    alpha_gradient,
    duality_gap,
    frank_wolfe_step,
    kept_count,
    linear_minimiser,
    step_size,
)

VALUES = st.lists(st.integers(-3, 3).map(float) | st.floats(-5, 5, allow_nan=False), min_size=1, max_size=12)


@given(VALUES, st.data())
def test_vertex_is_the_exact_minimum(values: list[float], data: st.DataObject) -> None:
    gradient = torch.tensor(values, dtype=torch.float64)
    k = data.draw(st.integers(0, len(values)))
    alpha = linear_minimiser(gradient, k)
    assert float(alpha.sum()) == k and set(alpha.tolist()) <= {0.0, 1.0}
    best = min(sum(c) for c in itertools.combinations(values, k))
    assert float(gradient @ alpha) == pytest.approx(best, abs=1e-12)
    program = linprog(values, A_eq=[[1.0] * len(values)], b_eq=[k], bounds=[(0, 1)] * len(values))
    assert float(gradient @ alpha) == pytest.approx(program.fun, abs=1e-9)


def test_ties_go_to_the_lower_index() -> None:
    assert linear_minimiser(torch.tensor([0.0, -1.0, 0.0, 0.0]), 2).tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="k must lie"):
        linear_minimiser(torch.zeros(3), 4)


def test_kept_count_is_the_ceiling_without_rounding_errors() -> None:
    assert [kept_count(10, r) for r in (0.7, 0.6, 0.61, 1.0, 1e-9)] == [7, 6, 7, 10, 1]
    assert kept_count(0, 0.5) == 0 and kept_count(1, 0.01) == 1
    assert all(kept_count(100, p / 100) == p for p in range(1, 101))
    for wrong in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="keep_ratio"):
            kept_count(10, wrong)


# ------------------------------------------------------------------------- weighted ridge regression, solved exactly

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X_VAL = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y_VAL = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RIDGE = 0.1


def losses(theta: Tensor) -> Tensor:
    """The ridge term is part of every example's loss, so that it carries the same weight at both levels."""
    return (X @ theta - Y) ** 2


def solve(alpha: Tensor, val: float, penalty: float) -> Tensor:
    """argmin of ``val * mean (x theta - y)^2 + penalty * (sum alpha_n l_n + RIDGE ||theta||^2)``."""
    a = penalty * (X.T @ (alpha[:, None] * X) + RIDGE * torch.eye(3)) + val * X_VAL.T @ X_VAL / 6
    return torch.linalg.solve(a, penalty * X.T @ (alpha * Y) + val * X_VAL.T @ Y_VAL / 6)


def penalised(alpha: Tensor, penalty: float) -> Tensor:
    w, u = solve(alpha, 1.0, penalty), solve(alpha, 0.0, 1.0)
    l_val = ((X_VAL @ w - Y_VAL) ** 2).mean()
    inner = [(alpha * losses(t)).sum() + RIDGE * t.square().sum() for t in (w, u)]
    return l_val + penalty * (inner[0] - inner[1])


@pytest.mark.parametrize("penalty", [0.5, 1.0, 20.0])
def test_gradient_in_alpha(penalty: float) -> None:
    """Autograd goes through both solutions; the formula needs their losses only."""
    alpha = torch.rand(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(penalised(alpha, penalty), alpha)
    with torch.no_grad():
        ours = alpha_gradient(losses(solve(alpha, 0, 1.0)), losses(solve(alpha, 1.0, penalty)), penalty)
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_frank_wolfe_reaches_a_stationary_point() -> None:
    """On a convex quadratic the gap bounds the distance from the minimum and goes to zero."""
    target = torch.tensor([0.9, 0.7, 0.3, 0.1, 0.0], dtype=torch.float64)  # in A with k = 2
    alpha = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    gaps = []
    for t in range(400):
        gradient = 2 * (alpha - target)
        gaps.append(float(duality_gap(gradient, alpha)))
        assert gaps[-1] >= float((alpha - target).square().sum()) - 1e-9
        alpha = frank_wolfe_step(alpha, gradient, step_size(t))
        assert float(alpha.sum()) == pytest.approx(2) and bool((alpha >= -1e-12).all() and (alpha <= 1 + 1e-12).all())
    assert step_size(0) == 1.0 and step_size(2) == 0.5
    assert gaps[0] > 1 and min(gaps) < 0.01
    torch.testing.assert_close(alpha, target, rtol=0, atol=0.05)


def test_memoryless_step_is_the_vertex() -> None:
    gradient, alpha = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    assert step_size(7, memoryless=True) == 1.0
    assert frank_wolfe_step(alpha, gradient, 1.0).tolist() == linear_minimiser(gradient, 1).tolist() == [0, 1, 0]
    assert float(duality_gap(gradient, linear_minimiser(gradient, 1))) == 0
