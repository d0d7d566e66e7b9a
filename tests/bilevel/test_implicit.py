"""The implicit hypergradient on a language model of about a thousand parameters, against a dense Hessian solve."""

import copy
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bilect.bilevel.objective import directional, lower_objective, target_on_batch, upper_objective
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.batch import Batch
from bilect.functional.hypergradient import score_gradient
from bilect.functional.linear_solve import cg
from bilect.functional.trees import Tree
from bilect.models.causal_lm import CausalLM
from bilect.models.score_model import ScoreModel
from tests.helpers import (
    TableScores,
    batch_of,
    dense_hessian,
    document_loss,
    documents,
    flatten,
    gradient_of,
    reference_lower,
    reference_upper,
    relative,
    tiny_lm,
)

VOCAB, KL, L2 = 12, 0.2, 0.01
DOCS = documents((7, 4, 9, 6), (1, 2, 4, 1), vocab=VOCAB, seed=3)
for _row, (_ids, _) in enumerate(DOCS):
    _ids[0] = _row  # tells them apart for the table of scores
UPPER = documents((6, 8), (3, 1), vocab=VOCAB, seed=4)


def small(kind: str = "gpt_neox", seed: int = 0) -> PreTrainedModel:
    return tiny_lm(kind, vocab=VOCAB, width=4, heads=1, layers=1, context=16, seed=seed)


