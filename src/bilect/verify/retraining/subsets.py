"""Random halves of the candidate documents, and the target retrained on each.

    S_j: a uniformly random half of the candidates, j = 1..subsets, drawn independently of each other

Complementary pairs would show every document equally often, but where losses are about additive the complement repeats
what its half has told: with m/2 pairs the correlation of a random score varies like 1/sqrt(m/2) instead of 1/sqrt(m).
Linear datamodels use independent halves too (Ilyas et al., arXiv 2202.00622, section 2; Park et al., arXiv 2303.14186,
section 2, for the score).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bilect.config import Config
from bilect.errors import BilectError
from bilect.pipeline.context import WARM_TARGET, RunContext
from bilect.pipeline.directory import read_manifest, stage_key
from bilect.runtime.progress import SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.training import evaluation
from bilect.training.train import NotANumberError, train

__all__ = ["Study", "retrained", "warm"]

UPPER_DOCUMENTS = 128  # of each upper set, for its loss


@dataclass(frozen=True)
class Study:
    """What every cell is given; can be sent to another process.

    Attributes:
        out: folder of the study; ``out/run`` is a run directory with tokens and warm models.
        config: of the run.
        rows: candidate documents in the pool, sorted.
    """

    out: Path
    config: Config
    rows: np.ndarray

    @property
    def run(self) -> RunContext:
        """The run's files."""
        return RunContext(self.out / "run", self.config, SilentProgress())

    def half(self, j: int) -> np.ndarray:
        """``S_j`` as positions among the candidates, sorted; j counts from 0."""
        order = np.random.default_rng(derive_seed(self.config.seed, "half", j)).permutation(len(self.rows))
        return np.sort(order[: len(order) // 2])

    def key(self, name: str, settings: Any, after: tuple[str, ...]) -> str:
        """Key of a cell from its settings, the candidates, and the stages of the run that it builds on."""
        stages = read_manifest(self.out / "run")["stages"]
        after = ("tokenise held-out", "tokenise upper", *after)
        settings = [settings, self.rows.tolist(), self.config.seed, UPPER_DOCUMENTS]
        return stage_key(name, settings, [stages[s]["key"] for s in after])

    def losses(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """``heldout``: loss per token of each held-out set; ``upper``: mean document loss of each upper set."""
        run, found = self.run, dict[str, dict[str, float]]()
        size = self.config.score_batch_tokens
        stores = run.heldout_sets()
        found["heldout"] = {k: evaluation.evaluate(model, s, run.pad_id, size).loss for k, s in stores.items()}
        found["upper"] = {}
        for name, _, store in run.upper_sets():
            generator = np.random.default_rng(derive_seed(self.config.seed, "upper sample", name))
            some = np.sort(generator.permutation(len(store))[:UPPER_DOCUMENTS])
            loss_R = evaluation.document_losses(model, store, some, run.pad_id, size)
            found["upper"][name] = float(loss_R.mean())
        return found

    def means(self, losses: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Over the held-out sets, as in evaluation; over the upper sets by weight, as in the fit."""
        weights = {name: weight for name, weight, _ in self.run.upper_sets()}
        upper = sum(weights[name] * loss for name, loss in losses["upper"].items()) / sum(weights.values())
        return {"heldout": float(np.mean([*losses["heldout"].values()])), "upper": upper}


def warm(study: Study) -> dict[str, Any]:
    """Losses of the warm target itself."""
    return study.losses(study.run.load(WARM_TARGET))


def retrained(study: Study, j: int, repeat: int) -> dict[str, Any]:
    """The warm target trained on ``S_j`` alone, as a round of a run would, decay branch included: losses and seconds.

    Args:
        study: see there.
        j: which half.
        repeat: another one is another order of the documents; it is the same for all halves.

    Raises:
        BilectError: a loss is not a number.
    """
    start, run, settings = time.perf_counter(), study.run, study.config.training
    before = WARM_TARGET
    model, seed = run.load(before), derive_seed(study.config.seed, "retrain", repeat)
    common: dict[str, Any] = {
        "context": study.config.data.context, "device": run.device,
        "checkpoint_every": 2 * (settings.steps + settings.decay_steps),  # none: a cell is short
    }  # fmt: skip
    rows = study.rows[study.half(j)]
    settings = settings.model_copy(update={"report_to": ()})
    try:
        with TemporaryDirectory() as name, run.progress.task("retrain") as task:
            folder = Path(name)
            common |= {"task": task}
            train(model, run.pool(), rows, folder, settings, seed=seed, start_from=run.training_of(before), **common)
            if settings.decay_steps:
                train(model, run.pool(), rows, folder, settings, seed=seed + 1, start_from=folder, decay=True, **common)
    except NotANumberError as error:  # of two arguments: it would not travel between processes
        raise BilectError(f"retrain: {error} on half {j}; lower training.learning_rate or training.grad_clip") from None
    return {**study.losses(model), "seconds": round(time.perf_counter() - start, 2)}
