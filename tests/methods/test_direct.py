"""Influence and excess against the long way round: a loop over documents, plain Hugging Face passes, torch's AdamW."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bilect import methods
from bilect.data.batch import make_batch
from bilect.methods._steps import whole_texts
from bilect.methods.contract import Inputs
from bilect.models.loading import load_causal_lm
from tests.helpers import Tree, document_loss, documents, reference_losses, reference_upper
from tests.methods.planted import Counted

ROWS = np.array([3, 17, 2, 41, 8])


def one_set(inputs: Inputs, folder: Path) -> Inputs:
    """Only the upper set of 16 documents: a batch of 16 is all of it."""
    return replace(inputs, scratch=folder, upper=[inputs.upper[1]])


def params_of(model: PreTrainedModel) -> Tree:
    return dict(model.named_parameters())


def mean_loss(model: PreTrainedModel, rows: Any) -> Tensor:
    return torch.stack([document_loss(model, params_of(model), *d) for d in rows]).mean()


def clipped(model: PreTrainedModel, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def brute_influence(inputs: Inputs, checkpoints: int, steps: int, rate: float, solver: str) -> np.ndarray:
    model = load_causal_lm(str(inputs.proxy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    state = torch.load(inputs.proxy / "optimizer.pt", weights_only=True)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1]  # the Trainer's groups: no biases, no norms
    others = [p for n, p in model.named_parameters() if p.ndim == 1]
    for p, slot in zip([*decayed, *others], state["state"].values(), strict=True):
        optimizer.state[p] = {k: v.clone() for k, v in slot.items()}
    store = inputs.upper[0][2]
    drawn = np.random.default_rng(inputs.derive("influence pool"))
    order = iter(np.concatenate([drawn.permutation(inputs.rows) for _ in range(3)]))
    total = np.zeros(len(ROWS))
    for _ in range(checkpoints):
        for _ in range(steps):
            optimizer.zero_grad()
            clipped(model, mean_loss(model, [inputs.pool.row(next(order)) for _ in range(16)]))
            optimizer.step()
        upper = reference_upper(model, params_of(model), store.rows(np.arange(len(store))))
        gradient = torch.autograd.grad(upper, list(model.parameters()))
        z = []
        for p, g in zip(model.parameters(), gradient, strict=True):
            slot = optimizer.state[p]  # v as a step on the upper loss would leave it
            v = (0.999 * slot["exp_avg_sq"] + 0.001 * g.square()) / (1 - 0.999 ** (float(slot["step"]) + 1))
            z.append(g / (v.sqrt() + 1e-8) if solver == "adam" else g)
        for k, row in enumerate(ROWS):
            own = torch.autograd.grad(mean_loss(model, [inputs.pool.row(row)]), list(model.parameters()))
            total[k] += rate * float(sum((a * b).sum() for a, b in zip(own, z, strict=True)))
    return total


@pytest.mark.parametrize(("solver", "way"), [("adam", "jvp"), ("identity", "jvp"), ("adam", "finite_difference")])
def test_influence_against_a_loop_over_documents(
    solver: str, way: str, pool: Callable[[int], Inputs], tmp_path: Path
) -> None:
    inputs = one_set(pool(0), tmp_path)
    expected = brute_influence(inputs, checkpoints=2, steps=3, rate=2e-3, solver=solver)
    settings = {"checkpoints": 2, "steps": 3, "learning_rate": 2e-3, "upper_documents": 16, "solver": solver}
    method = methods.make("influence", {**settings, "directional": way})
    method.fit(inputs, Counted())
    size = np.ptp(expected)
    assert method.score(inputs.pool, ROWS) == pytest.approx(expected, abs=(2e-3 if way == "jvp" else 1e-2) * size)
    assert size > 0


def test_one_step_of_excess_has_a_closed_form(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = one_set(pool(0), tmp_path)
    method = methods.make("excess", {"steps": 1, "learning_rate": 1e-2, "held_out": 0})
    method.fit(inputs, Counted())
    model, store = load_causal_lm(str(inputs.proxy)), inputs.upper[0][2]
    those = inputs.pool.rows(ROWS)
    with torch.no_grad():
        before = reference_losses(model, params_of(model), those)
    clipped(model, reference_upper(model, params_of(model), store.rows(np.arange(len(store)))))
    with torch.no_grad():
        for p in model.parameters():  # a fresh Adam's first step is the sign of the gradient
            p.mul_(1 - 1e-2 * 0.01).sub_(1e-2 * p.grad / (p.grad.abs() + 1e-8))
        after = reference_losses(model, params_of(model), those)
    assert method.score(inputs.pool, ROWS) == pytest.approx((before - after).numpy(), abs=2e-4)
    assert float((before - after).std()) > 1e-2


def test_whole_texts_are_prompts_that_are_learned_too() -> None:
    given, plain = documents((9, 6, 4), (4, 1, 3)), documents((9, 6, 4))
    assert torch.equal(whole_texts(make_batch(given, 0)).target_BT, make_batch(plain, 0).target_BT)
    assert make_batch(given, 0).n_predicted == 5 + 5 + 1 and whole_texts(make_batch(given, 0)).n_predicted == 8 + 5 + 3


def test_a_small_upper_set_holds_out_enough_to_end_in_time(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = one_set(pool(0), tmp_path)
    assert len(inputs.upper[0][2]) == 16
    method = methods.make("excess", {"steps": 10})
    assert method.fit(inputs, Counted())["held_out_loss"] > 0
    rows, held_out = method._split(inputs.upper[0][2])
    assert len(held_out) == 4 and sorted([*rows, *held_out]) == list(range(16))


def test_of_a_large_upper_set_no_more_is_held_out_than_is_worth_its_cost(
    pool: Callable[[int], Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = one_set(pool(0), tmp_path)
    method = methods.make("excess", {"steps": 1, "held_out": 0.75})
    method.fit(inputs, Counted())
    assert [len(rows) for rows in method._split(inputs.upper[0][2])] == [4, 12]
    monkeypatch.setattr("bilect.methods.excess.MOST_HELD_OUT", 6)
    assert [len(rows) for rows in method._split(inputs.upper[0][2])] == [10, 6]


def test_the_reference_is_the_best_on_what_it_does_not_learn(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = replace(pool(0), scratch=tmp_path)
    method = methods.make("excess", {"steps": 100, "learning_rate": 2e-2, "held_out": 0.25, "control": "pool"})
    figures = method.fit(inputs, Counted())
    assert 10 <= figures["steps"] <= 40 and figures["steps"] % 10 == 0
    total = 0.0
    for _, weight, store in inputs.upper:
        order = np.random.default_rng(inputs.derive("excess held out")).permutation(len(store))
        rows = store.rows(np.sort(order[: len(store) // 4]))
        with torch.no_grad():
            total += weight / 3 * float(reference_upper(method.reference, params_of(method.reference), rows))
    assert figures["held_out_loss"] == pytest.approx(total, rel=1e-5) and total < figures["held_out_loss_before"]
    short = methods.make("excess", {"steps": figures["steps"], "learning_rate": 2e-2, "held_out": 0, "control": "pool"})
    short.fit(replace(inputs, scratch=tmp_path / "short"), Counted())
    for a, b in zip(method.base.parameters(), short.base.parameters(), strict=True):
        assert torch.equal(a, b)  # the control has taken as many steps
