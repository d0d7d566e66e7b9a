"""Weights, selections and their statistics against closed forms and sorting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilect.functional.weights import (
    document_weights,
    effective_sample_size,
    gumbel_topk,
    standardise,
    topk_mask,
    weight_entropy,
)

F64 = torch.float64
finite = st.floats(-1e6, 1e6)
few_values = st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 2.0, math.inf, -math.inf])


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(-100, 100))
def test_softmax_weights(scores: list[float], shift: float) -> None:
    weights = document_weights(torch.tensor(scores, dtype=F64))
    top = max(scores)
    total = math.fsum(math.exp(s - top) for s in scores)
    expected = [math.exp(s - top) / total for s in scores]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    shifted = document_weights(torch.tensor(scores, dtype=F64) + shift)
    torch.testing.assert_close(shifted, weights, rtol=1e-9, atol=1e-15)


def test_softmax_of_large_scores_is_finite() -> None:
    assert document_weights(torch.tensor([1e4, 1e4, -1e4])).tolist() == [0.5, 0.5, 0.0]


def test_naive_weights() -> None:
    assert document_weights(torch.tensor([1.0, 3.0, 4.0]), "naive").tolist() == [0.125, 0.375, 0.5]


@given(st.lists(few_values, min_size=0, max_size=30), st.data())
def test_topk_is_the_head_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    mask = topk_mask(torch.tensor(values, dtype=F64), k)
    assert mask.dtype == torch.bool
    assert mask.nonzero()[:, 0].tolist() == sorted(expected)


def test_topk_of_many_ties_takes_the_first() -> None:
    values = torch.arange(50_000) % 3
    expected = [i for i in range(50_000) if i % 3 == 2][:1234]
    assert topk_mask(values.float(), 1234).nonzero()[:, 0].tolist() == expected


def test_topk_keeps_infinities_apart_from_the_largest_finite_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    assert topk_mask(torch.tensor([largest, math.inf, -largest]), 1).tolist() == [False, True, False]
    assert topk_mask(torch.tensor([-math.inf, -largest]), 1).tolist() == [False, True]


def test_topk_takes_nan_last() -> None:
    assert topk_mask(torch.tensor([math.nan, -5.0, math.nan, 1.0]), 2).tolist() == [False, True, False, True]


@pytest.mark.parametrize("k", [-1, 4])
def test_topk_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 3\], got {k}"):
        topk_mask(torch.zeros(3), k)


@given(st.lists(few_values.filter(math.isfinite), min_size=1, max_size=15), st.data())
def test_gumbel_without_temperature_is_topk(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values, dtype=F64)
    assert torch.equal(gumbel_topk(tensor, k, 0.0, torch.Generator().manual_seed(1)), topk_mask(tensor, k))


def test_gumbel_is_a_function_of_the_seed() -> None:
    values = torch.randn(40)

    def draw(seed: int) -> torch.Tensor:
        return gumbel_topk(values, 10, 1.0, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert all(int(draw(seed).sum()) == 10 for seed in range(20))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gumbel_first_choice_follows_the_softmax(temperature: float) -> None:
    values = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    draws = 8000
    counts = torch.zeros(4)
    for _ in range(draws):
        counts += gumbel_topk(values, 1, temperature, generator)
    expected = torch.softmax(values / temperature, 0)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4 * deviation).all()


def test_gumbel_pairs_are_drawn_without_replacement() -> None:
    # P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)
    p = torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)
    draws = 8000
    left_out = torch.zeros(3)
    for _ in range(draws):
        left_out += ~gumbel_topk(p.log(), 2, 1.0, generator)
    expected = torch.tensor(
        [0.3 * 0.2 / 0.7 + 0.2 * 0.3 / 0.8, 0.5 * 0.2 / 0.5 + 0.2 * 0.5 / 0.8, 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7]
    )
    assert ((left_out / draws - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()


def test_gumbel_refuses_a_negative_temperature() -> None:
    with pytest.raises(ValueError, match=r"-0\.1"):
        gumbel_topk(torch.zeros(2), 1, -0.1, torch.Generator())


def test_entropy_and_effective_sample_size() -> None:
    uniform = torch.full((8,), 0.125, dtype=F64)
    assert float(weight_entropy(uniform)) == pytest.approx(math.log(8), rel=1e-14)
    assert float(effective_sample_size(uniform)) == pytest.approx(8, rel=1e-14)
    one = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    assert float(weight_entropy(one)) == 0
    assert float(effective_sample_size(one)) == 1
    some = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    assert float(weight_entropy(some)) == pytest.approx(1.5 * math.log(2), rel=1e-14)
    assert float(effective_sample_size(some)) == pytest.approx(1 / 0.375, rel=1e-14)
    assert float(effective_sample_size(10 * some)) == pytest.approx(1 / 0.375, rel=1e-14)


@given(st.lists(finite, min_size=2, max_size=50))
def test_standardised_values_have_mean_0_and_deviation_1(values: list[float]) -> None:
    x = torch.tensor(values, dtype=F64)
    spread = float(x.std(correction=0))
    result = standardise(x)
    if spread > 1e-9 * max(1.0, float(x.abs().max())):
        assert float(result.mean()) == pytest.approx(0, abs=1e-6)
        assert float(result.std(correction=0)) == pytest.approx(1, abs=1e-6)
        assert (result[x.argsort()].diff() >= 0).all()
    assert result.isfinite().all()


@given(st.sampled_from([torch.float32, F64]), st.floats(-1e6, 1e6, width=32), st.integers(1, 300))
def test_standardised_constants_are_zero(dtype: torch.dtype, value: float, size: int) -> None:
    assert not standardise(torch.full((size,), value, dtype=dtype)).any()


def test_standardise_lets_a_diverged_value_show():
    assert standardise(torch.tensor([1.0, float("nan"), 2.0])).isnan().all()
    assert not standardise(torch.tensor([1.0, float("inf"), 2.0])).isfinite().all()
