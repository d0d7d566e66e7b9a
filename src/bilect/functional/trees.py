"""Arithmetic on parameter trees (``dict[str, Tensor]``)."""

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
    """Euclidean norm ``||a||`` over all tensors; a scalar tensor."""
    return dot(a, a).sqrt()


def scale(a: Tree, factor: float | Tensor) -> Tree:
    """``factor * a``."""
    return {k: v * factor for k, v in a.items()}


def add_scaled(a: Tree, b: Tree, factor: float | Tensor = 1.0) -> Tree:
    """``a + factor * b``."""
    if isinstance(factor, Tensor):
        return {k: v + factor * b[k] for k, v in a.items()}
    return {k: torch.add(v, b[k], alpha=factor) for k, v in a.items()}


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``."""
    return {k: v - b[k] for k, v in a.items()}


def zeros_like(a: Tree) -> Tree:
    """A tree of zeros with the shapes of ``a``."""
    return {k: torch.zeros_like(v) for k, v in a.items()}


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
