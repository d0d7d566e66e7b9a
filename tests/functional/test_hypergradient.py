"""The hypergradient on problems with closed forms: weighted ridge regression, solved exactly.

w*(alpha) = (X' A X + mu I)^-1 X' A y        l_n(w) = 1/2 (x_n' w - y_n)^2       Phi(alpha) = L_val(w*(alpha))
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilect.functional.directional import directional_finite_difference, directional_jvp, hvp_exact
from bilect.functional.hypergradient import penalty_values, score_gradient
from bilect.functional.linear_solve import cg
from bilect.functional.trees import Tree

N, D, MU = 9, 4, 0.1
F64 = torch.float64

scores = st.lists(st.floats(0.05, 3), min_size=2, max_size=8)


class Ridge:
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(2)
        self.x = torch.randn(N, D, generator=g, dtype=F64)
        self.y = torch.randn(N, generator=g, dtype=F64)
        self.x_val = torch.randn(12, D, generator=g, dtype=F64)
        self.y_val = torch.randn(12, generator=g, dtype=F64)

    def losses(self, w: Tensor) -> Tensor:
        return 0.5 * (self.x @ w - self.y) ** 2

    def upper(self, w: Tensor) -> Tensor:
        return 0.5 * ((self.x_val @ w - self.y_val) ** 2).mean()

    def lower(self, alpha: Tensor, w: Tensor) -> Tensor:
        return (alpha * self.losses(w)).sum() + 0.5 * MU * w @ w

    def solve(self, alpha: Tensor) -> Tensor:
        normal = self.x.T @ (alpha[:, None] * self.x) + MU * torch.eye(D, dtype=F64)
        return torch.linalg.solve(normal, self.x.T @ (alpha * self.y))

    def solve_penalised(self, alpha: Tensor, penalty: float) -> Tensor:
        """argmin of L_val + penalty * L_tr."""
        n_val = len(self.y_val)
        normal = penalty * (self.x.T @ (alpha[:, None] * self.x) + MU * torch.eye(D, dtype=F64))
        normal = normal + self.x_val.T @ self.x_val / n_val
        return torch.linalg.solve(normal, penalty * self.x.T @ (alpha * self.y) + self.x_val.T @ self.y_val / n_val)

    def phi(self, alpha: Tensor) -> Tensor:
        return self.upper(self.solve(alpha))

    def gradient_in_alpha(self, alpha: Tensor) -> Tensor:
        """``dPhi/dalpha_n = - grad l_n(w*)' H^-1 grad L_val(w*)``, densely."""
        w = self.solve(alpha)
        hessian = self.x.T @ (alpha[:, None] * self.x) + MU * torch.eye(D, dtype=F64)
        upper = self.x_val.T @ (self.x_val @ w - self.y_val) / len(self.y_val)
        per_example = (self.x @ w - self.y)[:, None] * self.x
        return -per_example @ torch.linalg.solve(hessian, upper)


@pytest.fixture
def ridge() -> Ridge:
    return Ridge()


def weigh(s: Tensor, weighting: str) -> Tensor:
    return s.softmax(0) if weighting == "softmax" else s / s.sum()


def central_differences(function, at: Tensor, step: float = 1e-5) -> Tensor:
    unit = torch.eye(len(at), dtype=F64)
    return torch.stack([(function(at + step * e) - function(at - step * e)) / (2 * step) for e in unit])


# ------------------------------------------------------------------------------------------- from values to scores


@given(scores, st.integers(0, 1000))
def test_softmax_score_gradient_is_its_closed_form(values: list[float], seed: int) -> None:
    s = torch.tensor(values, dtype=F64)
    d = torch.randn(len(s), generator=torch.Generator().manual_seed(seed), dtype=F64)
    gradient, weights = score_gradient(s, d, "softmax", standardised=False)
    p = [math.exp(v) / math.fsum(math.exp(u) for u in values) for v in values]
    mean = math.fsum(p_i * float(d_i) for p_i, d_i in zip(p, d, strict=True))
    assert weights.tolist() == pytest.approx(p, rel=1e-12)
    assert gradient.tolist() == pytest.approx(
        [-p_i * (float(d_i) - mean) for p_i, d_i in zip(p, d, strict=True)], rel=1e-9, abs=1e-14
    )
    assert not gradient.requires_grad and not weights.requires_grad


@given(scores, st.integers(0, 1000), st.sampled_from(["softmax", "naive"]))
def test_score_gradient_is_the_difference_quotient_of_minus_sum_p_d(
    values: list[float], seed: int, weighting: str
) -> None:
    s = torch.tensor(values, dtype=F64)
    d = torch.randn(len(s), generator=torch.Generator().manual_seed(seed), dtype=F64)
    expected = central_differences(lambda u: -(weigh(u, weighting) * d).sum(), s, 1e-6)
    gradient, weights = score_gradient(s, d, weighting, standardised=False)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, weigh(s, weighting))


