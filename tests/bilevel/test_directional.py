"""Directional derivatives and Hessian products on tiny language models of three families, in float64.

The references run one document at a time, unpadded, through the whole Hugging Face model.
"""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bilect.bilevel.ghost import directional_ghost
from bilect.bilevel.objective import directional, document_losses, lower_objective, target_on_batch, upper_objective
from bilect.errors import BilectError
from bilect.functional.directional import central_step, directional_finite_difference, hvp_finite_difference
from bilect.functional.trees import Tree, norm
from bilect.models.causal_lm import CausalLM
from tests.helpers import (
    KINDS,
    batch_of,
    dense_hessian,
    document_loss,
    documents,
    flatten,
    gradient_of,
    random_like,
    reference_losses,
    reference_lower,
    reference_upper,
    relative,
    tiny_lm,
    unflatten,
)

LENGTHS, GIVEN = (13, 5, 17, 2, 9, 8), (1, 3, 8, 1, 8, 0)  # padding, prompts, one predicted token

TOLERANCE = {"jvp": 1e-8, "ghost": 1e-8, "finite_difference": 1e-4}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_lm(request.param)


def loop(model: PreTrainedModel, z: Tree, docs: list[tuple[Tensor, int]]) -> Tensor:
    """One backward per document, its whole gradient contracted with z."""
    params = dict(model.named_parameters())
    values = []
    for ids, given in docs:
        gradient = torch.autograd.grad(
            document_loss(model, params, ids, given), list(params.values()), allow_unused=True
        )
        values.append(
            sum((g * z[k]).sum() for k, g in zip(params, gradient, strict=True) if g is not None)
            + torch.zeros((), dtype=torch.float64)
        )
    return torch.stack(values)


@pytest.mark.parametrize("method", TOLERANCE)
def test_against_one_backward_per_document(model: PreTrainedModel, method: str) -> None:
    docs = documents(LENGTHS, GIVEN)
    z = random_like(dict(model.named_parameters()))
    lm = CausalLM(model)
    actual = directional(lm, batch_of(docs), lm.params(), z, method)
    expected = loop(model, z, docs)
    assert actual.shape == (len(docs),) and not actual.requires_grad
    assert relative(actual, expected) <= TOLERANCE[method]
    assert ((actual - expected).abs() <= TOLERANCE[method] * expected.abs().max()).all()


@pytest.mark.parametrize("part", ["trunk", "head", "embedding", "vectors"])
@pytest.mark.parametrize("method", ["jvp", "ghost"])
def test_every_group_of_parameters_counts(model: PreTrainedModel, method: str, part: str) -> None:
    lm = CausalLM(model)
    head, embedding = lm.head_names, next(iter(lm.params()))
    chosen = {
        "trunk": lambda k, p: k not in (*head, embedding),
        "head": lambda k, p: k in head,
        "embedding": lambda k, p: k == embedding,
        "vectors": lambda k, p: p.ndim == 1,
    }[part]
    z = {k: v * chosen(k, v) for k, v in random_like(lm.params()).items()}
    docs = documents(LENGTHS, GIVEN)
    assert relative(directional(lm, batch_of(docs), lm.params(), z, method), loop(model, z, docs)) <= 1e-8


@pytest.mark.parametrize("method", TOLERANCE)
def test_a_document_without_predicted_tokens_and_a_zero_direction(method: str) -> None:
    model = tiny_lm()
    lm = CausalLM(model)
    docs = documents((6, 7), (6, 2))
    d = directional(lm, batch_of(docs), lm.params(), random_like(lm.params()), method)
    assert d[0] == 0 and d[1] != 0
    zero = {k: torch.zeros_like(p) for k, p in lm.params().items()}
    assert directional(lm, batch_of(docs), lm.params(), zero, method).tolist() == [0, 0]


@pytest.mark.parametrize("method", TOLERANCE)
def test_the_model_is_left_as_it_was(method: str) -> None:
    model = tiny_lm()
    lm = CausalLM(model)
    frozen = next(iter(lm.params()))
    lm.params()[frozen].requires_grad_(False)
    before = {k: p.detach().clone() for k, p in lm.params().items()}
    directional(lm, batch_of(documents((6, 7))), lm.params(), random_like(lm.params()), method)
    for k, p in lm.params().items():
        assert torch.equal(p, before[k]) and p.grad is None and p.requires_grad == (k != frozen)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("method", TOLERANCE)
