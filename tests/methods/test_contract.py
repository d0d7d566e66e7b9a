"""What every document method keeps to, whoever wrote it: found through the registry, third parties' too."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilect import methods
from bilect.errors import BilectError
from bilect.functional.directional import central_step
from bilect.methods.contract import DocumentMethod, Inputs, Sizes
from bilect.methods.influence import Influence
from bilect.models.score_model import ScoreModel, ScoreModelConfig
from tests.methods.planted import Counted, Killed, precision, store_of

NAMES = [name for name in methods.names() if issubclass(methods.get(name), DocumentMethod)]
INFORMED = [name for name in NAMES if methods.get(name).uses_upper]
ENDS_EARLY = ("amortised", "excess")  # when what is held out is predicted no better
SEEDS = (0, 1)
TOLERANCE = 1e-5  # float32 passes over batches of other widths, in units of the scores' range

_FIT = {"lower_batch_size": 12, "upper_batch_size": 12, "proxy_learning_rate": 1e-3, "score_learning_rate": 3e-3,
        "warmup_ratio": 0.0}  # fmt: skip
# sizes that recover the target within seconds; a method that is not named has its defaults
SETTINGS: dict[str, dict[str, Any]] = {
    "bliss": {**_FIT, "steps": 40},
    "bliss-penalty": {**_FIT, "steps": 30},
    "amortised": {"of": "excess", "settings": {"steps": 40, "learning_rate": 3e-3}, "labels": 200, "epochs": 6},
    "excess": {"steps": 40, "learning_rate": 3e-3},
    "mates": {"probes": 80, "upper_documents": 16, "regression_epochs": 8, "regression_learning_rate": 3e-3,
              "learning_rate": 5e-3},
    "tandem": {"steps": 40, "weight_learning_rate": 3.0},
}  # fmt: skip
SHORT: dict[str, dict[str, Any]] = {
    "bliss": {**_FIT, "steps": 6},
    "bliss-penalty": {**_FIT, "steps": 6, "sync_every": 3, "reference_steps": 2},
    "amortised": {"of": "excess", "settings": {"steps": 2}, "labels": 40, "epochs": 2},
    "excess": {"steps": 6, "control": "pool", "held_out": 0.3},
    "influence": {"steps": 3, "checkpoints": 2, "upper_documents": 20},
    "mates": {"probes": 12, "upper_documents": 4, "regression_epochs": 1},
    "tandem": {"steps": 6},
}


class Fitted:
    def __init__(self, name: str, inputs: Inputs, folder: Path) -> None:
        self.inputs = replace(inputs, scratch=folder / "scratch")
        self.method = methods.make(name, SETTINGS.get(name))
        self.figures = self.method.fit(self.inputs, Counted())
        self.scores = self.method.score(self.inputs.pool, self.inputs.rows)
        self.folder = folder / "saved"
        self.method.save(self.folder)


@pytest.fixture(scope="module")
def fitted(pool: Callable[[int], Inputs], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fitted]:
    @cache
    def fit(name: str, seed: int) -> Fitted:
        return Fitted(name, pool(seed), tmp_path_factory.mktemp(f"{name}{seed}"))

    return fit


@pytest.mark.parametrize("name", INFORMED)
def test_the_targets_documents_come_first(name: str, fitted: Callable[..., Fitted]) -> None:
    shares = [precision(fitted(name, seed).inputs, fitted(name, seed).scores) for seed in SEEDS]
    print(f"{name}: precision at 20% {[round(s, 3) for s in shares]}")
    assert np.mean(shares) > 0.55  # chance: 0.2; its standard error over 2 x 48 documents is 0.04


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_numbers_one_per_row(name: str, fitted: Callable[..., Fitted]) -> None:
    fit = fitted(name, 0)
    assert fit.scores.shape == fit.inputs.rows.shape and fit.scores.dtype == np.float64
    assert np.isfinite(fit.scores).all() and (np.ptp(fit.scores) > 0 or name == "full")
    flops = fit.figures["flops"], fit.method.score_flops(fit.inputs.pool, fit.inputs.rows)
    assert all(isinstance(f, float) and f >= 0 for f in flops)
    json.dumps(fit.figures)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_foreseen(name: str, fitted: Callable[..., Fitted]) -> None:
    fit = fitted(name, 0)
    inputs, method = fit.inputs, fit.method
    lengths = [store.length_R.mean() for _, _, store in inputs.upper]
    proxy = inputs.load(inputs.proxy)
    target = inputs.load(inputs.target or inputs.proxy)

    def score_model(layers: int | None) -> ScoreModel:
        return ScoreModel(ScoreModelConfig.on(proxy, layers=layers))

    sizes = Sizes(
        proxy, target, score_model, documents=len(inputs.rows), length=float(inputs.pool.length_R[inputs.rows].mean()),
        upper=[(len(store), length) for (_, _, store), length in zip(inputs.upper, lengths, strict=True)],
        upper_length=float(np.average(lengths, weights=[weight for _, weight, _ in inputs.upper])),
        sources=len(set(inputs.pool.sources(inputs.rows))),
    )  # fmt: skip
    foreseen, done = method.foresee(sizes), fit.figures["flops"]
    assert foreseen.score_flops == pytest.approx(method.score_flops(inputs.pool, inputs.rows), rel=1e-9)
    if name in ENDS_EARLY:
        assert 0.2 * foreseen.fit_flops < done < 1.01 * foreseen.fit_flops
    else:
        assert foreseen.fit_flops == pytest.approx(done, rel=0.05)  # samples have other lengths, batches a last part
    assert (foreseen.fit_tokens > 0) == (foreseen.fit_flops > 0)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_gives_the_same_scores(name: str, fitted: Callable[..., Fitted]) -> None:
    fit = fitted(name, 0)
    rows = fit.inputs.rows[:20]
    loaded = methods.load(fit.folder, fit.inputs)
    assert type(loaded) is type(fit.method) and loaded.config == fit.method.config
    assert np.array_equal(loaded.score(fit.inputs.pool, rows), fit.method.score(fit.inputs.pool, rows))


@pytest.mark.parametrize("name", NAMES)
def test_neither_order_nor_batches_change_a_score(name: str, fitted: Callable[..., Fitted]) -> None:
    fit = fitted(name, 0)
    rows = np.random.default_rng(0).permutation(fit.inputs.rows)[:30]
    loaded = methods.load(fit.folder, replace(fit.inputs, batch_tokens=50))
    given = loaded.score(fit.inputs.pool, rows)
    tolerance = TOLERANCE * max(np.ptp(fit.scores), 1e-6) + _of_differences(fit.method)
    assert given == pytest.approx(fit.scores[rows], rel=0, abs=tolerance)


def _of_differences(method: DocumentMethod[Any]) -> float:
    """What rounding does to a central difference: losses below 8 that are off by four units in the last place each."""
    if not isinstance(method, Influence):
        return 0.0
    steps = [float(central_step(theta, z)) for theta, z in method.pairs]
    return method.config.learning_rate * sum(2 * 4 * 2.0**-21 / (2 * step) for step in steps)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_uninterrupted_and_a_seed_gives_one_result(
    name: str, pool: Callable[[int], Inputs], tmp_path: Path
) -> None:
    inputs = replace(pool(0), checkpoint_every=2)
    inputs = replace(inputs, rows=inputs.rows[:40])
    whole, again = (methods.make(name, SHORT.get(name)) for _ in range(2))
    whole.fit(replace(inputs, scratch=tmp_path / "whole"), Counted())
    torch.rand(3)  # the caller's random state is another by now
    there, killed, resumed = replace(inputs, scratch=tmp_path / "killed"), Counted(dies_at=6), Counted()
    with suppress(Killed):
        methods.make(name, SHORT.get(name)).fit(there, killed)
    died = len(killed.amounts) == killed.dies_at
    again.fit(there, resumed)
    assert died or name not in SHORT
    assert resumed.amounts[0] > 0 if died else True, "it started from nothing"
    assert np.array_equal(again.score(inputs.pool, inputs.rows), whole.score(inputs.pool, inputs.rows))


@pytest.mark.parametrize("name", INFORMED)
def test_without_upper_data_there_is_one_clear_line(name: str, pool: Callable[[int], Inputs], tmp_path: Path) -> None:
    method = methods.make(name, SHORT.get(name))
    with pytest.raises(BilectError, match=f"^{name}: no upper data says what good means"):
        method.fit(replace(pool(0), upper=[]), Counted())
    empty = [*pool(0).upper, ("hollow", 1.0, store_of(tmp_path / "hollow.arrow", []))]
    with pytest.raises(BilectError, match=f"^{name}: the upper set 'hollow' is empty"):
        method.fit(replace(pool(0), upper=empty), Counted())


@pytest.mark.parametrize("name", NAMES)
def test_without_candidates_there_is_one_clear_line(name: str, pool: Callable[[int], Inputs]) -> None:
    with pytest.raises(BilectError, match=f"^{name}: there are no candidate documents"):
        methods.make(name, SHORT.get(name)).fit(replace(pool(0), rows=np.zeros(0, np.int64)), Counted())
