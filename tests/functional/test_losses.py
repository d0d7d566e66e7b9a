"""Token losses and their hand-written gradients against plain log-softmax and autograd, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from bilect.functional import losses
from bilect.functional.losses import Head, HeldDistribution, document_mean, token_losses, weighted_token_loss

N, D, E, V = 7, 5, 6, 11
DIRECTIONS = ("target_to_proxy", "proxy_to_target")


@dataclass
class Problem:
    hidden: Tensor
    head: Head
    labels: Tensor
    a: Tensor
    b: Tensor
    target_hidden: Tensor
    target_head: Head

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight_VD, self.head.bias_V) if x is not None]


def problem(bias: bool = False, scale: float = 1.0, softcap: float | None = None, n: int = N) -> Problem:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Problem(
        draw(n, D).requires_grad_(),
        Head(draw(V, D).requires_grad_(), draw(V).requires_grad_() if bias else None, scale, softcap),
        torch.randint(V, (n,), generator=g),
        torch.rand(n, generator=g, dtype=torch.float64),
        torch.rand(n, generator=g, dtype=torch.float64),
        draw(n, E),
        Head(draw(V, E), draw(V), 0.7, 3.0),
    )


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight_VD.T
    z = z if head.bias_V is None else z + head.bias_V
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def plain_losses(p: Problem, direction: str) -> tuple[Tensor, Tensor]:
    logp = plain_logits(p.hidden, p.head).log_softmax(-1)
    logq = plain_logits(p.target_hidden, p.target_head).log_softmax(-1).detach()
    ce = -logp[torch.arange(len(p.labels)), p.labels]
    if direction == "target_to_proxy":
        return ce, (logq.exp() * (logq - logp)).sum(-1)
    return ce, (logp.exp() * (logp - logq)).sum(-1)


HEADS = pytest.mark.parametrize(
    ("bias", "scale", "softcap"),
    [(False, 1.0, None), (True, 1.0, None), (False, 0.3, None), (False, 1.0, 2.0), (True, 0.3, 2.0)],
    ids=["plain", "bias", "scale", "softcap", "all"],
)
CHUNKS = pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 100])


@HEADS
@CHUNKS
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_and_gradients(
    bias: bool, scale: float, softcap: float | None, rows: int, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_chunk_rows", lambda weight_VD: rows)
    p = problem(bias, scale, softcap)
    ce, kl = plain_losses(p, direction)
    expected = (p.a * ce + p.b * kl).sum()
    gradients = torch.autograd.grad(3 * expected, p.leaves)

    target = {"target_hidden_NE": p.target_hidden, "target_head": p.target_head, "direction": direction}
    fused, constants = weighted_token_loss(p.hidden, p.head, p.labels, p.a, kl_weight_N=p.b, **target)
    held = HeldDistribution.of(p.target_hidden, p.target_head, torch.float64)
    again, _ = weighted_token_loss(p.hidden, p.head, p.labels, p.a, kl_weight_N=p.b, held=held, **target)
    several = token_losses(p.hidden, p.head, p.labels, **target)
    for tokens in (constants, several):
        torch.testing.assert_close(tokens.ce_N, ce, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(tokens.kl_N, kl, rtol=1e-10, atol=1e-10)
    assert not constants.ce_N.requires_grad and not constants.kl_N.requires_grad
    torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)
    for loss in (fused, again, (p.a * several.ce_N + p.b * several.kl_N).sum()):
        for actual, wanted in zip(torch.autograd.grad(3 * loss, p.leaves), gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@HEADS
def test_cross_entropy_alone(bias: bool, scale: float, softcap: float | None) -> None:
    p = problem(bias, scale, softcap)
    expected = (p.a * plain_losses(p, "target_to_proxy")[0]).sum()
    loss, tokens = weighted_token_loss(p.hidden, p.head, p.labels, p.a)
    assert tokens.kl_N is None and token_losses(p.hidden, p.head, p.labels).kl_N is None
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for actual, wanted in zip(
        torch.autograd.grad(loss, p.leaves), torch.autograd.grad(expected, p.leaves), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some_inputs_only(wanted: tuple[bool, bool, bool]) -> None:
    p = problem(bias=True)
    for leaf, on in zip(p.leaves, wanted, strict=True):
        leaf.requires_grad_(on)
    leaf = p.leaves[wanted.index(True)]
    ce, kl = plain_losses(p, "target_to_proxy")
    (expected,) = torch.autograd.grad((p.a * ce + p.b * kl).sum(), leaf)
    loss, _ = weighted_token_loss(
        p.hidden, p.head, p.labels, p.a, kl_weight_N=p.b, target_hidden_NE=p.target_hidden, target_head=p.target_head
    )
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("elements", "n", "chunks"),
    [(140 * V, 300, [140, 140, 20]), (1, 600, [512, 88])],
    ids=["head-in-the-caches", "head-larger"],
)
def test_real_chunking_holds_one_chunk_of_logits(
    elements: int, n: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", {"cpu": elements})
    sizes: list[int] = []
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, h: (sizes.append(len(h)), logits(self, h))[1])
    p = problem(n=n)
    loss, tokens = weighted_token_loss(p.hidden, p.head, p.labels, p.a)
    assert sizes == chunks
    expected = plain_losses(p, "target_to_proxy")[0]
    torch.testing.assert_close(tokens.ce_N, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(loss, p.hidden)[0], torch.autograd.grad((p.a * expected).sum(), p.hidden)[0]
    )


def test_held_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_chunk_rows", lambda weight_VD: 3)
    p = problem()
    q = plain_logits(p.target_hidden, p.target_head).softmax(-1)
    held = HeldDistribution.of(p.target_hidden, p.target_head, torch.float64)
    torch.testing.assert_close(held.probability_NV, q, rtol=1e-12, atol=0)
    torch.testing.assert_close(held.negentropy_N, (q * q.log()).sum(-1), rtol=1e-12, atol=0)
    assert HeldDistribution.of(p.target_hidden, p.target_head).probability_NV.dtype == torch.float32


def test_held_distribution_spares_the_targets_head(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    held = HeldDistribution.of(p.target_hidden, p.target_head, torch.float64)
    used: list[int] = []
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, h: (used.append(h.shape[1]), logits(self, h))[1])
    weighted_token_loss(
        p.hidden, p.head, p.labels, p.a, kl_weight_N=p.b,
        target_hidden_NE=p.target_hidden, target_head=p.target_head, held=held,
    )  # fmt: skip
    assert used == [D]


def test_tied_weights_get_both_parts() -> None:
    p = problem()
    weight = p.head.weight_VD
    inputs = torch.tensor([1, 4, 4, 0, 9, 10, 2])
    mix = torch.randn(D, D, dtype=torch.float64)
    tied = replace(p, hidden=torch.tanh(weight[inputs] @ mix))
    ce, _ = plain_losses(tied, "target_to_proxy")
    (expected,) = torch.autograd.grad((p.a * ce).sum(), weight)
    tied = replace(p, hidden=torch.tanh(weight[inputs] @ mix))
    loss, _ = weighted_token_loss(tied.hidden, tied.head, p.labels, p.a)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_token_losses_to_second_order_and_forward_mode(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_chunk_rows", lambda weight_VD: 2)
    p = problem(bias=True, scale=0.5, softcap=2.0, n=3)

    def scalar(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tokens = token_losses(
            hidden, Head(weight, bias, 0.5, 2.0), p.labels,
            target_hidden_NE=p.target_hidden, target_head=p.target_head, direction=direction,
        )  # fmt: skip
        return (p.a * tokens.ce_N + p.b * tokens.kl_N).sum()

    assert gradcheck(scalar, p.leaves, check_forward_ad=True)
    assert gradgradcheck(scalar, p.leaves)


def test_fused_gradient_is_not_silently_constant_in_a_second_backward() -> None:
    p = problem()
    loss, _ = weighted_token_loss(p.hidden, p.head, p.labels, p.a)
    (gradient,) = torch.autograd.grad(loss.square(), p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_the_target_is_constant() -> None:
    p = problem()
    p.target_hidden.requires_grad_()
    tokens = token_losses(p.hidden, p.head, p.labels, target_hidden_NE=p.target_hidden, target_head=p.target_head)
    assert torch.autograd.grad(tokens.kl_N.sum(), p.target_hidden, allow_unused=True) == (None,)


def test_divergence_from_itself_is_zero_and_otherwise_positive() -> None:
    p = problem()
    for direction in DIRECTIONS:
        same = token_losses(
            p.hidden, p.head, p.labels, target_hidden_NE=p.hidden, target_head=p.head, direction=direction
        )
        other = token_losses(
            p.hidden, p.head, p.labels, target_hidden_NE=p.target_hidden, target_head=p.target_head, direction=direction
        )
        assert same.kl_N.abs().max() < 1e-14
        assert (other.kl_N > 0).all()


@pytest.mark.parametrize("with_target", [False, True])
def test_no_predicted_tokens(with_target: bool) -> None:
    p = problem(bias=True, n=0)
    target = {"target_hidden_NE": p.target_hidden, "target_head": p.target_head} if with_target else {}
    tokens = token_losses(p.hidden, p.head, p.labels, **target)
    assert tokens.ce_N.shape == (0,) and (tokens.kl_N is not None) == with_target
    loss, fused = weighted_token_loss(
        p.hidden, p.head, p.labels, p.a, kl_weight_N=p.b if with_target else None, **target
    )
    assert fused.ce_N.shape == (0,) and loss == 0
    for leaf, gradient in zip(p.leaves, torch.autograd.grad(loss, p.leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_float32_and_autocast_agree_with_float64() -> None:
    p = problem(bias=True)
    expected, _ = weighted_token_loss(p.hidden, p.head, p.labels, p.a)
    wanted = torch.autograd.grad(expected, p.leaves)
    hidden, weight, bias = (x.detach().float().requires_grad_() for x in p.leaves)
    for autocast, tolerance in ((False, 1e-6), (True, 3e-2)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, tokens = weighted_token_loss(hidden, Head(weight, bias), p.labels, p.a)
        assert loss.dtype == tokens.ce_N.dtype == torch.float32
        assert abs(loss.item() - expected.item()) < tolerance * expected.item()
        for actual, right in zip(torch.autograd.grad(loss, [hidden, weight, bias]), wanted, strict=True):
            assert actual.dtype == torch.float32
            assert (actual - right).norm() < tolerance * right.norm()


def test_document_mean() -> None:
    loss = torch.tensor([1.0, 5.0, 2.0, 4.0, 7.0], dtype=torch.float64, requires_grad=True)
    mean = document_mean(loss, torch.tensor([2, 0, 2, 2, 0]), 4)
    assert mean.tolist() == [6.0, 0.0, pytest.approx(7 / 3, abs=1e-15), 0.0]
    (gradient,) = torch.autograd.grad(mean[2], loss)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64) / 3)
    assert document_mean(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2).tolist() == [0.0, 0.0]
