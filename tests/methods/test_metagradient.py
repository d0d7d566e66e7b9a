"""The yardstick of ``verify --retrain`` against trainings in which one document weighs a little more or less."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bilect.functional import metagradient as functional
from bilect.methods._influence import Adam
from bilect.methods._steps import upper_objective_of
from bilect.methods.contract import Inputs
from bilect.models.causal_lm import CausalLM
from bilect.runtime.progress import SilentProgress
from bilect.verify.retraining import metagradient as module
from bilect.verify.retraining.metagradient import Metagradient, MetagradientConfig


def test_a_score_is_what_a_documents_weight_does_to_the_upper_loss(
    pool: Callable[[int], Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = replace(pool(0), rows=pool(0).rows[:12])
    monkeypatch.setattr(module, "warm_adam", lambda folder, model: Adam({}, {}, eps=1e-4))
    config = MetagradientConfig(passes=2, batch_size=4, learning_rate=1e-2, upper_documents=16)
    ends: list[float] = []

    def end_loss(row: int | None = None, factor: float = 1.0) -> Metagradient:
        """Trains with one document's weight changed; the upper loss goes to ``ends``."""
        method = Metagradient(config)
        method.__dict__["_lm"] = CausalLM(inputs.load(inputs.proxy).double())
        plain: Any = Metagradient._step

        def step(self: Metagradient, rows: np.ndarray) -> Any:
            losses, weights = plain(self, rows)
            return losses, weights.double() * torch.tensor([factor if r == row else 1.0 for r in rows.tolist()])

        def kept(*args: Any) -> Any:
            found, end = functional.metagradient(*args)
            batches = module.upper_batches(inputs, module.UPPER_BATCH, "metagradient upper")
            gradient = upper_objective_of(method._lm, batches, inputs, "response").gradient(end.theta)
            ends.append(float(gradient.ce))
            return found, end

        monkeypatch.setattr(Metagradient, "_step", step)
        monkeypatch.setattr(module, "metagradient", kept)
        with SilentProgress().task("") as task:
            method.fit(inputs, task)
        monkeypatch.setattr(Metagradient, "_step", plain)
        return method

    scores = end_loss().score(inputs.pool, inputs.rows)
    assert np.ptp(scores) > 1e-5
    for at in (0, 7):
        row = int(inputs.rows[at])
        end_loss(row, 1 + 1e-3), end_loss(row, 1 - 1e-3)
        assert scores[at] == pytest.approx(-(ends[-2] - ends[-1]) / 2e-3, rel=1e-3)  # f has the precision of float32


def test_a_warm_optimiser_goes_on(pool: Callable[[int], Inputs]) -> None:
    """Its moments make the first steps small: scores differ from those of a fresh one."""
    inputs = replace(pool(0), rows=pool(0).rows[:8])
    config = MetagradientConfig(passes=1, batch_size=4, learning_rate=1e-3, upper_documents=16)
    found = []
    for name in ("optimizer.pt", "none.pt"):
        method = Metagradient(config)
        with pytest.MonkeyPatch.context() as patch, SilentProgress().task("") as task:
            patch.setattr("bilect.methods._influence.OPTIMIZER_FILE", name)
            method.fit(inputs, task)
        found.append(method.score(inputs.pool, inputs.rows))
    assert np.abs(found[0] - found[1]).max() > 1e-6 and np.isfinite(found).all()
