"""A few bilevel steps of each scenario on this rank's part of fixed global batches; run by test_ranks.py.

    python fit_on_ranks.py OUT WORLD ...    forks WORLD gloo processes, each of which writes OUT.WORLD.RANK

Forked from here, before any computation, because importing takes longer than all the steps.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bilect.bilevel.offline import fit as offline
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.batch import Batch
from bilect.models.score_model import ScoreModel
from bilect.runtime import distributed
from tests.distributed.ranks import main
from tests.helpers import batch_of, documents, tiny_lm

STEPS = 3
LENGTHS = (9, 5, 20, 7, 3)  # five documents do not divide among two or three ranks; widths differ between ranks
LEARNING_RATE = 1e-5
UPPER_LENGTHS, UPPER_GIVEN = (6, 12, 9), (4, 1, 3)

_COMMON: dict[str, Any] = {
    "steps": 10, "warmup_ratio": 0, "kl_coef": 0.3, "l2_coef": 0.01, "inner_steps": 2, "log_every": 1,
    "proxy_learning_rate": LEARNING_RATE, "score_learning_rate": LEARNING_RATE,
}  # fmt: skip
# model family, head of the score model, settings
SCENARIOS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "cg": ("llama", "sigmoid", {"solver": "cg", "hvp": "exact", "damping": 5.0, "directional": "ghost"}),
    "sgd": ("gpt_neox", "sigmoid", {"solver": "sgd", "hvp": "exact", "directional": "jvp", "solver_step_size": 0.05}),
    "neumann": ("gpt_neox", "sigmoid", {"solver": "neumann", "hvp": "exact", "directional": "jvp"}),
    "naive": (
        "llama", "sigmoid",
        {"solver": "identity", "directional": "jvp", "weighting": "naive", "kl_direction": "proxy_to_target"},
    ),
    "penalty": (
        "gpt_neox", "sigmoid",
        {"hypergradient": "penalty", "sync_every": 2, "reference_steps": 3, "reference_learning_rate": 1e-2},
    ),
    "differences": (
        "gpt_neox", "linear",
        {"solver": "cg", "hvp": "finite_difference", "damping": 5.0, "directional": "finite_difference"},
    ),
}  # fmt: skip


def part(lengths: tuple[int, ...], given: tuple[int, ...] | None, seed: int) -> Batch:
    return batch_of(list(distributed.own_part(documents(lengths, given, seed=seed))))


def batches(lengths: tuple[int, ...], given: tuple[int, ...] | None, seed: int) -> Iterator[Batch]:
    while True:
        yield part(lengths, given, seed)
        seed += 1


def run(scenario: str) -> dict[str, Any]:
    kind, head, choice = SCENARIOS[scenario]
    proxy = tiny_lm(kind, layers=1)
    target = tiny_lm("llama", layers=1, seed=5)
    trunk = tiny_lm(kind, layers=1, seed=6)
    score_model = ScoreModel.from_causal_lm(trunk, torch.Generator().manual_seed(3), head).double()
    with torch.no_grad():
        score_model.linear.weight *= 30
    config = FitConfig(**{**_COMMON, **choice})
    lower, upper = batches(LENGTHS, None, 0), batches(UPPER_LENGTHS, UPPER_GIVEN, 100)
    fit = BilevelFit(proxy, score_model, target, lower, upper, config)

    seen: list[dict[str, Tensor]] = []
    score_gradient = offline.score_gradient

    def spy(score_M: Tensor, d_M: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        gradient_M, weight_M = score_gradient(score_M, d_M, *args)
        seen.append({"score": score_M, "d": d_M, "score_gradient": gradient_M, "weight": weight_M})
        return gradient_M, weight_M

    gradients: list[dict[str, Tensor]] = []
    fit.score_optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            {k: p.grad.clone() for k, p in score_model.named_parameters() if p.grad is not None}
        )
    )
    offline.score_gradient = spy
    try:
        figures = [fit.step() for _ in range(STEPS)]
    finally:
        offline.score_gradient = score_gradient
    return {
        "steps": seen,
        "figures": figures,
        "gradients": gradients,
        "score_model": {k: p.detach().clone() for k, p in score_model.named_parameters()},
        "proxy": {k: p.detach().clone() for k, p in proxy.named_parameters()},
    }


def collectives() -> dict[str, Any]:
    """The primitives themselves, with a rank that has nothing."""
    rank, world = distributed.rank(), distributed.world_size()
    rows, own = distributed.gather_rows(torch.full((rank,), float(rank)))
    tree = distributed.sum_tree({"a": torch.full((2, 3), rank + 1.0), "b": torch.tensor(10.0 * rank)})
    parts = [list(distributed.own_part(range(n))) for n in (0, 1, 5, 7)]
    return {
        "rows": rows.tolist(), "own": rows[own].tolist() == [float(rank)] * rank,
        "a": tree["a"].tolist(), "b": float(tree["b"]), "sum": distributed.sum_scalar(rank + 0.5),
        "parts": parts, "world": world, "main": distributed.is_main(),
    }  # fmt: skip


def work() -> dict[str, Any]:
    return {**{name: run(name) for name in SCENARIOS}, "collectives": collectives()}


if __name__ == "__main__":
    main(work)
