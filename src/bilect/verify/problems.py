"""Bilevel problems small enough to solve exactly, in float64.

    upper:  Phi(alpha) = f(w*(alpha)),   f(w) = mean_u l_u(w)
    lower:  w*(alpha)  = argmin_w  g(alpha, w) = sum_n alpha_n l_n(w) + l2/2 ||w - w_0||^2

The first three are convex in w; the language model is not, but has so few parameters that its Hessian is kept
densely. w_0 is zero for the convex ones and the random start for the language model: the pull towards it fixes the
rotations that a transformer's loss does not see, along which the Hessian would be singular. The first half of every
pool is drawn as the upper data are, the second half is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bilect.functional.trees import Tree

__all__ = ["F64", "Losses", "Problem", "language_model", "ridge", "softmax_regression", "weighted_mean"]

F64 = torch.float64
Losses = Callable[[Tree], Tensor]


@dataclass(frozen=True)
class Problem:
    """One bilevel problem.

    Attributes:
        name: for tables.
        n_items: N.
        losses: parameters -> l_n, (N,).
        upper_losses: parameters -> l_u, (U,).
        start: w_0.
        l2: coefficient of the lower level.
        convex: whether g is convex in w.
    """

    name: str
    n_items: int
    losses: Losses
    upper_losses: Losses
    start: Tree
    l2: float
    convex: bool = True

    @property
    def n_params(self) -> int:
        """P."""
        return sum(v.numel() for v in self.start.values())

    def lower(self, alpha_N: Tensor, params: Tree) -> Tensor:
        """``g(alpha, w)``."""
        squares = torch.stack([(v - self.start[k]).square().sum() for k, v in params.items()]).sum()
        return (alpha_N * self.losses(params)).sum() + 0.5 * self.l2 * squares

    def upper(self, params: Tree) -> Tensor:
        """``f(w)``."""
        return self.upper_losses(params).mean()

    def uniform(self) -> Tensor:
        """Equal weights that sum to 1."""
        return torch.full((self.n_items,), 1 / self.n_items, dtype=F64)

    def tree(self, w_P: Tensor) -> Tree:
        """A vector as a tree."""
        pieces = w_P.split([v.numel() for v in self.start.values()])
        return {k: p.view_as(v) for (k, v), p in zip(self.start.items(), pieces, strict=True)}


def weighted_mean(n: int, width: int = 4, n_upper: int = 20, l2: float = 0.1, seed: int = 0) -> Problem:
    """``l_n = 1/2 ||w - x_n||^2``: w* is linear in weights that sum to 1, so **Phi is convex in alpha**, provably."""
    g = torch.Generator().manual_seed(seed)

    def draw(size: int, centre: float) -> Tensor:
        return centre + torch.randn(size, width, generator=g, dtype=F64)

    def losses(x: Tensor, params: Tree) -> Tensor:
        return 0.5 * (params["weight"] - x).square().sum(-1)

    x_ND = torch.cat([draw(n // 2, 0.5), draw(n - n // 2, -0.5)])
    start = {"weight": torch.zeros(width, dtype=F64)}
    return Problem("mean", n, partial(losses, x_ND), partial(losses, draw(n_upper, 0.5)), start, l2)


def ridge(n: int = 64, width: int = 12, n_upper: int = 40, l2: float = 0.02, seed: int = 0) -> Problem:
    """Weighted ridge regression, ``l_n = 1/2 (x_n'w - y_n)^2``; the closed form is its first Newton step.

    The pool follows two linear laws; the upper data one of them. Features have scales from 1 to 0.2.
    """
    g = torch.Generator().manual_seed(seed)
    laws = torch.randn(2, width, generator=g, dtype=F64)

    def draw(size: int, law_D: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, width, generator=g, dtype=F64) * torch.logspace(0, -0.7, width, dtype=F64)
        return x, x @ law_D + 0.5 * torch.randn(size, generator=g, dtype=F64)

    def losses(x: Tensor, y: Tensor, params: Tree) -> Tensor:
        return 0.5 * (x @ params["weight"] - y) ** 2

    pool = _joined(draw(n // 2, laws[0]), draw(n - n // 2, laws.mean(0)))
    upper = draw(n_upper, laws[0])
    start = {"weight": torch.zeros(width, dtype=F64)}
    return Problem("ridge", n, partial(losses, *pool), partial(losses, *upper), start, l2)


def softmax_regression(
    n: int = 96, width: int = 8, classes: int = 4, n_upper: int = 60, l2: float = 0.01, seed: int = 0
) -> Problem:
    """Weighted softmax regression with a bias; the second half of the pool is labelled by the mean of two laws."""
    g = torch.Generator().manual_seed(seed)
    laws = 1.5 * torch.randn(2, width, classes, generator=g, dtype=F64)

    def draw(size: int, law_DC: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, width, generator=g, dtype=F64) * torch.logspace(0, -0.7, width, dtype=F64)
        return x, torch.multinomial((x @ law_DC).softmax(-1), 1, generator=g)[:, 0]

    def losses(x: Tensor, y: Tensor, params: Tree) -> Tensor:
        logits = x @ params["weight"] + params["bias"]
        return torch.logsumexp(logits, -1) - (logits * torch.nn.functional.one_hot(y, classes)).sum(-1)

    pool = _joined(draw(n // 2, laws[0]), draw(n - n // 2, laws.mean(0)))
    upper = draw(n_upper, laws[0])
    start = {"weight": torch.zeros(width, classes, dtype=F64), "bias": torch.zeros(classes, dtype=F64)}
    return Problem("softmax", n, partial(losses, *pool), partial(losses, *upper), start, l2)


def language_model(
    n: int = 48, length: int = 12, vocab: int = 8, width: int = 12, n_upper: int = 32, l2: float = 3e-2, seed: int = 0
) -> Problem:
    """A transformer of one block on documents from two Markov chains; the upper data follow one of them.

    ``l_n`` is the mean next-token cross-entropy of document n. No layer norms: they make a model this small too
    stiff to be trained to convergence.
    """
    g = torch.Generator().manual_seed(seed)
    chains_VV = [(2.0 * torch.randn(vocab, vocab, generator=g, dtype=F64)).softmax(-1) for _ in range(2)]

    def draw(size: int, chain_VV: Tensor) -> Tensor:
        ids_BT = torch.randint(vocab, (size, length), generator=g)
        for t in range(1, length):
            ids_BT[:, t] = torch.multinomial(chain_VV[ids_BT[:, t - 1]], 1, generator=g)[:, 0]
        return ids_BT

    shapes = {
        "embed": (vocab, width), "position": (length - 1, width), "query": (width, width), "key": (width, width),
        "value": (width, width), "up": (width, 2 * width), "down": (2 * width, width), "head": (width, vocab),
    }  # fmt: skip
    start = {k: 0.6 * torch.randn(shape, generator=g, dtype=F64) * width**-0.5 for k, shape in shapes.items()}
    causal_TT = torch.ones(length - 1, length - 1, dtype=F64).tril().log()

    def losses(ids_BT: Tensor, w: Tree) -> Tensor:
        one_hot_BTV = torch.nn.functional.one_hot(ids_BT, vocab).to(F64)
        hidden_BTD = one_hot_BTV[:, :-1] @ w["embed"] + w["position"]
        scores_BTT = (hidden_BTD @ w["query"]) @ (hidden_BTD @ w["key"]).mT * width**-0.5 + causal_TT
        hidden_BTD = hidden_BTD + scores_BTT.softmax(-1) @ (hidden_BTD @ w["value"])
        hidden_BTD = hidden_BTD + (hidden_BTD @ w["up"]).tanh() @ w["down"]
        logits_BTV = hidden_BTD @ w["head"]
        return (logits_BTV.logsumexp(-1) - (logits_BTV * one_hot_BTV[:, 1:]).sum(-1)).mean(-1)

    pool = torch.cat([draw(n // 2, chains_VV[0]), draw(n - n // 2, chains_VV[1])])
    upper = draw(n_upper, chains_VV[0])
    return Problem("language model", n, partial(losses, pool), partial(losses, upper), start, l2, convex=False)


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])
