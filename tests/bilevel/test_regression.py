"""The score model fitted by regression on d: its gradient the long way round, and its state."""

import copy
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bilect.bilevel.offline import fit as offline
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.loading import BatchStream
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.functional.weights import robust_standardise
from bilect.models.score_model import ScoreModel
from bilect.runtime.checkpoints import load_parts, save_parts
from tests.helpers import batch_of, documents, tiny_lm
from tests.methods.planted import WORDS, store_of


def make(folder: Path, **choice: Any) -> tuple[BilevelFit, BatchStream]:
    path = folder / "pool.arrow"
    if not path.exists():
        store_of(path, [("s", " ".join(WORDS[(7 * i + k) % 40] for k in range(6 + i % 5))) for i in range(40)])
    store = TokenStore(path)
    lower = BatchStream(store, np.arange(40), 8, 0, 3, torch.device("cpu"))
    upper = cycle([batch_of(documents((6, 9), (4, 1), seed=70))])
    score_model = ScoreModel.from_causal_lm(tiny_lm(layers=1), torch.Generator().manual_seed(3), "linear").double()
    settings = {"steps": 9, "warmup_ratio": 0, "learn": "regression", "replays": 2, "kl_coef": 0, "grad_clip": 1e9}
    config = FitConfig(**{**settings, "score_learning_rate": 1e-3, "proxy_learning_rate": 1e-4, **choice})
    return BilevelFit(tiny_lm(layers=1), score_model, None, lower, upper, config), lower


def test_labels_have_median_zero_and_no_far_tails() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 5.0, 1e6])
    assert robust_standardise(x).tolist() == pytest.approx([-2 / 2.9652, -1 / 2.9652, 0, 2 / 2.9652, 4.0])
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(robust_standardise(3 * normal + 7).std()) == pytest.approx(1, abs=0.01)
    assert robust_standardise(torch.tensor([2.0, 2.0, 2.0, 6.0])).tolist() == pytest.approx([-(3**-0.5)] * 3 + [3**0.5])


def test_a_step_regresses_on_this_batch_and_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, lower = make(tmp_path)
    seen: list[tuple[Any, torch.Tensor]] = []
    real = offline.robust_standardise

    def spy(d_M: torch.Tensor) -> torch.Tensor:
        seen.append((lower.batch(lower.drawn), d_M.clone()))
        return real(d_M)

    monkeypatch.setattr(offline, "robust_standardise", spy)
    for step in range(4):
        before = copy.deepcopy(fit.score_model)
        taken: dict[str, torch.Tensor] = {}
        handle = fit.score_optimizer.register_step_pre_hook(
            lambda *_, taken=taken: taken.update(
                {k: p.grad.clone() for k, p in fit.score_model.named_parameters() if p.grad is not None}
            )
        )
        figures = fit.step()
        handle.remove()
        earlier = np.random.default_rng(step).permutation(step)[:2].tolist()
        total = torch.zeros((), dtype=torch.float64)
        for batch, d_M in [seen[step], *(seen[k] for k in earlier)]:
            score_B = before(batch.input_ids_BT, batch.mask_BT).scores
            error = (score_B - real(d_M)).abs()
            total = total + torch.where(error < 1, error.square() / 2, error - 0.5).mean() / (1 + len(earlier))
        total.backward()
        for k, p in before.named_parameters():
            if p.grad is not None:
                assert torch.allclose(taken[k], p.grad, rtol=1e-6, atol=1e-10), k
        batch, d_M = seen[step]
        with torch.no_grad():
            scores = before(batch.input_ids_BT, batch.mask_BT).scores
        assert figures["label_correlation"] == pytest.approx(spearmanr(scores, d_M).statistic)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, _ = make(tmp_path)
    for _ in range(6):
        whole.step()
    fit, lower = make(tmp_path)
    for _ in range(3):
        fit.step()
    save_parts(tmp_path / "fit.pt", {"fit": fit, "lower": lower})
    again, lower = make(tmp_path)
    load_parts(tmp_path / "fit.pt", {"fit": again, "lower": lower}, "", torch.device("cpu"))
    for _ in range(3):
        again.step()
    for a, b in zip(whole.score_model.parameters(), again.score_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bounded_scores_are_refused(tmp_path: Path) -> None:
    bounded = ScoreModel.from_causal_lm(tiny_lm(layers=1), torch.Generator(), "sigmoid")
    with pytest.raises(BilectError, match=r"^fit\.learn: the labels of a regression are not bounded; set mod"):
        BilevelFit(tiny_lm(layers=1), bounded, None, iter([]), iter([]), FitConfig(learn="regression"))
