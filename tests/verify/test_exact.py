"""The yardstick: closed forms, dense solves and enumeration, each against another way of having it."""

from functools import partial
from itertools import combinations

import pytest
import torch

from bilect.verify import exact, problems, selections
from bilect.verify.problems import F64, Problem


def tiny_language_model() -> Problem:
    return problems.language_model(n=6, length=4, vocab=3, width=3, n_upper=4)


@pytest.fixture(params=[problems.ridge, problems.softmax_regression, tiny_language_model])
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param()


def test_the_lower_level_is_solved_and_d_is_its_difference_quotient(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(3)
    alpha_N = torch.rand(problem.n_items, generator=generator, dtype=F64).softmax(0)
    solved = exact.solve(problem, alpha_N)
    slope = exact.gradient(partial(problem.lower, alpha_N), solved.params)
    assert float(exact.flat(slope).norm()) < 1e-9
    assert solved.eigenvalues[0] > 0
    torch.testing.assert_close(solved.hessian_PP @ solved.z_P, solved.upper_gradient_P, rtol=1e-9, atol=1e-12)
    for i in (0, problem.n_items - 1):
        one_N = torch.zeros(problem.n_items, dtype=F64)
        one_N[i] = alpha_N[i]
        ends = []
        for h in (1e-4, -1e-4):
            lower = partial(problem.lower, alpha_N + h * one_N)
            near = None if problem.convex else solved.hessian_PP  # the same minimum, not another
            ends.append(float(problem.upper(exact.minimise(problem, lower, solved.params, near))))
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(-float(solved.d_N[i] * alpha_N[i]), rel=1e-4, abs=1e-9)


def test_ridge_is_its_closed_form() -> None:
    problem = problems.ridge(n=20, width=3)
    alpha_N = torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=F64)
    x_ND, y_N = problem.losses.args  # type: ignore[attr-defined]
    normal = x_ND.T @ (alpha_N[:, None] * x_ND) + problem.l2 * torch.eye(3, dtype=F64)
    expected = torch.linalg.solve(normal, x_ND.T @ (alpha_N * y_N))
    torch.testing.assert_close(exact.solve(problem, alpha_N).params["weight"], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact.newton(problem, alpha_N[None])[0], expected, rtol=1e-10, atol=1e-12)


def test_the_weighted_mean_is_a_weighted_mean_and_its_phi_a_convex_quadratic() -> None:
    problem = problems.weighted_mean(n=6, width=2)
    (x_ND,) = problem.losses.args  # type: ignore[attr-defined]
    (x_UD,) = problem.upper_losses.args  # type: ignore[attr-defined]
    alpha_N = torch.tensor([0.3, 0.0, 0.2, 0.1, 0.4, 0.0], dtype=F64)
    w_D = alpha_N @ x_ND / (1 + problem.l2)
    solved = exact.solve(problem, alpha_N)
    torch.testing.assert_close(solved.params["weight"], w_D)
    # Phi along any direction that keeps the sum: exactly quadratic, curvature ||direction' X||^2 / (1 + l2)^2 >= 0
    direction_N = torch.tensor([0.1, 0.1, -0.2, 0.1, -0.1, 0.0], dtype=F64)

    def phi(h: float) -> float:
        return float(problem.upper(exact.solve(problem, alpha_N + h * direction_N).params))

    curvature = float((direction_N @ x_ND).square().sum()) / (1 + problem.l2) ** 2
    assert phi(1) - 2 * phi(0) + phi(-1) == pytest.approx(curvature)
    # d by hand: grad l_n = w - x_n, H = (1 + l2) I, grad f = w - mean x_u
    d_N = (w_D - x_ND) @ (w_D - x_UD.mean(0)) / (1 + problem.l2)
    torch.testing.assert_close(solved.d_N, d_N)


def test_a_saddle_point_is_an_error() -> None:
    problem = problems.ridge(n=8, width=2)
    with pytest.raises(ArithmeticError, match="not positive definite"):
        exact.minimise(problem, lambda w: -problem.lower(problem.uniform(), w), problem.start)


@pytest.mark.parametrize("make", [problems.ridge, problems.softmax_regression])
def test_enumeration_is_brute_force(make) -> None:
    problem = make(n=6, width=2)
    subsets_SN = selections.all_subsets(6, 3)
    losses = selections.retrained_upper_losses(problem, exact.newton(problem, subsets_SN / 3))
    expected = []
    for chosen in combinations(range(6), 3):
        alpha_N = torch.zeros(6, dtype=F64)
        alpha_N[list(chosen)] = 1 / 3
        w = problem.start["weight"].new_zeros(problem.n_params).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [w], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(alpha_N=alpha_N, w=w, optimizer=optimizer):
            optimizer.zero_grad()
            loss = problem.lower(alpha_N, problem.tree(w))
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        expected.append(float(problem.upper(problem.tree(w.detach()))))
    assert len(expected) == 20
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
