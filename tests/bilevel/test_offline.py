"""One bilevel step: what it reports, what it costs, what it leaves alone."""

import copy
import math
from collections.abc import Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilect.bilevel.objective import lower_objective, target_on_batch
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.batch import Batch
from bilect.errors import BilectError
from bilect.models.causal_lm import CausalLM
from bilect.models.score_model import ScoreModel
from bilect.runtime.checkpoints import load_state, save_state
from tests.helpers import (
    KINDS,
    batch_of,
    documents,
    reference_kl,
    reference_losses,
    reference_upper,
    tiny_lm,
)

LENGTHS = (9, 5, 12, 7, 8)


def make(kind: str = "gpt_neox", dtype: torch.dtype = torch.float64, **choice: Any) -> BilevelFit:
    proxy = tiny_lm(kind, layers=1, dtype=dtype)
    target = tiny_lm("gpt_neox", layers=1, width=24, dtype=dtype, seed=5)
    score_model = ScoreModel.from_causal_lm(tiny_lm(layers=1), torch.Generator().manual_seed(3), "linear").to(dtype)
    with torch.no_grad():
        score_model.linear.weight *= 20
    settings: dict[str, Any] = {"steps": 8, "warmup_ratio": 0, "proxy_learning_rate": 1e-3, "score_learning_rate": 1e-3}
    lower: Iterator[Batch] = cycle([batch_of(documents(LENGTHS, seed=k)) for k in range(3)])
    upper: Iterator[Batch] = cycle([batch_of(documents((6, 9), (4, 1), seed=70 + k)) for k in range(2)])
    return BilevelFit(proxy, score_model, target, lower, upper, FitConfig(**{**settings, **choice}))


SOLVERS: list[dict[str, Any]] = [
    {"solver": "identity"},
    {"solver": "adam"},
    {"solver": "neumann"},
    {"solver": "cg", "damping": 1.0},
    {"solver": "sgd", "hvp": "exact"},
    {"hypergradient": "penalty", "reference_steps": 2},
    {"hypergradient": "penalty", "baseline": "model", "reference_steps": 2},
]


@pytest.mark.parametrize("weighting", ["softmax", "naive"])
def test_figures_from_the_scores(weighting: str) -> None:
    fit = make(solver="cg", solver_steps=2, weighting=weighting, kl_coef=0.3)
    fit.score_model.config.head = "sigmoid" if weighting == "naive" else "linear"
    docs = documents(LENGTHS, seed=0)
    scores = [float(fit.score_model(input_ids=ids[None]).scores.detach()) for ids, _ in docs]
    total = math.fsum(math.exp(s) if weighting == "softmax" else s for s in scores)
    p = [(math.exp(s) if weighting == "softmax" else s) / total for s in scores]
    weights = torch.tensor(p, dtype=torch.float64)
    proxy = copy.deepcopy(fit.proxy.model)
    assert fit.target is not None
    with torch.no_grad():
        own = dict(proxy.named_parameters())
        loss = float((weights * reference_losses(proxy, own, docs)).sum())
        kl = float(0.3 * reference_kl(proxy, own, fit.target.model, docs, reverse=False))
    figures = fit.step()
    mean = math.fsum(scores) / 5
    assert figures["weight_entropy"] == pytest.approx(-math.fsum(q * math.log(q) for q in p), rel=1e-9)
    assert figures["effective_sample_size"] == pytest.approx(1 / math.fsum(q * q for q in p), rel=1e-9)
    assert figures["score_mean"] == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert figures["score_std"] == pytest.approx(math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / 5), rel=1e-9)
    assert figures["score_min"] == pytest.approx(min(scores), rel=1e-9)
    assert figures["score_max"] == pytest.approx(max(scores), rel=1e-9)
    assert 1 < figures["effective_sample_size"] < 5 and figures["score_std"] > 0.01  # the test means something
    assert figures["lower_loss"] == pytest.approx(loss, rel=1e-9)  # of the last inner step, before it
    assert figures["kl"] == pytest.approx(kl, rel=1e-9)
    with torch.no_grad():  # the upper loss is that of the proxy the system was solved at
        upper = reference_upper(fit.proxy.model, fit.proxy.params(), documents((6, 9), (4, 1), seed=70))
    assert figures["upper_loss"] == pytest.approx(float(upper), rel=1e-9)
    assert figures["step"] == fit.steps_done == 1 and figures["residual"] >= 0


@pytest.mark.parametrize("choice", SOLVERS, ids=lambda c: "-".join(str(v) for v in c.values() if isinstance(v, str)))
def test_every_choice_runs_and_reports_finite_figures(choice: dict[str, Any]) -> None:
    fit = make(dtype=torch.float32, log_every=1, **choice)
    before = copy.deepcopy(fit.target.model.state_dict()) if fit.target is not None else {}
    for _ in range(3):
        figures = fit.step()
    for key, value in figures.items():
        if isinstance(value, float):
            assert math.isfinite(value), key
    assert (figures["residual"] is None) == ("hypergradient" in choice)
    for k, p in (fit.target.model if fit.target is not None else fit.proxy.model).state_dict().items():
        assert torch.equal(p, before[k])
    for p in (*fit.params.values(), *fit.score_model.parameters()):
        assert p.grad is None and p.isfinite().all() and p.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directional", ["jvp", "ghost", "finite_difference"])
