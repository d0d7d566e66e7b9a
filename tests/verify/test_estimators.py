"""The penalised problem, twins and Frank-Wolfe on their own, and that every kind of claim can fail."""

import math
from functools import partial

import pytest
import torch

from bilect.bilevel.objective import Gradient
from bilect.bilevel.offline.twins import Twins
from bilect.functional import linear_solve
from bilect.verify import direct, exact, implicit, penalty, practice, problems, selections
from bilect.verify.claims import Claim, log_slope
from bilect.verify.problems import F64, Problem


class Level:
    """What ``Twins.train`` sees of an objective."""

    def __init__(self, objective) -> None:
        self.objective = objective

    def gradient(self, params, bf16: bool = False):
        return Gradient(exact.gradient(self.objective, params), *torch.zeros(2), torch.zeros(0))


@pytest.fixture
def problem() -> Problem:
    return problems.softmax_regression(n=20, width=3, classes=3)


@pytest.fixture
def solved(problem: Problem) -> exact.Solved:
    return exact.solve(problem, problem.uniform())


def missed(found) -> list[str]:
    return [c.text for c in found if isinstance(c, Claim) and not c.passed]


# --------------------------------------------------------------------------------------------------------------- claims


def test_a_claim_needs_a_bound_and_nan_misses_it() -> None:
    with pytest.raises(ValueError, match="needs a bound"):
        Claim("p", "t", 1.0, "w")
    for value, low, high, passed in (
        (1.0, 1.0, None, True), (0.9, 1.0, None, False), (1.0, None, 1.0, True), (1.1, None, 1.0, False),
        (math.nan, 0.0, None, False), (math.nan, None, 0.0, False), (math.inf, None, 1.0, False),
    ):  # fmt: skip
        assert Claim("p", "t", value, "w", low, high).passed == passed
    assert Claim("p", "t", 1.0, "w", -1.2, -0.8).tolerance == "-1.2 to -0.8"
    assert Claim("p", "t", math.nan, "w", high=1.0).record()["value"] is None
    assert log_slope([1.0, 2.0, 8.0], [3.0, 0.75, 3 / 64]) == pytest.approx(-2)


# ------------------------------------------------------------------------------------------------------------- implicit


def test_wrong_solvers_miss_their_bounds(problem: Problem, solved: exact.Solved, monkeypatch) -> None:
    check = partial(implicit.check_solvers, solved=solved, convex=True)
    assert missed(check(implicit.sweep(problem, solved))) == []
    cg, neumann = linear_solve.cg, linear_solve.neumann
    # a cg that restarts at every step is steepest descent: right in the end, and too slow
    monkeypatch.setattr(linear_solve, "cg", lambda hvp, b, steps, damping=0.0: cg(hvp, b, steps=1, damping=damping))
    monkeypatch.setattr(linear_solve, "neumann", lambda hvp, b, **k: neumann(hvp, b, steps=0, step_size=1.0))
    texts = missed(check(implicit.sweep(problem, solved)))
    assert len(texts) == 3 and sum("bound" in t for t in texts) == 2 and sum("cosine" in t for t in texts) == 1


# -------------------------------------------------------------------------------------------------------------- penalty


def test_rho_of_ridge_is_where_the_penalised_hessian_loses_its_definiteness_or_doubles() -> None:
    problem = problems.ridge(n=10, width=3)
    solved = exact.solve(problem, problem.uniform())
    penalised = penalty.Penalised(problem, solved)
    values = torch.linalg.eigvals(torch.linalg.solve(solved.hessian_PP, penalised.upper_hessian_PP)).real
    assert penalised.rho == pytest.approx(float(values.abs().max()))
    # f and g are quadratic: w_lambda has a closed form
    lam = 3.0
    w_P = exact.flat(solved.params) - torch.linalg.solve(
        penalised.upper_hessian_PP + lam * solved.hessian_PP, solved.upper_gradient_P
    )
    expected_N = lam * (problem.losses(solved.params) - problem.losses(problem.tree(w_P)))
    torch.testing.assert_close(penalised.values(lam), expected_N, rtol=1e-8, atol=1e-10)


def test_an_error_that_does_not_fall_with_lambda_misses_the_slope(problem, solved, monkeypatch) -> None:
    rows = penalty.sweep(problem, solved)
    assert missed(penalty.check_penalty(rows)) == []
    values = penalty.Penalised.values
    monkeypatch.setattr(penalty.Penalised, "values", lambda self, lam: 1.05 * values(self, lam))
    assert len(missed(penalty.check_penalty(penalty.sweep(problem, solved)))) == 1


# ------------------------------------------------------------------------------------------------------------- practice


