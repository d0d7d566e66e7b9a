"""Every document method, fitted on the candidates and asked for their scores."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bilect import methods
from bilect.config import Config
from bilect.errors import DivergedError
from bilect.methods.contract import Inputs
from bilect.pipeline.context import WARM_TARGET
from bilect.runtime.seeds import derive_seed
from bilect.verify.retraining.metagradient import Metagradient, MetagradientConfig
from bilect.verify.retraining.subsets import Study

__all__ = ["VARIANTS", "Variant", "own_variant", "random_scores", "scored", "settings_of"]

Variant = tuple[str, Mapping[str, Any]]  # method, and its settings

VARIANTS: dict[str, Variant] = {
    "perplexity low": ("perplexity", {"keep": "low"}),
    "perplexity middle": ("perplexity", {"keep": "middle"}),
    "perplexity high": ("perplexity", {"keep": "high"}),
    "dsir sum": ("dsir", {"length": "sum"}),
    "dsir mean": ("dsir", {"length": "mean"}),
    "less": ("less", {}),
    "mates": ("mates", {}),
    "influence": ("influence", {}),
    "excess": ("excess", {}),
    "metagradient": ("metagradient", {}),
    **{f"bliss {s}": ("bliss", {"hypergradient": "implicit", "solver": s})
       for s in ("identity", "adam", "neumann", "cg", "sgd")},
    "bliss-penalty": ("bliss-penalty", {"hypergradient": "penalty"}),
}  # fmt: skip


def settings_of(config: Config, variant: Variant) -> dict[str, Any]:
    """All settings: the variant's own, before those of ``methods``, before the run's fit (bilevel methods).

    Raises:
        BilectError: a setting that the method does not know.
    """
    name, own = variant
    fit = config.fit
    if name == "bliss-penalty" and fit.hypergradient == "penalty":  # the run's own, whose twins are not slowed down
        own = fit.model_dump() | {"reference_learning_rate": fit.reference_learning_rate or fit.proxy_learning_rate}
    if name == Metagradient.name:
        own = {"learning_rate": config.training.learning_rate} | dict(own)
        return MetagradientConfig.model_validate(own).model_dump(mode="json")
    return dict(methods.make_for(config, name, own).config.model_dump(mode="json"))


def own_variant(config: Config) -> str:
    """The variant that the run itself would choose by."""
    return f"bliss {config.fit.solver}" if config.fit.hypergradient == "implicit" else "bliss-penalty"


def scored(study: Study, name: str, settings: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Scores of the candidates by one method, and what fit and scoring cost.

    Args:
        study: see there.
        name: of the method.
        settings: all of its settings.
        k: number of the seed; it is the same for all settings of a method.

    Returns:
        ``scores``, ``flops``, ``seconds``; of a fit that breaks down, which is a finding, ``error`` instead.
    """
    own = MetagradientConfig.model_validate(settings) if name == Metagradient.name else None
    method = methods.make(name, settings) if own is None else Metagradient(own)
    with TemporaryDirectory() as folder, study.run.progress.task("fit") as task:
        inputs = _inputs(study, Path(folder), derive_seed(study.config.seed, "method", name, k))
        start = time.perf_counter()
        try:
            flops = method.fit(inputs, task)["flops"]
        except DivergedError as error:
            return {"error": str(error)}
        scores = method.score(inputs.pool, study.rows)
        seconds = time.perf_counter() - start
        flops += method.score_flops(inputs.pool, study.rows)
    if not np.isfinite(scores).all():
        return {"error": f"{name}: a score is not a number"}
    return {"scores": scores.tolist(), "flops": flops, "seconds": round(seconds, 2)}


def random_scores(study: Study, seeds: int) -> np.ndarray:
    """Scores of the random control under many seeds, (seeds, candidates)."""
    scores = []
    with TemporaryDirectory() as folder, study.run.progress.task("random") as task:
        inputs = _inputs(study, Path(folder), 0)
        for k in range(seeds):
            method = methods.make("random")  # a fit is of one object
            method.fit(replace(inputs, seed=derive_seed(study.config.seed, "random score", k)), task)
            scores.append(method.score(inputs.pool, study.rows))
    return np.stack(scores)


def _inputs(study: Study, scratch: Path, seed: int) -> Inputs:
    run, config = study.run, study.config
    return Inputs(
        run.pool(),
        study.rows,
        run.upper_sets(),
        proxy=run.root / "warmup" / "proxy",
        target=run.root / WARM_TARGET,
        scratch=scratch,
        pad_id=run.pad_id,
        seed=seed,
        device=run.device,
        bf16=config.fit.bf16,
        batch_tokens=config.score_batch_tokens,
    )