def test_every_family_runs(kind: str, directional: str) -> None:
    fit = make(kind, directional=directional, solver="cg", hvp="exact", damping=1.0)
    figures = [fit.step() for _ in range(2)]
    assert all(math.isfinite(f["d_std"]) and f["d_std"] > 0 for f in figures)


def test_choices_of_directional_and_hvp_agree() -> None:
    results = []
    for directional, hvp in (("jvp", "exact"), ("ghost", "exact"), ("finite_difference", "finite_difference")):
        fit = make(directional=directional, hvp=hvp, solver="cg", solver_steps=3, damping=1.0, standardise=False)
        results.append([fit.step()["d_std"] for _ in range(3)])
    assert results[1] == pytest.approx(results[0], rel=1e-7)
    assert results[2] == pytest.approx(results[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_the_target_runs_once_per_step(hvp: str) -> None:
    fit = make(inner_steps=3, solver="cg", hvp=hvp, damping=1.0, log_every=1)
    calls: list[tuple[int, ...]] = []
    assert fit.target is not None
    fit.target.trunk.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    fit.target.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(()))
    for step in range(1, 4):
        fit.step()
        assert len(calls) == step and calls[-1][0] == 5


def test_the_target_never_runs_without_divergence() -> None:
    proxy = tiny_lm(layers=1)

    class NoTarget:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the target's {name} was used")

    fit = make(kl_coef=0.0)
    assert fit.target is None and fit.step()["kl"] is None
    batches = cycle([batch_of(documents((5, 6)))])
    BilevelFit(proxy, fit.score_model, NoTarget(), batches, batches, FitConfig(kl_coef=0.0)).step()  # type: ignore[arg-type]


def test_micro_batches_of_the_target_change_nothing() -> None:
    whole, parts = make(solver="cg", damping=1.0), make(solver="cg", damping=1.0, target_micro_batch=2)
    calls: list[int] = []
    assert parts.target is not None
    parts.target.trunk.register_forward_hook(lambda m, a, kw, out: calls.append(len(kw["input_ids"])), with_kwargs=True)
    for _ in range(2):
        one, other = whole.step(), parts.step()
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-10)
        assert other["d_std"] == pytest.approx(one["d_std"], rel=1e-8)
    assert calls == [2, 2, 1] * 2