def test_naive_score_gradient_is_its_closed_form() -> None:
    # dP_j/ds_i = (delta_ij - P_j) / sum s, so dPhi/ds_i = -(d_i - dbar) / sum s
    s, d = torch.tensor([1.0, 2.0, 5.0], dtype=F64), torch.tensor([3.0, -1.0, 0.5], dtype=F64)
    mean = (3.0 * 1 - 1.0 * 2 + 0.5 * 5) / 8
    gradient, _ = score_gradient(s, d, "naive", standardised=False)
    assert gradient.tolist() == pytest.approx([-(v - mean) / 8 for v in (3.0, -1.0, 0.5)], rel=1e-14)


def test_standardising_only_rescales_the_softmax_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    s, d = torch.randn(6, generator=g, dtype=F64), 1e-7 * torch.randn(6, generator=g, dtype=F64) + 3
    plain, _ = score_gradient(s, d, "softmax", standardised=False)
    scaled, _ = score_gradient(s, d, "softmax", standardised=True)
    torch.testing.assert_close(scaled * d.std(correction=0), plain, rtol=1e-6, atol=1e-20)
    again, _ = score_gradient(s, 1e5 * d - 7)
    torch.testing.assert_close(again, scaled, rtol=1e-6, atol=1e-12)
    assert not score_gradient(s, torch.full_like(s, 0.1))[0].any()


def test_score_gradient_needs_no_graph_and_leaves_none() -> None:
    score, d = torch.randn(4, dtype=F64), torch.arange(4, dtype=F64)
    with torch.no_grad():
        gradient, _ = score_gradient(score, d)
    assert not score.requires_grad
    leaf = torch.randn(4, dtype=F64, requires_grad=True)
    score_gradient(2 * leaf, d)
    assert gradient.any() and leaf.grad is None


# ------------------------------------------------------------------------------------------------ implicit, exactly


def implicit_values(ridge: Ridge, alpha: Tensor, method: str) -> Tensor:
    """The estimator as the fit composes it, from the functions of ``bilect.functional``."""
    params: Tree = {"w": ridge.solve(alpha)}
    b = {"w": torch.func.grad(lambda p: ridge.upper(p["w"]))(params)["w"]}
    z = cg(hvp_exact(lambda p: ridge.lower(alpha, p["w"]), params), b, steps=20, tolerance=1e-14).z
    directional = directional_jvp if method == "jvp" else directional_finite_difference
    return directional(lambda p: ridge.losses(p["w"]), params, z)


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize("weighting", ["softmax", "naive"])
def test_implicit_is_the_gradient_of_the_resolved_lower_level(ridge: Ridge, weighting: str, method: str) -> None:
    s = torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=F64) + 0.2
    alpha = weigh(s, weighting)
    expected_alpha = central_differences(ridge.phi, alpha)
    assert float((ridge.gradient_in_alpha(alpha) - expected_alpha).norm() / expected_alpha.norm()) <= 1e-5
    d = implicit_values(ridge, alpha, method)
    assert float((-d - expected_alpha).norm() / expected_alpha.norm()) <= 1e-5
    expected = central_differences(lambda u: ridge.phi(weigh(u, weighting)), s)
    gradient, _ = score_gradient(s, d, weighting, standardised=False)
    assert float((gradient - expected).norm() / expected.norm()) <= 1e-5


def test_descending_the_hypergradient_lowers_the_upper_loss(ridge: Ridge) -> None:
    s = torch.zeros(N, dtype=F64)
    course = [float(ridge.phi(s.softmax(0)))]
    for _ in range(30):
        alpha = s.softmax(0)
        s = s - 0.5 * score_gradient(s, implicit_values(ridge, alpha, "jvp"), standardised=True)[0]
        course.append(float(ridge.phi(s.softmax(0))))
    assert all(after < before for before, after in itertools.pairwise(course))


# ---------------------------------------------------------------------------------------------------------- penalty


def test_penalty_tends_to_the_exact_gradient_at_rate_one_over_lambda(ridge: Ridge) -> None:
    alpha = torch.rand(N, generator=torch.Generator().manual_seed(6), dtype=F64) + 0.1
    exact = ridge.gradient_in_alpha(alpha)
    assert float((exact - central_differences(ridge.phi, alpha)).norm() / exact.norm()) <= 1e-5
    baseline = ridge.losses(ridge.solve(alpha))
    penalties = [10.0, 30.0, 100.0, 300.0, 1000.0]
    errors = []
    for penalty in penalties:
        d = penalty_values(baseline, ridge.losses(ridge.solve_penalised(alpha, penalty)), penalty)
        errors.append(float((-d - exact).norm() / exact.norm()))
    logs = [(math.log(p), math.log(e)) for p, e in zip(penalties, errors, strict=True)]
    mean_x, mean_y = (sum(c) / len(logs) for c in zip(*logs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    assert -1.2 <= slope <= -0.8
    assert errors[-1] < 1e-2


def test_penalty_sign() -> None:
    values = penalty_values(torch.tensor([2.0, 1.0]), torch.tensor([1.5, 3.0]), 2.0)
    assert values.tolist() == [1.0, -4.0]
