"""The exact metagradient against differences of whole trainings, and against its first-order limit."""

import pytest
import torch

from bilect.functional.metagradient import AdamState, SmoothAdam, metagradient

D, STEPS, B = 3, 7, 4


@pytest.fixture(params=[0, 5], ids=["fresh", "warm"])
def problem(request):
    """A logistic regression whose documents come again in later steps, some with moments from before."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_ND, y_N = draw(3 * B, D), draw(3 * B).sign()
    order = [torch.arange(B) + B * (t % 3) for t in range(STEPS)]
    start = AdamState.fresh({"a": draw(D), "b": draw(1)})
    if request.param:
        start = AdamState(start.theta, {"a": 0.1 * draw(D), "b": 0.1 * draw(1)},
                          {"a": draw(D).square(), "b": draw(1).square()}, request.param)  # fmt: skip

    def losses(rows):
        return lambda theta: torch.nn.functional.softplus(-y_N[rows] * (x_ND[rows] @ theta["a"] + theta["b"]))

    goal = {"a": draw(D), "b": draw(1)}

    def upper(theta):
        return sum((theta[k] - goal[k]).square().sum() for k in goal)

    def upper_gradient(theta):
        return {k: 2 * (theta[k] - goal[k]) for k in goal}

    return [losses(rows) for rows in order], upper, upper_gradient, start


RATES = [0.05 * (1 - t / STEPS) for t in range(STEPS)]


def test_equals_differences_of_whole_trainings(problem):
    losses, upper, upper_gradient, start = problem
    weights = [torch.linspace(0.5, 1.5, B, dtype=torch.float64) / B for _ in losses]
    found, end = metagradient(losses, weights, upper_gradient, start, RATES)

    def trained(weights):
        return upper(metagradient(losses, weights, upper_gradient, start, RATES)[1].theta)

    for t in range(STEPS):
        for i in range(B):
            shifted = []
            for eps in (1e-5, -1e-5):
                other = [w.clone() for w in weights]
                other[t][i] += eps
                shifted.append(float(trained(other)))
            assert float(found[t][i]) == pytest.approx((shifted[0] - shifted[1]) / 2e-5, rel=1e-5, abs=1e-9)
    assert end.step == start.step + STEPS and float(upper(end.theta)) != float(upper(start.theta))


def test_training_is_torchs_own_adam(problem):
    losses, _, upper_gradient, start = problem
    weights = [torch.full((B,), 1 / B, dtype=torch.float64) for _ in losses]
    _, end = metagradient(losses, weights, upper_gradient, start, RATES, SmoothAdam(eps=1e-12))
    theta = {k: v.clone().requires_grad_() for k, v in start.theta.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=1.0, eps=1e-12)
    for k, p in theta.items() if start.step else ():
        slots = {"exp_avg": start.first[k].clone(), "exp_avg_sq": start.second[k].clone()}
        optimizer.state[p] = {"step": torch.tensor(float(start.step)), **slots}
    for loss_B, rate in zip(losses, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss_B(theta).mean().backward()
        optimizer.step()
    for k, p in theta.items():
        torch.testing.assert_close(end.theta[k], p.detach(), rtol=1e-10, atol=1e-12)