def test_padding_and_company_do_not_matter(method: str) -> None:
    model = tiny_lm("llama")
    lm = CausalLM(model)
    docs = documents(LENGTHS, GIVEN)
    z = random_like(lm.params())
    together = directional(lm, batch_of(docs), lm.params(), z, method)
    alone = torch.cat([directional(lm, batch_of([d], multiple=16), lm.params(), z, method) for d in docs])
    assert relative(alone, together) <= (1e-6 if method == "finite_difference" else 1e-10)


def test_methods_agree_in_float32() -> None:
    model = tiny_lm("llama", dtype=torch.float32)
    lm = CausalLM(model)
    docs = documents(LENGTHS, GIVEN)
    z = random_like(lm.params())
    exact = directional(lm, batch_of(docs), lm.params(), z, "jvp")
    assert relative(directional(lm, batch_of(docs), lm.params(), z, "ghost"), exact) < 1e-5
    assert relative(directional(lm, batch_of(docs), lm.params(), z, "finite_difference"), exact) < 2e-2


def test_ghost_refuses_what_it_cannot_do() -> None:
    model = tiny_lm()
    lm = CausalLM(model)
    block = lm.trunk.layers[0].mlp.dense_h_to_4h
    forward = block.forward
    block.forward = lambda x: forward(x).flatten(0, 1).view(*x.shape[:-1], -1).transpose(0, 1)
    with pytest.raises(BilectError, match="use jvp"):
        directional_ghost(lm, batch_of(documents((6, 7))), random_like(lm.params()))
    assert all(p.requires_grad for p in lm.params().values())


def test_central_step() -> None:
    params = {"a": torch.full((4,), 3.0, dtype=torch.float64)}  # norm 6
    z = {"a": torch.full((4,), 0.5, dtype=torch.float64)}  # norm 1
    assert central_step(params, z) == pytest.approx(6e-6)
    assert central_step({"a": params["a"] * 0.01}, z) == pytest.approx(1e-6)
    assert central_step({"a": params["a"].float()}, {"a": z["a"].float()}) == pytest.approx(6e-4)
    assert central_step(params, z, relative=1e-3) == pytest.approx(6e-3)
    assert central_step(params, {"a": 0 * z["a"]}) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_direction_shows(bad: float) -> None:
    """It must not pass for a direction of length zero, whose derivatives are zero."""
    params = {"a": torch.ones(3, dtype=torch.float64)}
    z = {"a": torch.tensor([bad, 0.0, 1.0], dtype=torch.float64)}
    assert not directional_finite_difference(lambda p: p["a"] ** 2, params, z).isfinite().any()
    assert not hvp_finite_difference(lambda p: p, params)(z)["a"].isfinite().any()


