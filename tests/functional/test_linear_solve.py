"""Solvers of ``(H + damping I) z = b`` against a dense solve, explicit sums and literal loops."""

import math

import pytest
import torch
from torch import Tensor

from bilect.functional.linear_solve import (
    adam,
    cg,
    identity,
    neumann,
    next_second_moment,
    relative_residual,
    sgd,
    spectral_norm,
)
from bilect.functional.trees import Tree, TreeMap

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 1, 3)}
SIZE = 23


def flat(tree: Tree) -> Tensor:
    return torch.cat([tree[k].reshape(-1) for k in SHAPES])


def tree(vector: Tensor) -> Tree:
    pieces = vector.split([math.prod(shape) for shape in SHAPES.values()])
    return {k: p.reshape(shape) for (k, shape), p in zip(SHAPES.items(), pieces, strict=True)}


def product_with(matrix: Tensor) -> TreeMap:
    return lambda v: tree(matrix @ flat(v))


def matrix_with(eigenvalues: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(7)
    q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))
    return q @ torch.diag(eigenvalues) @ q.T


@pytest.fixture
def positive() -> Tensor:
    return matrix_with(torch.logspace(-2, 1, SIZE, dtype=torch.float64))


@pytest.fixture
def rhs() -> Tree:
    return tree(torch.randn(SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64))


def residual(matrix: Tensor, z: Tree, b: Tree, damping: float = 0.0) -> float:
    return float((matrix @ flat(z) + damping * flat(z) - flat(b)).norm() / flat(b).norm())


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_cg_solves(positive: Tensor, rhs: Tree, damping: float) -> None:
    solution = cg(product_with(positive), rhs, steps=200, damping=damping, tolerance=1e-12)
    expected = torch.linalg.solve(positive + damping * torch.eye(SIZE, dtype=torch.float64), flat(rhs))
    assert float((flat(solution.z) - expected).norm() / expected.norm()) <= 1e-8
    assert solution.residual is not None and solution.residual <= 1e-12
    assert solution.note == "" and solution.products < 200


def test_cg_ends_after_as_many_steps_as_there_are_eigenvalues(rhs: Tree) -> None:
    matrix = matrix_with(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).repeat(8)[:SIZE])
    solution = cg(product_with(matrix), rhs, steps=50, tolerance=1e-9)
    assert solution.products == 3
    assert residual(matrix, solution.z, rhs) <= 1e-9


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cg_cut_short_is_the_best_of_its_krylov_space(positive: Tensor, rhs: Tree, steps: int) -> None:
    b = flat(rhs)
    krylov = [b]
    for _ in range(steps - 1):
        krylov.append(positive @ krylov[-1])
    basis, _ = torch.linalg.qr(torch.stack(krylov, dim=1))
    expected = basis @ torch.linalg.solve(basis.T @ positive @ basis, basis.T @ b)
    counted = []
    solution = cg(lambda v: (counted.append(1), product_with(positive)(v))[1], rhs, steps=steps)
    assert float((flat(solution.z) - expected).norm() / expected.norm()) <= 1e-9
    assert solution.products == steps == len(counted)
    assert solution.residual == pytest.approx(residual(positive, solution.z, rhs), rel=1e-9)


def test_cg_on_negative_curvature_at_once_is_the_identity(rhs: Tree) -> None:
    matrix = -torch.eye(SIZE, dtype=torch.float64)
    solution = cg(product_with(matrix), rhs, steps=5)
    assert torch.equal(flat(solution.z), flat(rhs))
    assert solution.products == 1 and "identity" in solution.note
    assert solution.residual == pytest.approx(residual(matrix, solution.z, rhs))
    zero = cg(product_with(0 * matrix), rhs, steps=5)  # singular: curvature is zero, not negative
    assert torch.equal(flat(zero.z), flat(rhs)) and "identity" in zero.note


def test_cg_keeps_what_it_has_when_negative_curvature_turns_up_later(rhs: Tree) -> None:
    eigenvalues = torch.linspace(1, 3, SIZE, dtype=torch.float64)
    eigenvalues[0] = -0.3
    matrix = matrix_with(eigenvalues)
    assert float(flat(rhs) @ matrix @ flat(rhs)) > 0
    stopped = cg(product_with(matrix), rhs, steps=100)
    kept = int(stopped.note.removeprefix("negative curvature after ").removesuffix(" steps"))
    assert 1 <= kept < 100 and stopped.products == kept + 1
    before = cg(product_with(matrix), rhs, steps=kept)
    assert torch.equal(flat(stopped.z), flat(before.z)) and before.note == ""
    assert stopped.residual == pytest.approx(residual(matrix, stopped.z, rhs), rel=1e-9)
    damped = cg(product_with(matrix), rhs, steps=100, damping=0.5)
    assert damped.note == "" and residual(matrix, damped.z, rhs, 0.5) < 1e-9


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("steps", [1, 4])
def test_truncated_neumann_is_the_explicit_sum(positive: Tensor, rhs: Tree, steps: int, damping: float) -> None:
    eta, b = 0.07, flat(rhs)
    contraction = (1 - eta * damping) * torch.eye(SIZE, dtype=torch.float64) - eta * positive
    expected = eta * sum(torch.linalg.matrix_power(contraction, k) @ b for k in range(steps + 1))
    solution = neumann(product_with(positive), rhs, steps=steps, step_size=eta, damping=damping)
    torch.testing.assert_close(flat(solution.z), expected, rtol=1e-12, atol=1e-12)
    assert solution.products == steps