def test_twins_are_the_projects(problem: Problem) -> None:
    u = practice.warm_up(problem, 5, 1e-2)
    alpha_N = problem.uniform()
    w, m = practice.after(4, practice.twins(problem, u, alpha_N, 3e-2, whole=True))
    levels = Level(partial(problem.lower, alpha_N)), Level(problem.upper)
    theirs = Twins.train(
        u.params, lambda: levels, steps=4, learning_rate=3e-2, penalty=practice.PENALTY, matched=True, grad_clip=1.0
    )
    for k in w:
        torch.testing.assert_close(w[k], theirs.reference[k])
        torch.testing.assert_close(m[k], theirs.matched[k])
        assert not torch.equal(w[k], m[k])


def test_adamw_that_remembers_steps_by_the_moment_it_remembers(problem: Problem) -> None:
    u = practice.warm_up(problem, 50, 1e-2)
    _, m = practice.after(1, practice.twins(problem, u, problem.uniform(), 1e-3, "adamw, warm", whole=True))
    slope = exact.gradient(partial(problem.lower, problem.uniform()), u.params)
    for k, v in u.second_moment.items():  # first moment 0.1 g, second 0.999 v + 0.001 g^2, no correction
        step = 1e-3 * 0.1 * slope[k] / ((0.999 * v + 0.001 * slope[k] ** 2).sqrt() + 1e-8)
        torch.testing.assert_close(u.params[k] - m[k], step, rtol=1e-6, atol=1e-12)


def test_the_matched_twin_tends_to_identity_and_the_plain_one_does_not(problem, solved, monkeypatch) -> None:
    u = practice.warm_up(problem, 5, 1e-2)  # far from converged
    assert practice.check_matched(problem, solved, u).passed
    real = practice.values
    monkeypatch.setattr(practice, "values", lambda *a: {"matched": real(*a)["model"]})
    assert not practice.check_matched(problem, solved, u).passed


def test_unrolled_is_the_difference_quotient_of_the_trained_upper_loss() -> None:
    problem = problems.softmax_regression(n=10, width=2)
    alpha_N = problem.uniform()

    def trained(weight_N):
        w = problem.start
        for _ in range(5):
            slope = exact.gradient(partial(problem.lower, weight_N), w)
            w = {k: v - 0.5 * slope[k] for k, v in w.items()}
        return float(problem.upper(w))

    d_N = practice.unrolled(problem, problem.start, alpha_N, 5, 0.5)
    for i in (0, 9):
        one_N = torch.eye(10, dtype=F64)[i] * 1e-5
        assert -float(d_N[i]) == pytest.approx((trained(alpha_N + one_N) - trained(alpha_N - one_N)) / 2e-5, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- selections


def test_frank_wolfe_on_enumerated_subsets() -> None:
    figures = selections.study(problems.weighted_mean(n=6, width=2), 3, 12)
    assert figures["subsets"] == 20
    assert missed(selections.check_selections([figures])) == []
    assert min(min(c["gap"]) for c in figures["curves"]) >= -1e-12
    assert all(row["regret"] >= -1e-12 for row in figures["rows"])


def test_frank_wolfe_that_forgets_or_climbs_misses_its_claims(monkeypatch) -> None:
    problem = problems.weighted_mean(n=6, width=2)
    monkeypatch.setattr(selections, "step_size", lambda t, memoryless: 1.0)
    texts = missed(selections.check_selections([selections.study(problem, 3, 12)]))
    assert any("duality gap" in t for t in texts) and any("its alpha" in t for t in texts)
    monkeypatch.undo()
    monkeypatch.setattr(selections.Penalised, "values", lambda self, lam: -self.solved.d_N)
    texts = missed(selections.check_selections([selections.study(problem, 3, 12)]))
    assert len(texts) == 2 and all("penalty" in t for t in texts)


# --------------------------------------------------------------------------------------------------- influence, excess


def test_wrong_scores_miss_their_claims(problem: Problem, solved: exact.Solved, monkeypatch) -> None:
    assert missed(direct.check_direct(problem, solved)) == []
    monkeypatch.setattr(direct, "directional_finite_difference", lambda losses, params, z: solved.d_N * (1 + 2e-6))
    (text,) = missed(direct.check_direct(problem, solved))
    assert "influence with the exact z" in text
    monkeypatch.undo()
    excess = direct._excess
    monkeypatch.setattr(direct, "_excess", lambda *a: -excess(*a))  # keeps what should go
    (text,) = missed(direct.check_direct(problem, solved))
    assert "slope of log error" in text


def test_excess_after_one_step_of_adam_is_a_step_along_the_sign(problem: Problem, solved: exact.Solved) -> None:
    w = {k: v - 1e-2 * exact.gradient(problem.upper, solved.params)[k].sign() for k, v in solved.params.items()}
    with torch.no_grad():
        expected = problem.losses(solved.params) - problem.losses(w)
    assert torch.allclose(direct.excess_after(problem, solved.params, 1), expected, atol=1e-6)
