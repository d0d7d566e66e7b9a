"""Reference and matched twin against AdamW written out by hand."""

import math

import pytest
import torch
from torch import Tensor

from bilect.bilevel.objective import Gradient, Objective, lower_objective, upper_objective
from bilect.bilevel.offline.twins import FirstOrderModel, Twins
from bilect.functional.hypergradient import penalty_values
from bilect.functional.trees import Tree, zeros_like
from bilect.models.causal_lm import CausalLM
from tests.helpers import batch_of, documents, gradient_of, reference_lower, reference_upper, tiny_lm

STEPS, RATE, PENALTY, L2 = 4, 3e-3, 2.5, 0.01
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LOWER = [documents((9, 6, 7), seed=10 + k) for k in range(STEPS)]
UPPER = [documents((5, 8), (1, 4), seed=50 + k) for k in range(STEPS)]


class LiteralAdamW:
    """Loshchilov and Hutter 2019, without decay; gradients clipped to a norm first."""

    def __init__(self, params: Tree, clip: float) -> None:
        self.params = {k: p.detach().clone() for k, p in params.items()}
        self.first, self.second = zeros_like(self.params), zeros_like(self.params)
        self.t, self.clip = 0, clip

    def step(self, gradient: Tree) -> None:
        self.t += 1
        size = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        factor = min(1.0, self.clip / (size + 1e-6))
        for k, g in gradient.items():
            g = g * factor
            self.first[k] = 0.9 * self.first[k] + 0.1 * g
            self.second[k] = 0.999 * self.second[k] + 0.001 * g**2
            first, second = self.first[k] / (1 - 0.9**self.t), self.second[k] / (1 - 0.999**self.t)
            self.params[k] = self.params[k] - RATE * first / (second.sqrt() + 1e-8)


class _Zero(Objective):
    """No upper term."""

    def gradient(self, params: Tree, bf16: bool = False) -> Gradient:
        return Gradient({k: torch.zeros_like(p) for k, p in params.items()}, *torch.zeros(2), torch.zeros(0))


def draws(lm: CausalLM, upper: bool = True):
    """Pairs of objectives on fresh batches, in order."""
    pairs = iter(zip(LOWER, UPPER, strict=True))

    def draw() -> tuple[Objective, Objective]:
        lower_docs, upper_docs = next(pairs)
        lower = lower_objective(lm, batch_of(lower_docs), WEIGHTS, l2_coef=L2)
        other = upper_objective(lm, batch_of(upper_docs))
        return lower, other if upper else _Zero(lm, other.batch, other.ce_weight_N)

    return draw


def train(lm: CausalLM, draw, matched: bool = True, clip: float = 0.8) -> Twins:
    return Twins.train(
        lm.params(), draw, steps=STEPS, learning_rate=RATE, penalty=PENALTY, matched=matched, grad_clip=clip
    )


@pytest.mark.parametrize("clip", [0.8, 1e9])
def test_both_are_literal_adamw(clip: float) -> None:
    model = tiny_lm(layers=1)
    lm = CausalLM(model)
    before = {k: p.detach().clone() for k, p in lm.params().items()}
    w, m = LiteralAdamW(before, clip), LiteralAdamW(before, clip)
    for lower_docs, upper_docs in zip(LOWER, UPPER, strict=True):

        def lower(p: Tree, docs=lower_docs) -> Tensor:
            return PENALTY * reference_lower(model, p, docs, WEIGHTS, l2_coef=L2)

        m.step(gradient_of(lower, m.params))
        last = reference_upper(model, w.params, upper_docs)
        w.step(gradient_of(lambda p, d=upper_docs, g=lower: reference_upper(model, p, d) + g(p), w.params))
    twins = train(lm, draws(lm), clip=clip)
    assert twins.matched is not None
    for k, p in lm.params().items():
        torch.testing.assert_close(twins.matched[k], m.params[k], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(twins.reference[k], w.params[k], rtol=1e-8, atol=1e-9)
        assert torch.equal(p, before[k]) and p.grad is None  # u itself does not move
        assert not twins.reference[k].requires_grad and not twins.matched[k].requires_grad
    assert twins.upper_loss == pytest.approx(float(last.detach()), rel=1e-7)


def test_without_upper_term_the_reference_is_the_twin_and_d_is_exactly_zero() -> None:
    model = tiny_lm("llama", layers=1, dtype=torch.float32)
    lm = CausalLM(model)
    twins = train(lm, draws(lm, upper=False))
    assert twins.matched is not None
    for k, p in lm.params().items():
        assert torch.equal(twins.reference[k], twins.matched[k])
        assert not torch.equal(twins.reference[k], p)
    from bilect.bilevel.objective import document_losses

    losses = document_losses(lm, batch_of(LOWER[0]))
    with torch.no_grad():
        d = penalty_values(losses(twins.matched), losses(twins.reference), PENALTY)
    assert d.tolist() == [0.0, 0.0, 0.0]


def test_plain_form_trains_no_twin() -> None:
    lm = CausalLM(tiny_lm(layers=1))
    both, alone = train(lm, draws(lm)), train(lm, draws(lm), matched=False)
    assert alone.matched is None
    for k in lm.params():
        assert torch.equal(alone.reference[k], both.reference[k])


def test_first_order_model_owns_its_parameters() -> None:
    params = {"a": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    model = FirstOrderModel(params, 0.1, 1.0)
    model.step({"a": torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)})
    torch.testing.assert_close(model.params["a"].detach(), torch.tensor([0.9, 1.1, 1.0], dtype=torch.float64))
    assert params["a"].tolist() == [1, 1, 1] and model.params["a"].grad is None
