"""BLISS: a score model fitted by bilevel optimisation, see ``bilect.bilevel.offline`` (arXiv 2510.06048)."""

import math
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.loading import BatchStream, SetStream
from bilect.errors import BilectError, DivergedError
from bilect.methods._resume import resume
from bilect.methods._score_model import ScoreModelMethod
from bilect.methods.contract import Figures
from bilect.models.score_model import ScoreModel
from bilect.runtime.checkpoints import Stateful, save_parts
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed

__all__ = ["BilevelMethod", "Bliss", "BlissConfig"]


class BlissConfig(FitConfig):
    """The settings of the fit, and the head of the score model."""

    score_head: Literal["sigmoid", "linear"] = Field("sigmoid", description="sigmoid in the paper")


B = TypeVar("B", bound=BlissConfig)


class BilevelMethod(ScoreModelMethod[B]):
    """A ``BilevelFit`` from the warm models, on a sample of the candidates."""

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        if config.kl_coef and inputs.target is None:
            raise BilectError(f"{self.name}: the divergence needs the warm target model; give it, or set kl_coef=0")
        seed = derive_seed(inputs.seed, "fit")
        size = max(math.ceil(config.sample_fraction * len(inputs.rows)), config.lower_batch_size)
        sample = np.random.default_rng(seed).permutation(inputs.rows)[:size]
        lower = BatchStream(inputs.pool, sample, config.lower_batch_size, inputs.pad_id, derive_seed(seed, "lower"),
                            inputs.device, inputs.pool.weight_R)  # fmt: skip
        names, weights, stores = zip(*inputs.upper, strict=True)
        upper = SetStream(
            stores, weights, config.upper_batch_size, inputs.pad_id, derive_seed(seed, "upper"), inputs.device
        )
        proxy = inputs.load(inputs.proxy)
        target = inputs.load(inputs.target) if config.kl_coef and inputs.target is not None else None
        head = torch.Generator().manual_seed(derive_seed(inputs.seed, "score head"))
        self.score_model = ScoreModel.from_causal_lm(proxy, head, config.score_head)
        sets = dict(zip(names, weights, strict=True))
        fit = BilevelFit(proxy, self.score_model, target, lower, upper, config, upper_sets=sets)
        parts: dict[str, Stateful] = {"fit": fit, "lower": lower, "upper": upper}
        path, figures = inputs.scratch / "fit.pt", Figures()
        resume(path, parts, inputs.device)
        task.advance(fit.steps_done)
        while fit.steps_done < config.steps:
            figures = fit.step()
            if not all(math.isfinite(figures[k]) for k in ("lower_loss", "upper_loss", "score_mean", "d_std")):
                raise DivergedError(f"{self.name}: a loss is not a number at step {fit.steps_done}; lower "
                                  "proxy_learning_rate or score_learning_rate")  # fmt: skip
            if fit.steps_done % inputs.checkpoint_every == 0:
                save_parts(path, parts)
            task.advance(1, upper_loss=figures["upper_loss"], score_spread=figures["score_std"])
        lengths = {"lower_length": float(inputs.pool.length_R[sample].mean()), "upper_length": upper.mean_length}
        last = {k: figures.get(k) for k in ("lower_loss", "upper_loss", "score_std")}
        return {"flops": fit_flops(config, proxy, self.score_model, target, **lengths), **last}


class Bliss(BilevelMethod[BlissConfig]):
    """Score model, implicit hypergradient."""

    name = "bliss"
    summary = "a score model by bilevel optimisation, implicit hypergradient (arXiv 2510.06048)"
    Config = BlissConfig
