import pytest
import torch

from bilect.functional import losses
from bilect.functional.losses import Head, HeldDistribution, weighted_token_loss


@pytest.mark.parametrize("direction", ["target_to_proxy", "proxy_to_target"])
@pytest.mark.parametrize("chunk", [31 * 6, 1 << 20])  # two chunks, one
def test_held_distribution_changes_nothing(
    direction: losses.KLDirection, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden_ND, weight_VD = draw(200, 6).requires_grad_(), draw(31, 6).requires_grad_()
    target_hidden_NE, target_head = draw(200, 9), Head(draw(31, 9), draw(31))
    labels_N = torch.randint(31, (200,), generator=generator)
    a_N, b_N = draw(200).abs(), draw(200).abs()
    found = []
    for held in (None, HeldDistribution.of(target_hidden_NE, target_head, torch.float64)):
        loss, tokens = weighted_token_loss(
            hidden_ND,
            Head(weight_VD),
            labels_N,
            a_N,
            kl_weight_N=b_N,
            target_hidden_NE=target_hidden_NE,
            target_head=target_head,
            held=held,
            direction=direction,
        )
        assert tokens.kl_N is not None
        found.append([loss, tokens.ce_N, tokens.kl_N, *torch.autograd.grad(loss, [hidden_ND, weight_VD])])
    for without, with_held in zip(*found, strict=True):
        torch.testing.assert_close(with_held, without, rtol=1e-10, atol=1e-12)