def test_the_norm_grows_towards_the_greatest_eigenvalue(rhs: Tree) -> None:
    matrix = matrix_with(torch.linspace(-6, 5, SIZE, dtype=torch.float64))  # the greatest in size is negative
    b = flat(rhs)
    found = [spectral_norm(product_with(matrix), rhs, steps=k) for k in (1, 2, 5, 20, 500)]
    assert found[2] == pytest.approx(float((torch.linalg.matrix_power(matrix, 5) @ b).norm()
                                           / (torch.linalg.matrix_power(matrix, 4) @ b).norm()))  # fmt: skip
    assert found == sorted(found) and found[-1] == pytest.approx(6, rel=1e-9)
    assert spectral_norm(lambda v: tree(0 * flat(v)), rhs) == 0


def test_neumann_converges_to_the_solve(rhs: Tree) -> None:
    matrix = matrix_with(torch.linspace(0.5, 2, SIZE, dtype=torch.float64))
    solution = neumann(product_with(matrix), rhs, steps=150, step_size=0.8)
    expected = torch.linalg.solve(matrix, flat(rhs))
    assert float((flat(solution.z) - expected).norm() / expected.norm()) <= 1e-10


def test_adam_and_identity(rhs: Tree) -> None:
    second = {k: v.square() + 0.1 for k, v in rhs.items()}
    solution = adam(rhs, second, eps=1e-3)
    for k, v in rhs.items():
        torch.testing.assert_close(solution.z[k], v / (torch.sqrt(v**2 + 0.1) + 1e-3), rtol=1e-14, atol=0)
    assert solution.products == identity(rhs).products == 0
    assert torch.equal(flat(identity(rhs).z), flat(rhs))


@pytest.mark.parametrize("steps", [1, 5, 400])
def test_the_second_moment_after_a_step_is_that_of_adamw_and_bounds_the_direction(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    parameter = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    often = torch.tensor([1.0, 1.0, 1.0, 1e-3, 0.0, 0.0], dtype=torch.float64)  # the last two: tokens not seen yet
    for _ in range(steps):
        parameter.grad = often * torch.randn(6, generator=generator, dtype=torch.float64)
        optimizer.step()
    b = torch.randn(6, generator=generator, dtype=torch.float64)
    v = optimizer.state[parameter]["exp_avg_sq"].clone()
    after = next_second_moment({"p": v}, steps, {"p": b}, 0.999)
    parameter.grad = b.clone()
    optimizer.step()
    torch.testing.assert_close(after["p"], optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999 ** (steps + 1)))
    z = adam({"p": b}, after).z["p"].abs()
    bound = math.sqrt((1 - 0.999 ** (steps + 1)) / (1 - 0.999))
    assert z.max() <= bound * (1 + 1e-9)
    torch.testing.assert_close(z[-2:], torch.full_like(z[-2:], bound), rtol=1e-5, atol=0)  # by v alone: b / eps


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_sgd_is_the_published_loop(positive: Tensor, rhs: Tree, clip: float | None, damping: float) -> None:
    z = {k: torch.full(shape, 1 / SIZE, dtype=torch.float64) for k, shape in SHAPES.items()}
    for _ in range(4):
        gradient = tree(positive @ flat(z) + damping * flat(z) - flat(rhs))
        for k in z:
            size = math.sqrt(float((gradient[k] ** 2).sum()))
            if clip is not None and size > clip:
                gradient[k] = gradient[k] * (clip / size)
            z[k] = z[k] - 0.03 * gradient[k]
    solution = sgd(product_with(positive), rhs, steps=4, step_size=0.03, clip=clip, damping=damping)
    torch.testing.assert_close(flat(solution.z), flat(z), rtol=1e-12, atol=1e-14)
    assert solution.products == 4


def test_sgd_clips_by_default_starts_where_told_and_converges(positive: Tensor, rhs: Tree) -> None:
    big = {k: 1e3 * v for k, v in rhs.items()}
    step = flat(sgd(product_with(positive), big, steps=1, step_size=1.0).z) - 1 / SIZE
    for part in tree(step).values():
        assert float(part.norm()) == pytest.approx(1.0, rel=1e-12)
    start = tree(torch.linalg.solve(positive, flat(rhs)))
    stay = sgd(product_with(positive), rhs, steps=3, step_size=0.1, start=start)
    torch.testing.assert_close(flat(stay.z), flat(start), rtol=1e-10, atol=1e-10)
    matrix = positive + torch.eye(SIZE, dtype=torch.float64)
    far = sgd(product_with(matrix), rhs, steps=400, step_size=0.15, clip=None)
    assert residual(matrix, far.z, rhs) < 1e-8


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_reported_residual(positive: Tensor, rhs: Tree, damping: float) -> None:
    z = tree(torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    assert relative_residual(product_with(positive), rhs, z, damping) == pytest.approx(
        residual(positive, z, rhs, damping), rel=1e-12
    )


def test_zero_right_hand_side(positive: Tensor) -> None:
    zero = tree(torch.zeros(SIZE, dtype=torch.float64))
    solution = cg(product_with(positive), zero, steps=5)
    assert not flat(solution.z).any() and solution.products == 0 and solution.residual == 0
    assert not flat(neumann(product_with(positive), zero, steps=3, step_size=0.1).z).any()
    assert not flat(adam(zero, zero).z).any() and flat(adam(zero, zero).z).isfinite().all()
    assert relative_residual(product_with(positive), zero, zero) == 0
    clipped = sgd(lambda v: {k: 0 * x for k, x in v.items()}, zero, steps=2)  # a zero gradient is not divided by zero
    torch.testing.assert_close(flat(clipped.z), torch.full((SIZE,), 1 / SIZE, dtype=torch.float64))
