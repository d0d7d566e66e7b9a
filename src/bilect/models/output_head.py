"""What a causal LM does to its last hidden states: read from its config, and checked on the model itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bilect.errors import BilectError
from bilect.functional.losses import Head

__all__ = ["check_output", "scale_and_cap"]


def scale_and_cap(config: PreTrainedConfig) -> tuple[float, float | None]:
    """``scale`` and ``softcap`` of a model's ``Head``."""
    text_config: Any = config.get_text_config()
    scale = float(getattr(text_config, "logit_scale", None) or 1.0)
    scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)
    return scale, getattr(text_config, "final_logit_softcapping", None)


@torch.no_grad()
def check_output(
    base: nn.Module,
    trunk: nn.Module,
    head: nn.Module,
    n_ids: int,
    *,
    form: tuple[float, float | None],
    product: Callable[[Tensor], Tensor] | None,
) -> int:
    """One short ordinary forward pass: hidden states must reach the head, and logits leave it, as ``Head`` has it.

    All is compared within the model's own call: in its precision and, where it is sharded, with its weights gathered.
    The logits are made large, because caps and clamps do not show on small ones.

    Args:
        base: the causal LM, in evaluation mode.
        trunk: what gives the last hidden states.
        head: the output head.
        n_ids: that it knows.
        form: as of ``scale_and_cap``.
        product: what the head gives for its input, ``h W' + b``; None: it is more than one matrix, and taken as it is.

    Returns:
        V, the number of ids that the logits are of.

    Raises:
        BilectError: there are no logits, they do not come from the head, or they are made in another way.
    """
    seen: dict[str, Tensor] = {}
    ids_BT = torch.arange(1, 5, device=next(base.parameters()).device)[None] % n_ids

    def at_trunk(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    def before_head(module: nn.Module, args: Any) -> None:
        seen["head input"] = args[0]
        if product is not None:
            seen["product"] = product(args[0])

    def at_head(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["head output"] = output
        seen.setdefault("product", output)
        seen["raw"] = output * (50 / output.float().std().clamp(min=1e-6))
        return seen["raw"]

    hooks = [
        trunk.register_forward_hook(at_trunk),
        head.register_forward_pre_hook(before_head),
        head.register_forward_hook(at_head),
    ]
    try:
        logits = getattr(base(input_ids=ids_BT, use_cache=False), "logits", None)
    finally:
        for hook in hooks:
            hook.remove()
        torch.clear_autocast_cache()  # of copies of the weights that in torch 2.6 no gradient reaches
    name = type(base).__name__
    if logits is None or len(seen) < 5:
        raise BilectError(f"{name} gives no logits, or not by its output head; bilect cannot tell its token losses")
    ours = Head(seen["hidden"], None, *form).transform(seen["raw"])
    pairs = ((seen["head input"], seen["hidden"]), (seen["head output"], seen["product"]), (ours, logits))
    if not all(_close(a, b) for a, b in pairs):
        raise BilectError(f"{name} transforms its logits in a way bilect does not know; use another model")
    return int(logits.shape[-1])


def _close(a: Tensor, b: Tensor) -> bool:
    if not bool(b.isfinite().all()):
        return True  # a broken checkpoint is not a question of form: its loss will tell
    tolerance = 1e-3 if b.dtype in (torch.float32, torch.float64) else 2e-2
    return float((a.float() - b.float()).abs().max()) <= tolerance * float(b.float().abs().max())
