"""Operations of a fit as they are counted, against those that torch carries out."""

from itertools import cycle
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.models.score_model import ScoreModel
from tests.helpers import batch_of, documents, tiny_lm

LENGTH = 16


@pytest.mark.parametrize(
    "choice",
    [
        {"solver": "adam", "kl_coef": 0.0},
        {"solver": "adam", "inner_steps": 3},
        {"solver": "cg", "solver_steps": 4, "damping": 20.0},  # enough never to stop at negative curvature
        {"solver": "cg", "solver_steps": 4, "damping": 20.0, "hvp": "forward_difference"},
        {"solver": "neumann", "log_every": 1},
        {"solver": "neumann", "solver_step_size": 0.1, "hvp": "exact"},
        {"solver": "sgd", "directional": "jvp"},
        {"hypergradient": "penalty", "sync_every": 2, "reference_steps": 3},
        {"hypergradient": "penalty", "sync_every": 2, "reference_steps": 1, "baseline": "model"},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_operations_of_a_fit_are_those_that_are_carried_out(choice: dict[str, Any]) -> None:
    proxy, target = tiny_lm(layers=1, width=48), tiny_lm(layers=1, width=64, seed=5)
    score_model = ScoreModel.from_causal_lm(tiny_lm(layers=1, width=48), torch.Generator().manual_seed(3))
    lower = cycle([batch_of(documents((LENGTH,) * 6, seed=0))])
    upper = cycle([batch_of(documents((LENGTH,) * 4, seed=1))])
    config = FitConfig(**{"steps": 2, "lower_batch_size": 6, "upper_batch_size": 4, "log_every": 2, **choice})
    fit = BilevelFit(proxy, score_model, target, lower, upper, config)
    with FlopCounterMode(display=False) as counter:
        for _ in range(config.steps):
            fit.step()
    expected = fit_flops(config, proxy, score_model, target, lower_length=LENGTH, upper_length=LENGTH)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)
