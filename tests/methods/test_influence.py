"""LESS and MATES against the long way round: plain Hugging Face passes, a loop over documents, torch's own AdamW."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilect import methods
from bilect.config import TrainConfig
from bilect.data.batch import make_batch
from bilect.data.loading import PackedWindows
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.methods._influence import Adam, warm_adam
from bilect.methods.contract import Inputs
from bilect.methods.less import _projection, last_blocks
from bilect.methods.mates import Probe
from bilect.models.causal_lm import CausalLM
from bilect.models.loading import load_causal_lm
from bilect.runtime.progress import SilentProgress
from bilect.training.train import train
from tests.helpers import KINDS, document_loss, reference_upper, tiny_lm
from tests.methods.planted import CONTEXT, TINY, Counted


def flat_gradient(model: Any, loss: Tensor, names: list[str]) -> Tensor:
    params = dict(model.named_parameters())
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [params[n] for n in names])])


def loss_of(model: Any, document: tuple[Tensor, int]) -> Tensor:
    return document_loss(model, dict(model.named_parameters()), *document)


# --------------------------------------------------------------------------------------------------------------- Adam


def test_the_direction_is_that_of_torchs_adam(generator: torch.Generator) -> None:
    p = torch.nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for step in range(4):
        state = optimizer.state[p]
        known = {"x": state["exp_avg"].clone()} if step else {}, {"x": state["exp_avg_sq"].clone()} if step else {}
        adam = Adam(*known, step, (0.8, 0.95), 1e-6)
        before, p.grad = p.detach().clone(), torch.randn(7, generator=generator, dtype=torch.float64)
        optimizer.step()
        taken = (before - p.detach()) / 0.1
        assert torch.allclose(adam.direction({"x": p.grad})["x"], taken, rtol=1e-12)
        if step == 0:
            assert torch.allclose(taken, p.grad.sign(), atol=1e-4)  # what the module says of a fresh one


def test_the_warm_optimisers_moments_belong_to_their_parameters(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    model = load_causal_lm(TINY, seed=3)
    start = copy.deepcopy(model)
    store, rows = pool(0).pool, np.arange(40)
    config = TrainConfig(steps=1, batch_size=2, learning_rate=1e-3, grad_clip=1e9, decay_steps=0)
    with SilentProgress().task("") as task:
        train(model, store, rows, tmp_path, config, context=CONTEXT, seed=5, task=task, checkpoint_every=10,
              device=torch.device("cpu"))  # fmt: skip
    adam = warm_adam(tmp_path, model)
    windows = PackedWindows(store, rows, CONTEXT, 2, 5)
    batch = {k: torch.stack([w[k] for w in (windows[0], windows[1])]) for k in ("input_ids", "labels")}
    start(**batch).loss.backward()
    assert adam.step == 1 and adam.betas == (0.9, 0.999)
    for name, p in start.named_parameters():
        assert torch.allclose(adam.first[name], 0.1 * p.grad, rtol=1e-3, atol=1e-8), name
        assert torch.allclose(adam.second[name], 1e-3 * p.grad.square(), rtol=2e-3, atol=1e-12), name


def test_without_an_optimiser_it_is_fresh_and_anothers_is_refused(
    pool: Callable[[int], Inputs], tmp_path: Path
) -> None:
    model = load_causal_lm({**TINY, "hidden_size": 8}, seed=3)
    assert warm_adam(tmp_path, model) == Adam({}, {})
    shutil.copy(pool(0).proxy / "optimizer.pt", tmp_path)
    with pytest.raises(BilectError, match="is not the optimiser of the model beside it"):
        warm_adam(tmp_path, model)


# --------------------------------------------------------------------------------------------------------------- LESS


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_blocks(kind: str) -> None:
    lm = CausalLM(tiny_lm(kind, layers=3))
    one, two = last_blocks(lm, 1), last_blocks(lm, 2)
    assert all(".2." in n for n in one) and all(".2." in n or ".1." in n for n in two) and len(two) == 2 * len(one)


def brute_force(inputs: Inputs, folders: list[tuple[Path, float]], rows: np.ndarray) -> np.ndarray:
    """The module's equation, a document at a time, with torch's AdamW for the direction."""
    scores = np.zeros(len(rows))
    for folder, rate in folders:
        model = load_causal_lm(str(folder))
        adam = warm_adam(folder, model)
        params = dict(model.named_parameters())
        names = [n for n in params if ".layers.1." in n]
        uppers = []
        for _, weight, store in inputs.upper:
            mean = torch.stack([loss_of(model, store.row(i)) for i in range(len(store))]).mean()
            uppers.append((weight, flat_gradient(model, mean, names)))
        for k, row in enumerate(rows):
            gradient = flat_gradient(model, loss_of(model, inputs.pool.row(row)), names)
            leaf = torch.nn.Parameter(torch.zeros_like(gradient))
            optimizer = torch.optim.AdamW([leaf], lr=1.0, weight_decay=0.0)
            first, second = (torch.cat([tree[n].reshape(-1) for n in names]) for tree in (adam.first, adam.second))
            optimizer.state[leaf] = {"step": torch.tensor(float(adam.step)), "exp_avg": first, "exp_avg_sq": second}
            leaf.grad = gradient
            optimizer.step()
            update = -leaf.detach()
            total = sum(weight for weight, _ in uppers)
            cosines = [w / total * float(torch.cosine_similarity(update, u, dim=0)) for w, u in uppers]
            scores[k] += rate * sum(cosines)
    return scores


def test_less_against_a_loop_over_documents(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs, rows = replace(pool(0), scratch=tmp_path), np.array([3, 17, 2, 41])
    method = methods.make("less")
    method.fit(inputs, Counted())
    expected = brute_force(inputs, [(inputs.proxy, 1.0)], rows)
    assert method.score(inputs.pool, rows) == pytest.approx(expected, abs=2e-5)
    assert np.ptp(expected) > 1e-2
    other = tmp_path / "other"  # an earlier checkpoint
    model = load_causal_lm(str(inputs.proxy))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    model.save_pretrained(other)
    shutil.copy(inputs.proxy / "optimizer.pt", other)
    checkpoints = [{"path": str(inputs.proxy), "learning_rate": 3e-3}, {"path": str(other), "learning_rate": 1e-3}]
    method = methods.make("less", {"checkpoints": checkpoints})
    method.fit(inputs, Counted())
    expected = brute_force(inputs, [(inputs.proxy, 0.75), (other, 0.25)], rows)
    assert method.score(inputs.pool, rows) == pytest.approx(expected, abs=2e-5)


def test_a_projection_keeps_the_cosines(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs, rows = replace(pool(0), scratch=tmp_path), np.arange(40)
    scores = []
    for dimensions in (8192, 1024):
        method = methods.make("less", {"dimensions": dimensions})
        method.fit(inputs, Counted())
        assert method.upper_CSF.shape == (1, 2, min(dimensions, 2224))  # one block of this model has 2224 weights
        scores.append(method.score(inputs.pool, rows))
    assert np.abs(scores[0] - scores[1]).max() < 4 / np.sqrt(1024)  # deviation of a projected cosine: 1 / sqrt(F)
    assert np.corrcoef(scores)[0, 1] > 0.6
    _projection.cache_clear()  # as in another process
    assert method.score(inputs.pool, rows[:5]) == pytest.approx(scores[1][:5], abs=1e-12)


# -------------------------------------------------------------------------------------------------------------- MATES


def upper_batches(store: TokenStore) -> Any:
    return make_batch(store.rows(np.arange(len(store))), 0)


@pytest.mark.parametrize("warm", [True, False])
def test_an_influence_is_what_one_step_does(warm: bool, pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = pool(0)
    model = load_causal_lm(str(inputs.proxy)).double()
    state = warm_adam(inputs.proxy if warm else tmp_path, model)
    doubled = ({k: v.double() for k, v in tree.items()} for tree in (state.first, state.second))
    adam = replace(state, **dict(zip(("first", "second"), doubled, strict=True)))
    upper = [(weight, upper_batches(store)) for _, weight, store in inputs.upper]
    probe = Probe(CausalLM(model), adam, upper, 0.01, 0)

    def upper_loss(model: Any) -> float:
        own = dict(model.named_parameters())
        parts = [
            weight / 3 * reference_upper(model, own, store.rows(np.arange(len(store))))
            for _, weight, store in inputs.upper
        ]
        return float(torch.stack(parts).sum().detach())

    influences = []
    for row in (4, 7):
        influence = probe.measure(inputs.pool.row(row))
        stepped = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(stepped.parameters(), lr=0.01, weight_decay=0.0)
        if warm:
            for name, p in stepped.named_parameters():
                optimizer.state[p] = {"step": torch.tensor(float(adam.step)), "exp_avg": adam.first[name].clone(),
                                      "exp_avg_sq": adam.second[name].clone()}  # fmt: skip
        loss_of(stepped, inputs.pool.row(row)).backward()
        optimizer.step()
        assert influence == pytest.approx(upper_loss(model) - upper_loss(stepped), rel=1e-7)
        influences.append(influence)
    assert np.ptp(influences) > 1e-5


def test_mates_scores_predict_influence_on_documents_it_has_not_probed(
    pool: Callable[[int], Inputs], tmp_path: Path
) -> None:
    inputs = replace(pool(0), scratch=tmp_path, rows=pool(0).rows[:100])
    settings = {"probes": 60, "upper_documents": 8, "regression_epochs": 8, "regression_learning_rate": 3e-3}
    method = methods.make("mates", {**settings, "learning_rate": 5e-3})
    figures = method.fit(inputs, Counted())
    model = load_causal_lm(str(inputs.proxy))
    upper = [(weight, upper_batches(store)) for _, weight, store in inputs.upper]
    probe = Probe(CausalLM(model), warm_adam(inputs.proxy, model), upper, 5e-3, 0)
    unseen = np.arange(100, 130)
    measured = [probe.measure(inputs.pool.row(row)) for row in unseen]
    assert np.corrcoef(method.score(inputs.pool, unseen), measured)[0, 1] > 0.5
    assert -1 <= figures["held_out_correlation"] <= 1
    with pytest.raises(BilectError, match=r"^mates: 9 candidates are too few to probe; it takes 10$"):
        methods.make("mates").fit(replace(inputs, rows=inputs.rows[:9]), Counted())
