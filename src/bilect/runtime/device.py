"""The device of a run and its mixed precision."""

from contextlib import AbstractContextManager

import torch

from bilect.errors import BilectError

__all__ = ["autocast", "pick_device"]


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU of this rank if there is one.

    Raises:
        BilectError: the device asked for is not there.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BilectError(f"device: {name} was asked for but PyTorch sees no GPU; use device=cpu or auto")
    return torch.device(name)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """bfloat16 matrix products where they are safe: forward passes, inner steps, scoring.

    Solves, directional derivatives by differences and weights stay in float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
