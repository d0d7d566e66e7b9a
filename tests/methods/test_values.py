"""The other methods: perplexity, noise, TANDEM, the BLISS pair and the token methods, each against its definition."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bilect import methods
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.data.batch import join_batches, make_batch
from bilect.errors import BilectError
from bilect.methods._noise import gumbel, uniform
from bilect.methods.bliss import BlissConfig
from bilect.methods.bliss_penalty import BlissPenaltyConfig
from bilect.methods.contract import Inputs, TokenMethod
from bilect.methods.tandem import FLOOR, Tandem, TandemConfig, TandemFit, exponentiated_gradient
from bilect.models.causal_lm import CausalLM
from bilect.models.loading import load_causal_lm
from tests.bilevel.online_helpers import make_batch as online_batch
from tests.helpers import Tree, documents, reference_losses, reference_upper, tiny_lm
from tests.methods.planted import Counted, store_of

# --------------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_is_the_loss_under_the_warm_proxy(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = replace(pool(0), scratch=tmp_path, rows=np.arange(9))
    model = load_causal_lm(str(inputs.proxy))
    with torch.no_grad():
        losses = reference_losses(model, dict(model.named_parameters()), inputs.pool.rows(inputs.rows)).numpy()
    scores = {}
    for keep in ("low", "middle", "high"):
        method = methods.make("perplexity", {"keep": keep})
        method.fit(inputs, Counted())
        scores[keep] = method.score(inputs.pool, inputs.rows)
    assert scores["high"] == pytest.approx(losses, rel=1e-5) and np.array_equal(scores["low"], -scores["high"])
    rank = losses.argsort().argsort()
    assert scores["middle"] == pytest.approx(-np.abs(rank / 8 - 0.5), abs=1e-4)  # all nine are the sample


# -------------------------------------------------------------------------------------------------------------- noise


def test_noise_belongs_to_the_document(pool: Callable[[int], Inputs]) -> None:
    ids = [f"document {i}" for i in range(20_000)]
    u, other = uniform(3, ids), uniform(4, ids)
    assert np.array_equal(u[::-1], uniform(3, ids[::-1])) and u.min() > 0 and u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.01) and u.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    inputs = pool(0)
    method = methods.make("random")
    method.fit(inputs, Counted())
    assert sorted(-method.score(inputs.pool, inputs.rows)) == list(range(len(inputs.rows)))  # a random order


def test_gumbel_noise_draws_by_weight() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    keys = np.stack([np.log(w) + gumbel(d, map(str, range(20_000))) for d, w in enumerate(weights)])
    first = np.bincount(keys.argmax(axis=0), minlength=3) / 20_000
    assert first == pytest.approx(weights, abs=0.012)  # three and a half standard errors


# ------------------------------------------------------------------------------------------------------------- TANDEM


def test_tandems_gradient_is_that_of_the_penalised_objective() -> None:
    model = tiny_lm(layers=1)
    parts = [documents((9, 6), seed=0), documents((7, 8), seed=1), documents((5, 10), seed=2)]
    upper = documents((6, 9), (4, 1), seed=70)
    lower_batch = join_batches([make_batch(docs, 0) for docs in parts], 0)
    config = TandemConfig(learning_rate=1e-2, penalty=2.5, weight_learning_rate=0.7)
    fit = TandemFit(CausalLM(model), iter([lower_batch] * 4), iter([make_batch(upper, 0)] * 4), 3, [1.0], config)
    fit.step()
    assert float(fit.gradient_G.abs().max()) < 1e-12  # the twins start as one
    fit.step(), fit.step()

    def objective(alpha_G: Tensor, w: Tree, u: Tree) -> Tensor:
        pairs = list(zip(alpha_G, parts, strict=True))
        lower_w, lower_u = (sum(a * reference_upper(model, p, d) for a, d in pairs) for p in (w, u))
        return reference_upper(model, w, upper) + 2.5 * (lower_w - lower_u)

    alpha_G = fit.alpha_G.clone().requires_grad_()
    w, u = ({k: v.detach().clone() for k, v in twin.params.items()} for twin in (fit.w, fit.u))
    (expected_G,) = torch.autograd.grad(objective(alpha_G, w, u), alpha_G)
    with torch.no_grad():
        upper_loss = float(reference_upper(model, w, upper))
    assert fit.step() == pytest.approx(upper_loss, rel=1e-10)
    assert torch.allclose(fit.gradient_G, expected_G, rtol=1e-8) and float(expected_G.std()) > 1e-4
    moved_G = alpha_G.detach() * torch.exp(-0.7 * expected_G)
    assert torch.allclose(fit.alpha_G, (1 - FLOOR) * moved_G / moved_G.sum() + FLOOR / 3, rtol=1e-8)


def test_the_twins_differ_by_the_upper_gradient_alone() -> None:
    model, config = tiny_lm(layers=1), TandemConfig(learning_rate=1e-2, grad_clip=1e9)
    lower = join_batches([make_batch(documents((9, 6), seed=k), 0) for k in range(2)], 0)
    silent = make_batch(documents((6, 9), (6, 9), seed=70), 0)  # nothing to predict: f has no gradient
    fit = TandemFit(CausalLM(model), iter([lower] * 3), iter([silent] * 3), 2, [1.0], config)
    for _ in range(3):
        fit.step()
    assert all(torch.equal(fit.u.params[k], fit.w.params[k]) for k in fit.u.params)
    assert fit.alpha_G.tolist() == [0.5, 0.5]


def test_weights_never_reach_zero() -> None:
    alpha_G = exponentiated_gradient(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([-1e4, 1e4]), 1.0)
    assert alpha_G.tolist() == pytest.approx([1 - FLOOR / 2, FLOOR / 2])


def test_a_sources_share_of_the_tokens_is_its_weight(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    texts = [("long", "w1 " * 20)] * 600 + [("short", "w1 " * 4)] * 600
    store = store_of(tmp_path / "two.arrow", texts)
    method = Tandem()
    method.inputs = replace(pool(0), pool=store, rows=np.arange(1200))
    method.weights = {"long": 0.6, "short": 0.4}
    method.tokens = {"long": 600 * 21.0, "short": 600 * 5.0}
    scores = method.score(store, method.inputs.rows)
    kept = np.argsort(-scores)[:200]  # few: none of the sources is running out
    share = store.length_R[kept[kept < 600]].sum() / store.length_R[kept].sum()
    assert share == pytest.approx(0.6, abs=0.12)


def test_tandem_needs_sources_it_knows(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = replace(pool(0), scratch=tmp_path)
    with pytest.raises(BilectError, match=r"^tandem: all candidates are of the source 's0'; it needs two or more"):
        methods.make("tandem").fit(replace(inputs, rows=np.arange(0, 40, 5)), Counted())
    method = methods.make("tandem", {"steps": 1})
    method.fit(replace(inputs, rows=np.array([0, 1, 5, 6])), Counted())
    assert set(method.weights) == {"s0", "s1"}
    with pytest.raises(BilectError, match=r"^tandem: source 's2' was not among the candidates that were weighed"):
        method.score(inputs.pool, np.array([2]))


# ------------------------------------------------------------------------------------------------------ BLISS, tokens


def test_the_twins_of_bliss_penalty_are_slow_unless_told_otherwise() -> None:
    assert BlissPenaltyConfig(proxy_learning_rate=4e-3).reference_learning_rate == pytest.approx(4e-4)
    assert BlissPenaltyConfig().reference_learning_rate == pytest.approx(1e-6)
    assert BlissPenaltyConfig(reference_learning_rate=0.5).reference_learning_rate == 0.5
    assert BlissPenaltyConfig().hypergradient == "penalty" and BlissPenaltyConfig().baseline == "matched"
    assert BlissConfig().reference_learning_rate is None and BlissConfig().hypergradient == "implicit"


def test_bliss_needs_the_target_for_its_divergence(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = replace(pool(0), scratch=tmp_path, target=None)
    settings = {"steps": 1, "lower_batch_size": 4, "upper_batch_size": 4, "reference_steps": 1}
    with pytest.raises(BilectError, match=r"^bliss: the divergence needs the warm target model; give it, or set kl_c"):
        methods.make("bliss", settings).fit(inputs, Counted())
    settings["kl_coef"] = 0
    assert methods.make("bliss", settings).fit(inputs, Counted())["flops"] > 0
    with pytest.raises(
        BilectError, match=r"^bliss: a loss is not a number at step \d of round 1; lower fit.proxy_learning_rate"
    ):
        methods.make("bliss", {**settings, "steps": 3, "proxy_learning_rate": 1e30}).fit(
            replace(inputs, scratch=tmp_path / "fresh"), Counted()
        )


def test_token_methods_are_choices_of_the_selector() -> None:
    def options(name: str, **settings: object) -> dict[str, object]:
        method = methods.make(name, settings)
        assert isinstance(method, TokenMethod)
        return method.options(1e-3)

    assert options("full") == {"keep_ratio": 1.0}
    assert options("random-token", keep_ratio=0.3)["selection"] == "random"
    rho1 = options("rho1", reference_steps=7)
    assert rho1["sync_every"] is None and rho1["penalty"] == 0 and rho1["reference_steps"] == 7
    blade = options("blade", sync_every=5)
    assert blade["sync_every"] == 5 and blade["penalty"] == 1 and "selection" not in blade
    with pytest.raises(BilectError, match=r"^rho1: method: "):
        methods.make("rho1", {"method": "blade"})


@pytest.mark.parametrize(("name", "kept"), [("full", 28), ("random-token", 14), ("rho1", 14), ("blade", 14)])
def test_the_selector_takes_every_token_methods_options(name: str, kept: int) -> None:
    settings = {} if name == "full" else {"keep_ratio": 0.5, "reference_steps": 2, "diagnose_every": None}
    model, batch = tiny_lm("llama", layers=1), online_batch(0, (8, 12, 11))
    selector = OnlineTokenSelector(
        model, [online_batch(5)], lower_loader=[online_batch(6)], **methods.make(name, settings).options(1e-3)
    )
    loss = selector.loss(model, batch)
    mask_BT = selector.last_mask_BT
    assert loss.isfinite() and (kept if mask_BT is None else int(mask_BT.sum())) == kept
    assert (mask_BT is None) == (name == "full")
