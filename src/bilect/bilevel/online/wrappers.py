"""What people put around a causal LM and its output head, taken off."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from bilect.errors import BilectError

__all__ = ["computing", "is_linear", "unwrap"]


def unwrap(model: Any) -> Any:
    """The causal LM inside ``torch.compile``, PEFT and whatever has a ``module``, in any order; FSDP2 wraps nothing.

    Raises:
        BilectError: the wrapper takes the model's weights or its batches apart.
    """
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise BilectError("DataParallel gives each device a copy of the model, where no tokens can be chosen; "
                              "start one process per device: torchrun --nproc-per-node=N SCRIPT")  # fmt: skip
        if isinstance(model, FullyShardedDataParallel) or any(hasattr(p, "ds_id") for p in _parameters(model)):
            raise BilectError("FSDP1 and ZeRO-3 hide the weights that the reference starts from; use FSDP2 "
                              "(fully_shard), DDP, or ZeRO-1 or 2")  # fmt: skip
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise BilectError("PEFT's prompt learning sets tokens before the batch's own, which bilect cannot "
                                  "place; use LoRA")  # fmt: skip
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            break
    return model


def _parameters(model: Any) -> Iterator[nn.Parameter]:
    return model.parameters() if hasattr(model, "parameters") else iter(())


def computing(head: Any) -> Any:
    """What computes the logits: where PEFT keeps copies (``modules_to_save``), the one in use."""
    if not hasattr(head, "modules_to_save"):
        return head
    active = [name for name in head.active_adapters if name in head.modules_to_save]
    return head.modules_to_save[active[0]] if active and not head.disable_adapters else head.original_module


def is_linear(head: Any) -> bool:
    """Whether it is ``h W' + b`` and nothing else; LoRA on the head, or a quantised head, is not."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    return head.weight.is_floating_point()