def dense_values(
    model: PreTrainedModel, target: PreTrainedModel | None, weights: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """``d_i = < grad l_i, (H + damping I)^-1 grad f >`` with H in full; and the spectrum of H."""
    params = {k: p.detach() for k, p in model.named_parameters()}
    hessian = dense_hessian(
        lambda p: reference_lower(
            model, p, DOCS, weights, target=target, kl_coef=KL if target is not None else 0.0, l2_coef=L2
        ),
        params,
    )
    b = flatten(gradient_of(lambda p: reference_upper(model, p, UPPER), params))
    z = torch.linalg.solve(hessian + damping * torch.eye(len(b), dtype=b.dtype), b)
    rows = [flatten(gradient_of(lambda p, d=d: document_loss(model, p, *d), params)) for d in DOCS]
    return torch.stack(rows) @ z, torch.linalg.eigvalsh(hessian)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_cg_against_a_dense_solve(kind: str, hvp: str) -> None:
    model, target = small(kind), small(seed=9)
    weights = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    lm, batch = CausalLM(model), batch_of(DOCS)
    outlook = target_on_batch(CausalLM(target), batch)
    lower = lower_objective(lm, batch, weights, target=outlook, kl_coef=KL, l2_coef=L2)
    _, spectrum = dense_values(model, target, weights, 1.0)
    damping = float(-2 * spectrum[0].clamp(max=-0.05))  # positive definite with room
    expected, _ = dense_values(model, target, weights, damping)

    params: Tree = {k: p.detach() for k, p in lm.params().items()}
    b = upper_objective(lm, batch_of(UPPER)).gradient(params)[0]
    solution = cg(lower.hvp(params, hvp), b, steps=1500, damping=damping, tolerance=1e-11 if hvp == "exact" else 1e-7)
    assert solution.note == "" and solution.residual is not None and solution.residual < 1e-6
    tolerance = 1e-6 if hvp == "exact" else 1e-4
    for method in ("jvp", "ghost", "finite_difference"):
        d = directional(lm, batch, params, solution.z, method)
        assert relative(d, expected) <= (1e-4 if method == "finite_difference" else tolerance)
    scores = torch.tensor([0.3, -1.0, 0.1, 0.8], dtype=torch.float64)
    p = scores.softmax(0)
    gradient, _ = score_gradient(scores, directional(lm, batch, params, solution.z, "jvp"), standardised=False)
    assert relative(gradient, -p * (expected - p @ expected)) <= tolerance


class Spy:
    """A fit whose score-model gradient can be read, as the optimiser gets it."""

    def __init__(
        self, config: FitConfig, score_model: Any, upper: Batch, lower: Batch, target: PreTrainedModel | None
    ) -> None:
        self.proxy = small()
        self.fit = BilevelFit(self.proxy, score_model, target, repeat(lower), repeat(upper), config)
        self.gradient: Tree = {}
        self.fit.score_optimizer.register_step_pre_hook(self._read)

    def _read(self, *_: Any) -> None:
        self.gradient = {k: p.grad.clone() for k, p in self.fit.score_model.named_parameters() if p.grad is not None}


CONFIG = FitConfig(
    steps=10, warmup_ratio=0, proxy_learning_rate=1e-3, grad_clip=1e9, kl_coef=KL, l2_coef=L2, standardise=False,
    solver="cg", solver_steps=1500, hvp="exact", directional="jvp",
)  # fmt: skip


@pytest.mark.parametrize("weighting", ["softmax", "naive"])
def test_the_fit_descends_the_dense_hypergradient(weighting: str) -> None:
    """Through the whole step: weights, inner steps, target, solve, values, and back through the score model."""
    target = small(seed=9)
    score_model = ScoreModel.from_causal_lm(small(), torch.Generator().manual_seed(1)).double().eval()
    damping = 10.0
    config = CONFIG.model_copy(update={"damping": damping, "weighting": weighting, "inner_steps": 2})
    spy = Spy(config, score_model, batch_of(UPPER), batch_of(DOCS), target)
    start = flatten(dict(spy.proxy.named_parameters())).clone()
    score_model = copy.deepcopy(score_model)
    figures = spy.fit.step()
    assert figures["solver_note"] == "" and figures["residual"] < 1e-9
    assert not torch.equal(start, flatten(dict(spy.proxy.named_parameters())))

    score = torch.stack([score_model(input_ids=ids[None]).scores[0] for ids, _ in DOCS])
    weights = score.softmax(0) if weighting == "softmax" else score / score.sum()
    d, spectrum = dense_values(spy.proxy, target, weights.detach(), damping)  # at the proxy's new parameters
    assert spectrum[0] > -damping
    names, params = zip(*score_model.named_parameters(), strict=True)
    expected = torch.autograd.grad(-(weights * d).sum(), params)
    assert set(spy.gradient) == set(names)
    actual = torch.cat([spy.gradient[k].reshape(-1) for k in names])
    assert relative(actual, torch.cat([g.reshape(-1) for g in expected])) <= 1e-6


@pytest.mark.parametrize("solver", ["identity", "adam", "neumann", "sgd"])
def test_the_fit_uses_the_solver_asked_for(solver: str) -> None:
    """d recomputed from the definitions of the solvers, at the proxy's new parameters."""
    config = CONFIG.model_copy(
        update={"solver": solver, "solver_steps": 3, "solver_step_size": 0.05, "damping": 0.4, "kl_coef": 0.0}
    )
    table = TableScores([int(ids[0]) for ids, _ in DOCS], torch.tensor([0.1, 0.5, -0.3, 0.0], dtype=torch.float64))
    spy = Spy(config, table, batch_of(UPPER), batch_of(DOCS), None)
    weights = table.free.detach().softmax(0)
    before = {k: p.detach().clone() for k, p in spy.proxy.named_parameters()}
    spy.fit.step()
    params = {k: p.detach() for k, p in spy.proxy.named_parameters()}

    def lower(p: Tree) -> Tensor:
        return reference_lower(spy.proxy, p, DOCS, weights, l2_coef=L2)

    b = flatten(gradient_of(lambda p: reference_upper(spy.proxy, p, UPPER), params))
    a = dense_hessian(lower, params) + 0.4 * torch.eye(len(b), dtype=torch.float64)
    if solver == "identity":
        z = b
    elif solver == "adam":  # second moments after one step, and one more on b
        g = flatten(gradient_of(lower, before))
        v = (0.999 * 0.001 * g.square() + 0.001 * b.square()) / (1 - 0.999**2)
        z = b / (v.sqrt() + 1e-8)
    elif solver == "neumann":
        z = 0.05 * sum(torch.linalg.matrix_power(torch.eye(len(b), dtype=b.dtype) - 0.05 * a, k) @ b for k in range(4))
    else:
        z = torch.full_like(b, 1 / len(b))
        sizes = [p.numel() for p in params.values()]
        for _ in range(3):
            parts = (a @ z - b).split(sizes)
            z = z - 0.05 * torch.cat([g * min(1.0, 1.0 / float(g.norm())) for g in parts])
    rows = [flatten(gradient_of(lambda p, doc=doc: document_loss(spy.proxy, p, *doc), params)) for doc in DOCS]
    d = torch.stack(rows) @ z
    expected = -weights * (d - weights @ d)
    assert relative(spy.gradient["free"], expected) <= 1e-6


@pytest.mark.parametrize(
    ("solver", "given"), [("neumann", {"damping": 0.4}), ("neumann", {}), ("cg", {})], ids=lambda x: str(x)
)
def test_solvers_follow_the_norm_that_is_measured(solver: str, given: dict[str, float]) -> None:
    """At the first step and every ``log_every`` after: the ratio of two powers of the dense Hessian; then d from it."""
    config = CONFIG.model_copy(
        update={"solver": solver, "solver_steps": 2, "kl_coef": 0.0, "log_every": 2, "damping": None, **given}
    )
    table = TableScores([int(ids[0]) for ids, _ in DOCS], torch.zeros(4, dtype=torch.float64))
    spy, norms = Spy(config, table, batch_of(UPPER), batch_of(DOCS), None), []
    for k in range(3):
        weights = table.free.detach().softmax(0)
        figures = spy.fit.step()
        params = {k: p.detach() for k, p in spy.proxy.named_parameters()}
        b = flatten(gradient_of(lambda p: reference_upper(spy.proxy, p, UPPER), params))
        h = dense_hessian(lambda p, w=weights: reference_lower(spy.proxy, p, DOCS, w, l2_coef=L2), params)
        powers = [float((torch.linalg.matrix_power(h, n) @ b).norm()) for n in (4, 5)]
        norms.append(powers[1] / powers[0] if k != 1 else norms[0])
        assert figures["hessian_norm"] == spy.fit.hessian_norm == pytest.approx(norms[k], rel=1e-8)
        damping = given.get("damping", 0.1 * norms[k] if solver == "cg" else 0.0)
        a = h + damping * torch.eye(len(b), dtype=torch.float64)
        if solver == "neumann":
            eta = 1 / (norms[k] + damping)
            z = eta * sum(
                torch.linalg.matrix_power(torch.eye(len(b), dtype=b.dtype) - eta * a, n) @ b for n in range(3)
            )
        else:  # the best of span(b, A b)
            basis, _ = torch.linalg.qr(torch.stack([b, a @ b], dim=1))
            z = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ b)
        rows = [flatten(gradient_of(lambda p, doc=doc: document_loss(spy.proxy, p, *doc), params)) for doc in DOCS]
        d = torch.stack(rows) @ z
        assert relative(spy.gradient["free"], -weights * (d - weights @ d)) <= 1e-6
        if figures["residual"] is not None:
            assert figures["residual"] == pytest.approx(float((a @ z - b).norm() / b.norm()), rel=1e-6)
    assert norms[2] != pytest.approx(norms[0], rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- sign


def with_a_copy(kind: str) -> tuple[Batch, Batch, TableScores]:
    """A lower batch whose second document is the whole upper set; scores start equal."""
    docs = documents((10, 10, 10, 10, 10), vocab=VOCAB, seed=11)
    for row, (ids, _) in enumerate(docs):
        ids[0] = row  # tells the documents apart for the table
    upper = [(docs[1][0].clone(), 1)]
    return batch_of(docs), batch_of(upper), TableScores(range(5), vocab=VOCAB)


@pytest.mark.parametrize(
    "choice",
    [
        {"solver": "identity"},
        {"solver": "adam"},
        {"solver": "cg", "damping": 5.0, "hvp": "finite_difference", "directional": "finite_difference"},
        {"solver": "cg", "damping": 5.0, "directional": "ghost"},
        {"solver": "neumann", "solver_steps": 5, "solver_step_size": 0.02, "damping": 5.0},
        {"solver": "sgd", "solver_steps": 3},
        {"hypergradient": "penalty", "baseline": "matched", "reference_steps": 5, "reference_learning_rate": 1e-2},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values() if isinstance(v, str)),
)
@pytest.mark.parametrize("standardise", [False, True])
def test_a_copy_of_the_upper_set_gains_most(choice: dict[str, Any], standardise: bool) -> None:
    lower, upper, table = with_a_copy("gpt_neox")
    config = CONFIG.model_copy(update={"kl_coef": 0.0, "solver_steps": 300, "standardise": standardise, **choice})
    spy = Spy(config, table, upper, lower, None)
    spy.fit.step()
    gradient = spy.gradient["free"]
    assert int(gradient.argmin()) == 1 and gradient[1] < 0
    assert (gradient[[0, 2, 3, 4]] > gradient[1] + 0.1 * gradient[1].abs()).all()


@pytest.mark.parametrize("hypergradient", ["implicit", "penalty"])
def test_a_step_raises_the_score_of_the_copy(hypergradient: str) -> None:
    lower, upper, table = with_a_copy("gpt_neox")
    config = CONFIG.model_copy(
        update={
            "kl_coef": 0.0, "solver": "identity", "hypergradient": hypergradient, "score_learning_rate": 0.1,
            "weight_decay": 0.0, "standardise": True,
        }
    )  # fmt: skip
    fit = BilevelFit(small(), table, None, repeat(lower), repeat(upper), config)
    for _ in range(3):
        fit.step()
    assert int(table.free.argmax()) == 1 and table.free[1] > 0


# ----------------------------------------------------------------------------------------------- the whole fit learns


def progressions(generator: torch.Generator, on_target: bool, n: int) -> list[tuple[Tensor, int]]:
    """Two domains: tokens 1-15 counting up, tokens 16-30 counting down."""
    start = torch.randint(15, (n,), generator=generator)
    step = torch.arange(12)
    rows = (start[:, None] + step) % 15 + 1 if on_target else 30 - (start[:, None] + step) % 15
    return [(row, 1) for row in rows]


def mixture(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield batch_of(progressions(generator, True, 4) + progressions(generator, False, 4))


def on_target(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield batch_of(progressions(generator, True, 4))


@pytest.mark.parametrize(
    "choice",
    [
        {"solver": "identity", "directional": "ghost"},
        {"solver": "adam", "directional": "finite_difference"},
        {"solver": "cg", "solver_steps": 3, "damping": 1.0, "directional": "jvp"},
        {"hypergradient": "penalty", "sync_every": 5, "reference_steps": 5, "reference_learning_rate": 3e-3},
    ],
    ids=["identity", "adam", "cg", "penalty"],
)
@pytest.mark.parametrize("head", ["linear", "sigmoid"])
def test_the_fit_learns_which_domain_is_the_target(choice: dict[str, Any], head: Any) -> None:
    proxy = tiny_lm(vocab=32, width=16, layers=1, dtype=torch.float32, context=16)
    target = tiny_lm(vocab=32, width=16, layers=1, dtype=torch.float32, context=16, seed=5)
    score_model = ScoreModel.from_causal_lm(proxy, torch.Generator().manual_seed(0), head)
    config = FitConfig(
        steps=25, warmup_ratio=0, proxy_learning_rate=1e-3, score_learning_rate=3e-3, kl_coef=0.01, **choice
    )

    def gap() -> float:
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            means = [
                score_model(batch_of(progressions(generator, domain, 16)).input_ids_BT[:, :12]).scores.mean()
                for domain in (True, False)
            ]
        return float(means[0] - means[1])

    score_model.eval()
    before = gap()
    fit = BilevelFit(proxy, score_model, target, mixture(1), on_target(2), config)
    for _ in range(config.steps):
        figures = fit.step()
    assert all(p.isfinite().all() for p in score_model.parameters())
    assert gap() > max(before, 0) + 0.1
    assert figures["step"] == 25
