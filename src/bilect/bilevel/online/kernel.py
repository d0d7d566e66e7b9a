"""Token losses by cut cross-entropy (Wijmans et al., arXiv 2411.09009) on a GPU, where ``bilect[gpu]`` is installed.

It never writes logits to memory at all. Before its first use it is compared with our own loss on the batch at hand, in
value and gradient; where it differs, or fails, ours is used.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bilect.functional.losses import Head, token_losses

__all__ = ["Kernel", "agreeing_kernel", "applies"]

Kernel = Callable[[Tensor, Head, Tensor], Tensor]
CHECKED_TOKENS = 256
TOLERANCE = 2e-2  # relative, in half precision


def applies(hidden_ND: Tensor, head: Head) -> bool:
    """Whether the kernel is made for such input: half precision on a GPU, a head without bias."""
    half = hidden_ND.dtype in (torch.bfloat16, torch.float16)
    return hidden_ND.device.type == "cuda" and half and head.bias_V is None and len(hidden_ND) > 0


def agreeing_kernel(hidden_ND: Tensor, head: Head, labels_N: Tensor) -> Kernel | None:
    """Losses (N,) of hidden states (N, D) and labels (N,), differentiable; None if not installed or not in agreement.

    Args:
        hidden_ND: to compare on.
        head: of the model.
        labels_N: of these hidden states.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None

    def kernel(hidden_ND: Tensor, head: Head, labels_N: Tensor) -> Tensor:
        weight_VD = head.weight_VD.to(hidden_ND.dtype)
        scaled_ND = hidden_ND * head.scale if head.scale != 1.0 else hidden_ND
        loss_N: Tensor = linear_cross_entropy(
            scaled_ND, weight_VD, labels_N, softcap=head.softcap, reduction="none", filter_eps=None
        )
        return loss_N.float()

    def ours(hidden_ND: Tensor, head: Head, labels_N: Tensor) -> Tensor:
        return token_losses(hidden_ND, head, labels_N).ce_N.float()

    part = hidden_ND[:CHECKED_TOKENS].detach(), labels_N[:CHECKED_TOKENS]
    try:
        pairs = list(zip(_probe(kernel, head, *part), _probe(ours, head, *part), strict=True))
        fault = None if all(_close(a, b) for a, b in pairs) else "differs from bilect's own loss"
    except Exception as error:  # a compiler of kernels raises anything
        fault = f"fails ({type(error).__name__})"
    if fault is None:
        return kernel
    warnings.warn(f"cut-cross-entropy {fault} on this device: bilect's own loss is used", stacklevel=2)
    return None


def _probe(losses: Kernel, head: Head, hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their mean with unequal weights."""
    with torch.enable_grad():
        hidden_ND = hidden_ND.clone().requires_grad_()
        weight_VD = head.weight_VD.detach().clone().requires_grad_()
        loss_N = losses(hidden_ND, Head(weight_VD, None, head.scale, head.softcap), labels_N)
        weight_N = torch.linspace(0.5, 1.5, len(loss_N), device=loss_N.device) / len(loss_N)
        to_hidden, to_weight = torch.autograd.grad(torch.dot(weight_N, loss_N), [hidden_ND, weight_VD])
    return loss_N.detach(), to_hidden, to_weight


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a.float() - b.float()).norm()) <= TOLERANCE * float(b.float().norm())
