"""Cut cross-entropy in place of our own loss: only where it agrees. It needs a GPU; here it has a stand-in."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from bilect.bilevel.online import token_loss
from bilect.bilevel.online.kernel import agreeing_kernel, applies
from bilect.bilevel.online.token_loss import TokenBatch, TokenForward
from bilect.functional.losses import Head, token_losses
from tests.bilevel.online_helpers import make_batch, small


def install(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0, fails: bool = False) -> list[dict[str, Any]]:
    """A module with the kernel's signature, right or wrong by a factor; returns the calls."""
    calls: list[dict[str, Any]] = []

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        if fails:
            raise RuntimeError("no such device")
        logits = e @ c.T
        if options["softcap"] is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        return factor * torch.nn.functional.cross_entropy(logits, targets, reduction=options["reduction"])

    module = types.ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    return calls


def problem(scale: float = 1.0, softcap: float | None = None) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    return hidden_ND, Head(weight_VD, None, scale, softcap), torch.randint(30, (20,), generator=generator)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_the_kernel_is_called_for_the_losses_of_this_head(monkeypatch, scale, softcap):
    calls = install(monkeypatch)
    hidden_ND, head, labels_N = problem(scale, softcap)
    kernel = agreeing_kernel(hidden_ND, head, labels_N)
    assert kernel is not None
    torch.testing.assert_close(kernel(hidden_ND, head, labels_N), token_losses(hidden_ND, head, labels_N).ce_N)
    assert calls[-1] == {"softcap": softcap, "reduction": "none", "filter_eps": None}  # no gradient left out


def test_a_kernel_that_differs_or_fails_is_not_used(monkeypatch):
    assert agreeing_kernel(*problem()) is None  # not installed here
    install(monkeypatch, factor=1.1)
    with pytest.warns(UserWarning, match="differs from bilect's own loss"):
        assert agreeing_kernel(*problem()) is None
    install(monkeypatch, fails=True)
    with pytest.warns(UserWarning, match="fails \\(RuntimeError\\)"):
        assert agreeing_kernel(*problem()) is None


def test_it_is_for_half_precision_on_a_gpu_without_bias():
    hidden_ND, head, _ = problem()
    assert not applies(hidden_ND, head) and not applies(hidden_ND.bfloat16(), head)
    meta = hidden_ND.bfloat16().to("meta")
    assert not applies(meta, head)


def test_token_losses_and_their_gradient_go_through_it(monkeypatch):
    calls = install(monkeypatch)
    model, tokens = small("llama", dtype=torch.float32), TokenBatch.of(make_batch(0, (9, 5)))
    weight_N = torch.linspace(0, 1, tokens.n)
    results = []
    for on in (False, True):
        monkeypatch.setattr(token_loss, "applies", lambda hidden, head, on=on: on)
        forward = TokenForward(model)
        loss = forward.loss(model, tokens, weight_N)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((forward.losses(model, tokens), loss, *gradients))
        assert len(calls) == (3 if on else 0)  # the comparison with ours; kept tokens; all tokens
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_real_kernel_agrees():
    pytest.importorskip("cut_cross_entropy")
    hidden_ND, labels_N = torch.randn(300, 128, device="cuda").bfloat16(), torch.randint(5000, (300,), device="cuda")
    head = Head(torch.randn(5000, 128, device="cuda") / 12, None)
    assert applies(hidden_ND, head) and agreeing_kernel(hidden_ND, head, labels_N) is not None
