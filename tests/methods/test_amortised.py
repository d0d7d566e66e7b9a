"""A small model that learns another method's scores: its step the long way round, what it predicts, when it ends."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import huber_loss

from bilect import methods
from bilect.data.batch import make_batch
from bilect.errors import BilectError
from bilect.functional.weights import robust_standardise
from bilect.methods.amortised import AmortisedConfig, Regression
from bilect.methods.contract import Inputs
from bilect.models.causal_lm import CausalLM
from bilect.models.score_model import ScoreModel
from tests.helpers import KINDS, tiny_lm
from tests.methods.planted import Counted

EXCESS = {"of": "excess", "settings": {"steps": 40, "learning_rate": 3e-3}}


def test_it_predicts_labels_it_has_not_seen(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    inputs = replace(pool(0), scratch=tmp_path, rows=pool(0).rows[:160])
    method = methods.make("amortised", {**EXCESS, "labels": 160})
    figures = method.fit(inputs, Counted())
    teacher = methods.make("excess", EXCESS["settings"])
    teacher.fit(replace(inputs, scratch=tmp_path / "other"), Counted())
    unseen = np.arange(160, 240)
    found = spearmanr(method.score(inputs.pool, unseen), teacher.score(inputs.pool, unseen)).statistic
    assert found > 0.5 and figures["label_correlation"] == pytest.approx(found, abs=0.3)  # 16 held-out labels
    assert figures["labels"] == 160


def test_a_pass_is_adamw_on_the_huber_loss_and_the_best_weights_are_kept(pool: Callable[[int], Inputs]) -> None:
    inputs, config = pool(0), AmortisedConfig(batch_size=8, epochs=30, learning_rate=5e-3)
    rows, label_R = np.arange(40)[::-1], torch.linspace(-1, 3, 40, dtype=torch.float64) ** 3
    score_model = ScoreModel.from_causal_lm(inputs.warm_proxy, torch.Generator().manual_seed(1), "linear", 1)
    twin = copy.deepcopy(score_model)
    regression = Regression(score_model, inputs.pool, rows, config, 0, seed=5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=5e-3)
    seen = list[int]()
    real = inputs.pool.rows

    class Spy:
        length_R = inputs.pool.length_R

        def rows(self, some: np.ndarray) -> object:
            seen.extend(some.tolist())
            return real(some)

    regression.store = Spy()  # type: ignore[assignment]
    for _ in range(3):
        seen.clear()
        regression.step(label_R)
        place = [int(np.flatnonzero(rows == row)[0]) for row in seen]
        assert len(place) == 8 and min(place) >= 4  # the first tenth is held out
        batch = make_batch(real(np.array(seen)), 0)
        scores = twin(batch.input_ids_BT, batch.mask_BT).scores
        huber_loss(scores, robust_standardise(label_R)[place].float()).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(score_model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    while not regression.finished:
        regression.step(label_R)
    assert regression.epoch == regression.best_epoch + 2 or regression.epoch == 30
    regression.keep_best()
    batch = make_batch(real(rows[:4]), 0)
    with torch.no_grad():
        best = score_model(batch.input_ids_BT, batch.mask_BT).scores
    assert spearmanr(best, label_R[:4]).statistic == pytest.approx(regression.correlation)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_trunk_is_the_first_blocks(kind: str) -> None:
    lm = CausalLM(tiny_lm(kind, layers=3, dtype=torch.float32))
    shallow = ScoreModel.from_causal_lm(lm.model, torch.Generator().manual_seed(0), "linear", 1)
    ids = torch.arange(1, 9)[None]
    state = lm.model.state_dict()
    own = {k: v for k, v in shallow.trunk.state_dict().items()}
    assert all(torch.equal(v, state[f"{lm.model.base_model_prefix}.{k}"]) for k, v in own.items())
    names = {k.split(".")[1] for k in own if k.split(".")[0] in ("layers", "h")}
    assert names == {"0"} and shallow(ids).scores.shape == (1,)


def test_wrong_teachers_are_one_line(pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    none = r"^amortised: of: it gives documents no scores of its own"
    for settings, line in (
        ({"of": "rho1"}, none),
        ({"of": "amortised"}, none),
        ({"of": "exces"}, r"^amortised: of: methods: there is no method 'exces'; did you mean 'excess'\?"),
        (
            {"of": "excess", "settings": {"step": 3}},
            r"^amortised: settings: excess: unknown key 'step'; did you mean 'steps'\?",
        ),
    ):
        with pytest.raises(BilectError, match=line):
            methods.make("amortised", settings)
    with pytest.raises(BilectError, match=r"^amortised: 9 candidates are too few to learn from; it takes 20$"):
        methods.make("amortised").fit(replace(pool(0), scratch=tmp_path, rows=np.arange(9)), Counted())
