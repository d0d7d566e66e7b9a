"""Arithmetic on parameter trees (``dict[str, Tensor]``).

By ``torch._foreach_*``, as PyTorch's own optimisers: one launch on a GPU instead of one for each tensor.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Tree", "TreeMap", "add_scaled", "dot", "norm", "scale", "sub", "zeros_like"]

Tree: TypeAlias = dict[str, Tensor]
TreeMap: TypeAlias = Callable[[Tree], Tree]


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product ``<a, b>``, accumulated in at least float32; a scalar tensor."""
    products = [torch.sum(a[k].to(_acc(a[k])) * b[k].to(_acc(b[k]))) for k in a]
    return torch.stack(products).sum()


def norm(a: Tree) -> Tensor:
    """Euclidean norm ``||a||`` over all tensors, accumulated in at least float32; a scalar tensor."""
    values = [*a.values()]
    length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values, 2, dtype=_acc(values[0]))))
    return length


def scale(a: Tree, factor: float | Tensor) -> Tree:
    """``factor * a``."""
    return dict(zip(a, torch._foreach_mul([*a.values()], _like(factor, a)), strict=True))


def add_scaled(a: Tree, b: Tree, factor: float | Tensor = 1.0) -> Tree:
    """``a + factor * b``."""
    values, steps = [*a.values()], [b[k] for k in a]
    if isinstance(factor, Tensor):
        return dict(zip(a, torch._foreach_add(values, torch._foreach_mul(steps, _like(factor, a))), strict=True))
    return dict(zip(a, torch._foreach_add(values, steps, alpha=factor), strict=True))


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``."""
    return dict(zip(a, torch._foreach_sub([*a.values()], [b[k] for k in a]), strict=True))


def zeros_like(a: Tree) -> Tree:
    """A tree of zeros with the shapes of ``a``."""
    return {k: torch.zeros_like(v) for k, v in a.items()}


def _like(factor: float | Tensor, a: Tree) -> float | Tensor:
    """A factor in the dtype of the first tensor: of others, each tensor has a launch of its own."""
    return factor.to(next(iter(a.values())).dtype) if isinstance(factor, Tensor) else factor


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