def test_finite_difference_is_of_second_order() -> None:
    params, z = (
        {"a": torch.tensor([0.3, 2.0], dtype=torch.float64)},
        {"a": torch.tensor([1.0, -2.0], dtype=torch.float64)},
    )

    def losses(p: Tree) -> Tensor:
        return torch.stack([p["a"].sin().sum(), (p["a"] ** 3).prod()])

    exact = torch.func.jvp(losses, (params,), (z,))[1]
    errors = [float((directional_finite_difference(losses, params, z, r) - exact).norm()) for r in (1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


# --------------------------------------------------------------------------------------------------- document losses


def test_document_losses(model: PreTrainedModel) -> None:
    docs = documents((*LENGTHS, 4), (*GIVEN, 4))
    lm = CausalLM(model)
    actual = document_losses(lm, batch_of(docs))(lm.params())
    torch.testing.assert_close(actual, reference_losses(model, lm.params(), docs), rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------- Hessian products


@pytest.fixture(scope="module", params=KINDS)
def small(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_lm(request.param, vocab=16, width=4, heads=1, layers=1, context=16)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_hessian_products(small: PreTrainedModel, kl_coef: float) -> None:
    docs = documents((7, 4, 9), (1, 2, 4), vocab=16)
    target = tiny_lm("gpt_neox", vocab=16, width=12, layers=1, context=16, seed=9)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    lm, batch = CausalLM(small), batch_of(docs)
    outlook = target_on_batch(CausalLM(target), batch) if kl_coef else None
    lower = lower_objective(lm, batch, weights, target=outlook, kl_coef=kl_coef, l2_coef=0.05)
    params = {k: p.detach() for k, p in lm.params().items()}
    hessian = dense_hessian(
        lambda p: reference_lower(
            small, p, docs, weights, target=target if kl_coef else None, kl_coef=kl_coef, l2_coef=0.05
        ),
        params,
    )
    assert 200 < hessian.shape[0] < 1000
    for seed in (1, 2):
        v = random_like(params, seed)
        expected = hessian @ flatten(v)
        assert relative(flatten(lower.hvp(lm.params(), "exact")(v)), expected) <= 1e-9
        assert relative(flatten(lower.hvp(lm.params(), "finite_difference")(v)), expected) <= 1e-4
    zero = {k: torch.zeros_like(p) for k, p in params.items()}
    assert not flatten(lower.hvp(params, "finite_difference")(zero)).any()


def test_finite_difference_hessian_of_a_quadratic() -> None:
    a = torch.randn(5, 5, dtype=torch.float64)
    a = a + a.T
    params, v = {"x": torch.randn(5, dtype=torch.float64)}, {"x": 1e6 * torch.randn(5, dtype=torch.float64)}
    product = hvp_finite_difference(lambda p: {"x": a @ p["x"]}, params)(v)
    torch.testing.assert_close(product["x"], a @ v["x"], rtol=1e-6, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("reverse", [False, True])
def test_lower_gradient(model: PreTrainedModel, reverse: bool) -> None:
    docs = documents(LENGTHS, GIVEN)
    weights = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.05, 0.2], dtype=torch.float64)
    target = tiny_lm("gpt_neox", width=24, seed=9)
    lm, batch = CausalLM(model), batch_of(docs)
    lower = lower_objective(
        lm, batch, weights, target=target_on_batch(CausalLM(target), batch), kl_coef=0.4, l2_coef=0.01,
        direction="proxy_to_target" if reverse else "target_to_proxy",
    )  # fmt: skip
    actual, ce, kl, _ = lower.gradient(lm.params())

    def whole(p: Tree) -> Tensor:
        return reference_lower(model, p, docs, weights, target=target, kl_coef=0.4, l2_coef=0.01, reverse=reverse)

    assert relative(flatten(actual), flatten(gradient_of(whole, lm.params()))) <= 1e-10
    with torch.no_grad():
        assert ce == pytest.approx(float((weights * reference_losses(model, lm.params(), docs)).sum()), rel=1e-10)
        plain = reference_lower(model, lm.params(), docs, weights)
        assert kl == pytest.approx(float(whole(lm.params()) - plain - 0.01 * norm(lm.params()) ** 2), rel=1e-9)


def test_upper_gradient_is_of_the_mean_over_tokens(model: PreTrainedModel) -> None:
    docs = documents(LENGTHS, GIVEN)
    lm = CausalLM(model)
    actual, loss, *_ = upper_objective(lm, batch_of(docs)).gradient(lm.params())
    expected = gradient_of(lambda p: reference_upper(model, p, docs), lm.params())
    assert relative(flatten(actual), flatten(expected)) <= 1e-10
    with torch.no_grad():
        assert loss == pytest.approx(float(reference_upper(model, lm.params(), docs)), rel=1e-10)


def test_gradient_at_given_parameters_not_the_models_own(model: PreTrainedModel) -> None:
    docs = documents((5, 6))
    lm = CausalLM(model)
    moved = {
        k: p.detach() + 0.1 * r
        for (k, p), r in zip(lm.params().items(), random_like(lm.params()).values(), strict=True)
    }
    actual, *_ = upper_objective(lm, batch_of(docs)).gradient(moved)
    expected = gradient_of(lambda p: reference_upper(model, p, docs), moved)
    assert relative(flatten(actual), flatten(expected)) <= 1e-10
    assert unflatten(flatten(actual), moved).keys() == moved.keys()
