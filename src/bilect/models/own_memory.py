"""Weights in memory of their own, so that equal weights give equal numbers.

transformers leaves the weights of a safetensors file where they lie in the file's memory map: at whatever address the
length of the header makes, often no multiple of 16. There, products of a matrix and a vector sum in another order than
in memory that torch has allocated, which begins at multiples of 64: scores then differ in their last bits between a
model and its saved copy. See "Numbers that must be equal" in docs/design.md.
"""

from itertools import chain
from typing import TypeVar

import torch
from torch import nn

__all__ = ["own_memory"]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def own_memory(model: M) -> M:
    """Copy every parameter and buffer into memory allocated by torch, one at a time; tied ones stay tied.

    Also, the model no longer depends on its file, which may be replaced or vanish while it is mapped.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model