def test_no_gradient_of_a_document_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes do not grow with the documents of the batch."""
    counts = []
    for n in (2, 8):
        fit = make(solver="cg", solver_steps=2, directional="ghost", damping=1.0)
        fit.lower = cycle([batch_of(documents([7] * n))])
        made = []
        grad = torch.autograd.grad
        monkeypatch.setattr(
            torch.autograd, "grad", lambda *a, made=made, grad=grad, **k: (made.append(1), grad(*a, **k))[1]
        )
        fit.step()
        monkeypatch.undo()
        counts.append(len(made))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------------------ course


def test_inner_steps_are_literal_adamw_steps_with_weights_held_fixed() -> None:
    fit = make(inner_steps=3, solver="identity", kl_coef=0.2, l2_coef=0.01, weight_decay=0.1, grad_clip=0.5)
    reference = copy.deepcopy(fit.proxy.model)
    docs = documents(LENGTHS, seed=0)
    with torch.no_grad():
        weights = torch.stack([fit.score_model(input_ids=ids[None]).scores[0] for ids, _ in docs]).softmax(0)
    assert fit.target is not None
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        own = dict(reference.named_parameters())
        loss = (weights * reference_losses(reference, own, docs)).sum()
        loss = loss + 0.2 * reference_kl(reference, own, fit.target.model, docs, reverse=False)
        loss = loss + 0.01 * sum(p.square().sum() for p in own.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
    fit.step()
    for (k, p), (_, q) in zip(fit.proxy.model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=k)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    fit = make(solver="identity", warmup_ratio=0.25)
    rates = []
    for group in (fit.proxy_optimizer, fit.score_optimizer):
        group.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in range(8):
        fit.step()
    expected = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates[0::2] == pytest.approx([1e-3 * r for r in expected])
    assert rates[1::2] == pytest.approx([1e-3 * r for r in expected])


def test_twins_are_synchronised_every_so_many_steps() -> None:
    fit = make(hypergradient="penalty", sync_every=3, reference_steps=2)
    seen = []
    for _ in range(7):
        fit.step()
        seen.append(fit.twins)
    changes = [a is not b for a, b in pairwise(seen)]
    assert changes == [False, False, True, False, False, True]


@pytest.mark.parametrize("baseline", ["matched", "model"])
def test_penalty_values_are_losses_of_the_twins(baseline: str) -> None:
    fit = make(hypergradient="penalty", baseline=baseline, penalty=3.0, reference_steps=2, reference_learning_rate=1e-2)
    figures = fit.step()
    docs = documents(LENGTHS, seed=0)
    assert fit.twins is not None and (fit.twins.matched is None) == (baseline == "model")
    with torch.no_grad():
        m = fit.twins.matched if fit.twins.matched is not None else fit.proxy.params()
        d = 3.0 * (
            reference_losses(fit.proxy.model, m, docs) - reference_losses(fit.proxy.model, fit.twins.reference, docs)
        )
    assert figures["d_std"] == pytest.approx(float(d.std(correction=0)), rel=1e-7)
    assert d.abs().max() > 1e-3


def test_a_fit_is_a_function_of_its_inputs() -> None:
    runs = []
    for _ in range(2):
        fit = make(dtype=torch.float32, solver="cg", damping=1.0)
        torch.manual_seed(len(runs))  # nothing may draw from the global generator
        for _ in range(3):
            fit.step()
        runs.append(torch.cat([p.detach().reshape(-1) for p in fit.score_model.parameters()]))
    assert torch.equal(runs[0], runs[1])


def test_weights_and_divergence_add_up_over_micro_objectives() -> None:
    """The KL is a mean over predicted tokens: documents weigh by length there, not by P."""
    model, target = tiny_lm(layers=1), tiny_lm(layers=1, seed=4)
    docs = documents((4, 20))
    batch, lm = batch_of(docs), CausalLM(model)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    lower = lower_objective(lm, batch, weights, target=target_on_batch(CausalLM(target), batch), kl_coef=1.0)
    with torch.no_grad():
        each = [float(reference_kl(model, lm.params(), target, [d], reverse=False)) for d in docs]
    assert lower.gradient(lm.params())[2] == pytest.approx((3 * each[0] + 19 * each[1]) / 22, rel=1e-9)


def test_bf16_stays_close_and_keeps_float32_state() -> None:
    plain, mixed = (make(dtype=torch.float32, solver="adam", bf16=on, inner_steps=2) for on in (False, True))
    for _ in range(3):
        one, other = plain.step(), mixed.step()
    assert other["lower_loss"] == pytest.approx(one["lower_loss"], rel=3e-2)
    assert other["upper_loss"] == pytest.approx(one["upper_loss"], rel=3e-2)
    state: list[Tensor] = [*mixed.params.values(), *mixed.score_model.parameters()]
    state += [v for s in mixed.proxy_optimizer.state.values() for v in s.values() if v.ndim]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in state)


def test_a_fresh_batch_survives_being_used_first_inside_a_transform() -> None:
    from bilect.bilevel.objective import document_losses

    lm = CausalLM(tiny_lm(layers=1))
    batch = batch_of(documents((5, 6)))
    params = {k: p.detach() for k, p in lm.params().items()}
    losses = document_losses(lm, batch)
    first = torch.func.vjp(losses, params)[0]
    torch.testing.assert_close(losses(params), first)
    assert type(batch.labels_N) is torch.Tensor and batch.labels_N.tolist()


# ------------------------------------------------------------------------------------------------------------ resume

RESUMED: list[dict[str, Any]] = [
    {"solver": "adam", "inner_steps": 2},
    {"solver": "cg"},
    {"solver": "neumann"},
    {"hypergradient": "penalty", "sync_every": 3, "reference_steps": 2},
    {"hypergradient": "penalty", "sync_every": 3, "reference_steps": 2, "baseline": "model"},
]


@pytest.mark.parametrize("choice", RESUMED, ids=["adam", "cg", "neumann", "matched", "model"])
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(choice: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": torch.float32, "warmup_ratio": 0.25, "log_every": 2, "weight_decay": 0.1}
    whole = make(**settings, **choice)
    figures = [whole.step() for _ in range(7)]
    for interrupted in (3, 4):  # between two periods of the twins, and inside one
        first, second = make(**settings, **choice), make(**settings, **choice)
        assert [first.step() for _ in range(interrupted)] == figures[:interrupted]
        save_state(tmp_path / "fit", first.state_dict())
        second.step()  # whatever it was, it is replaced
        second.load_state_dict(load_state(tmp_path / "fit", "none"))
        second.lower, second.upper = first.lower, first.upper
        assert [second.step() for _ in range(7 - interrupted)] == figures[interrupted:]
        for part in ("proxy", "score_model"):
            a, b = whole.state_dict()[part], second.state_dict()[part]
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    save_state(file, {"x": torch.ones(1000)})

    def half(state: Any, stream: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            save_state(file, {"x": torch.zeros(1000)})
    assert torch.equal(load_state(file, "none")["x"], torch.ones(1000))
    save_state(file, {"x": torch.zeros(1000)})
    assert torch.equal(load_state(file, "none")["x"], torch.zeros(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("damage", ["half", "bit", "empty", "text", "missing"])
def test_a_broken_state_is_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "state.pt"
    save_state(file, {"x": torch.arange(1000.0)})
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # among the numbers, where only the checksum tells
    content = {"half": bytes(data[:2000]), "bit": bytes(data), "empty": b"", "text": b"hello"}
    file.unlink() if damage == "missing" else file.write_bytes(content[damage])
    with pytest.raises(BilectError, match=rf"^checkpoint: cannot read {file} \(.*\); do this$") as caught:
        load_state(file, "do this")
    assert "\n" not in str(caught.value)
