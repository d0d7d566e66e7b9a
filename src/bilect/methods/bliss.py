"""BLISS: a score model fitted by bilevel optimisation, see ``bilect.bilevel.offline`` (arXiv 2510.06048, algorithm 1).

Every round starts from the warmed-up proxy and from the score model of the round before (``reset_proxy``,
``carry_score_model``), with the target as it is by then.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline import solvers
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.loading import BatchStream, SetStream
from bilect.errors import BilectError, DivergedError
from bilect.methods._log import StepLog
from bilect.methods._resume import resume
from bilect.methods._score_model import ScoreModelMethod
from bilect.methods.contract import Figures, Foresight, Sizes
from bilect.models.loading import load_score_model
from bilect.models.score_model import ScoreModel
from bilect.runtime.checkpoints import Stateful, all_finite, save_parts
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed

__all__ = ["BilevelMethod", "Bliss", "BlissConfig"]

FINITE = ("lower_loss", "upper_loss", "score_mean", "d_std")  # of the figures of a step


class BlissConfig(FitConfig):
    """The settings of the fit, and the head of the score model."""

    score_head: Literal["sigmoid", "linear"] = Field("sigmoid", description="sigmoid in the paper")

    @field_validator("solver")
    @classmethod
    def _known(cls, name: str) -> str:
        solvers.get(name)
        return name

    @model_validator(mode="after")
    def _positive(self) -> "BlissConfig":
        if self.weighting == "naive" and self.score_head != "sigmoid":
            raise ValueError("naive weighting needs positive scores: set score_head=sigmoid")
        return self


B = TypeVar("B", bound=BlissConfig)


class BilevelMethod(ScoreModelMethod[B]):
    """A ``BilevelFit`` on a sample of the candidates, with checkpoints, a log of its steps and an eye on its losses."""

    moves_proxy = True
    proxy: PreTrainedModel

    @property
    def uses_target(self) -> bool:
        """The divergence does."""
        return self.config.kl_coef > 0

    @property
    def steps(self) -> int:
        """Score-model steps."""
        return self.config.steps

    def settings(self, number: int) -> dict[str, Any]:
        """All but what is carried over: in the first round there is nothing to carry."""
        settings = super().settings(number)
        return {k: v for k, v in settings.items() if number > 1 or k not in ("reset_proxy", "carry_score_model")}

    def foresee(self, sizes: Sizes) -> Foresight:
        """All steps of the fit, and a pass of the score model."""
        lengths = {"lower_length": sizes.length, "upper_length": sizes.upper_length}
        target = sizes.target if self.uses_target else None
        flops = fit_flops(self.config, sizes.proxy, sizes.score_model(None), target, **lengths)
        tokens = self.config.steps * self.config.lower_batch_size * sizes.length
        return Foresight(tokens, flops, self._foreseen_scoring(sizes))

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        seed = inputs.derive("fit")
        size = max(math.ceil(config.sample_fraction * len(inputs.rows)), config.lower_batch_size)
        sample = np.random.default_rng(seed).permutation(inputs.rows)[:size]
        lower = BatchStream(inputs.pool, sample, config.lower_batch_size, inputs.pad_id, derive_seed(seed, "lower"),
                            inputs.device, inputs.pool.weight_R)  # fmt: skip
        names, weights, stores = zip(*inputs.upper, strict=True)
        upper_seed = derive_seed(seed, "upper")
        upper = SetStream(stores, weights, config.upper_batch_size, inputs.pad_id, upper_seed, inputs.device)
        self.proxy = self._proxy()
        target = self._target()
        self.score_model = self._score_model()
        sets = dict(zip(names, weights, strict=True))
        fit = BilevelFit(self.proxy, self.score_model, target, lower, upper, config, upper_sets=sets)
        with StepLog(inputs.log) as log:
            parts: dict[str, Stateful] = {"fit": fit, "lower": lower, "upper": upper, "log": log}
            last = self._steps(fit, parts, log, task)
        lengths = {"lower_length": float(inputs.pool.length_R[sample].mean()), "upper_length": upper.mean_length}
        return {
            "tokens": int(config.steps * config.lower_batch_size * lengths["lower_length"]),
            "flops": fit_flops(config, self.proxy, self.score_model, target, **lengths),
            **{k: last.get(k) for k in ("lower_loss", "upper_loss", "score_std", "label_correlation")},
        }

    def _steps(self, fit: BilevelFit, parts: Mapping[str, Stateful], log: StepLog, task: Task) -> Figures:
        """All steps that are left; returns the figures of the last."""
        inputs, config, path = self.inputs, self.config, self.inputs.scratch / "fit.pt"
        log.start_again() if not path.is_file() else resume(path, parts, inputs.device)
        task.advance(fit.steps_done)
        figures, weights = Figures(), _Weights([*fit.params.values(), *fit.score_model.parameters()])
        while fit.steps_done < config.steps:
            before = weights.copies()
            figures = fit.step()
            log.write(figures)
            fine = all(math.isfinite(figures[k]) for k in FINITE)
            if fine:
                weights.good, weights.good_step = before, fit.steps_done - 1
            save, last = fit.steps_done % inputs.checkpoint_every == 0, fit.steps_done == config.steps
            if not fine or ((save or last) and not all_finite(weights.params)):
                weights.restore()
                raise DivergedError(
                    f"{self.name}: a loss is not a number at step {figures['step']} of round {inputs.number}; "
                    "lower fit.proxy_learning_rate or fit.score_learning_rate",
                    {"proxy": self.proxy, "score_model": self.score_model}, weights.good_step,
                )  # fmt: skip
            task.advance(1, proxy_loss=figures["lower_loss"], score_spread=figures["score_std"])
            if save and not last:
                save_parts(path, parts)
        return figures

    def _proxy(self) -> PreTrainedModel:
        inputs = self.inputs
        if inputs.previous is None or self.config.reset_proxy:
            return inputs.load(inputs.proxy)
        return inputs.load(inputs.previous / "proxy")

    def _target(self) -> PreTrainedModel | None:
        if not self.uses_target:
            return None
        if self.inputs.target is None:
            raise BilectError(f"{self.name}: the divergence needs the warm target model; give it, or set kl_coef=0")
        return self.inputs.load_frozen(self.inputs.target)

    def _score_model(self) -> ScoreModel:
        inputs = self.inputs
        if inputs.previous is not None and self.config.carry_score_model:
            return load_score_model(inputs.previous / "score_model").to(inputs.device)
        head = torch.Generator().manual_seed(inputs.derive("score head"))
        return ScoreModel.from_causal_lm(self.proxy, head, self.config.score_head)

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        self.proxy.save_pretrained(folder / "proxy")


@dataclass
class _Weights:
    """The weights of both models, and copies of the newest at which all was well."""

    params: list[Tensor]
    good_step: int | None = None

    def __post_init__(self) -> None:
        self.good = self.copies()

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def restore(self) -> None:
        for p, saved in zip(self.params, self.good, strict=True):
            p.data.copy_(saved)


class Bliss(BilevelMethod[BlissConfig]):
    """Score model; the run's ``fit`` as it stands."""

    name = "bliss"
    summary = "a score model by bilevel optimisation, implicit hypergradient (arXiv 2510.06048)"
    Config = BlissConfig
