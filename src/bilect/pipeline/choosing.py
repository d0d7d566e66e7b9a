"""Choosing, for any method: fit on a shard, score it, keep the top."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from bilect.config import SelectionConfig
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError, DivergedError
from bilect.methods import load, methods_of
from bilect.methods.contract import DocumentMethod, Inputs
from bilect.pipeline.context import Figures, RunContext, on_main
from bilect.pipeline.last_good import keep_last_good
from bilect.pipeline.texts import pool_inputs
from bilect.runtime.files import write_json
from bilect.runtime.seeds import derive_seed
from bilect.selection.originals import write_records
from bilect.selection.records import attach_text, extremes, kept_rows
from bilect.selection.scoring import write_scores
from bilect.selection.select import select as keep_top

__all__ = ["SAVED", "documents_of", "fit", "rule_of", "score", "score_rows", "select"]

SAVED = "method"  # folder of a fitted method, in that of its arm and round
SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 6, 1500
AMOUNT = ("keep_ratio", "budget_tokens", "top_k", "max_per_cluster", "cluster_similarity", "output", "format")


def fit(run: RunContext, scratch: Path, arm: str, number: int) -> Figures:
    """Fit a method on the shard of a round, and save it; of one that breaks down, its last good models are kept."""
    method, out = methods_of(run.config)[arm], scratch / run.arm_folder(arm, number) / SAVED
    assert isinstance(method, DocumentMethod)
    inputs = _inputs(run, arm, number, scratch / ".fit", log=out / "metrics.jsonl")
    try:
        with run.progress.task(f"round {number}: fit {arm}", method.steps, unit="steps") as task:
            figures = method.fit(inputs, task)
    except DivergedError as error:
        kept = keep_last_good(run, scratch, error.models, error.good_step)
        raise BilectError(f"{error}; {kept}") from error
    method.save(out)
    return figures


def score(run: RunContext, scratch: Path, arm: str, number: int) -> Figures:
    """Score the whole shard by a fitted method."""
    fitted = partial(_fitted, run.for_workers(), scratch, arm, number)
    out = scratch / run.arm_folder(arm, number) / "scores"
    return score_rows(run, fitted, run.shard(number, len(run.pool())), out, f"round {number}: score by {arm}")


def score_rows(
    run: RunContext, fitted: Callable[[], DocumentMethod[Any]], rows: np.ndarray, out: Path, title: str
) -> Figures:
    """Score rows of the pool into ``out`` by a method that every worker loads; what is scored already is kept."""
    pool = run.pool()
    tokens = int(pool.length_R[rows].sum())
    scorer = _Scorer(fitted, pool)
    with run.progress.task(title, tokens, unit="tokens") as task:
        write_scores(scorer, pool, rows, out, task.advance, run.together)
    return {"tokens": tokens, "flops": scorer.method.score_flops(pool, rows)}


@dataclass
class _Scorer:
    """Scores rows by a method that each process loads when it first needs it."""

    fitted: Callable[[], DocumentMethod[Any]]
    pool: TokenStore

    def __getstate__(self) -> dict[str, Any]:
        return {"fitted": self.fitted, "pool": self.pool}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.method.score(self.pool, rows)

    @cached_property
    def method(self) -> DocumentMethod[Any]:
        return self.fitted()


def _fitted(run: RunContext, scratch: Path, arm: str, number: int) -> DocumentMethod[Any]:
    return load(run.root / run.arm_folder(arm, number) / SAVED, _inputs(run, arm, number, scratch / ".fit"))


@on_main
def select(run: RunContext, scratch: Path, arm: str, number: int) -> Figures:
    """Keep the top: a table with text, what the run is about also as the records that they were; account for it."""
    config, clusters = run.config, run.clusters()
    folder, pool = run.arm_folder(arm, number), run.pool()
    method = methods_of(config)[arm]
    assert isinstance(method, DocumentMethod)
    rule, out = rule_of(method, config.selection), scratch / folder
    inputs = pool_inputs(run.root / "tokens") if arm == config.method and rule.output == "records" else None
    seed = derive_seed(config.seed, "select", number)
    chosen = keep_top(run.root / folder / "scores", out / "selected", rule, seed=seed, clusters=clusters)
    write_json(out / "extremes.json", extremes(out / "selected", pool, SHOWN_DOCUMENTS, SHOWN_CHARACTERS))
    attach_text(out / "selected", pool, rule.format)
    if inputs is not None:
        with run.progress.task(f"round {number}: records", chosen.documents, unit="records") as task:
            write_records(out / "selected", pool, inputs, task.advance, run.engine)
    if chosen.note:
        run.progress.note(chosen.note)
    return {
        "tokens": chosen.tokens,
        "documents": chosen.documents,
        "pool_tokens": chosen.pool_tokens,
        "pool_documents": chosen.pool_documents,
        "threshold": chosen.threshold,
        "near_duplicates": chosen.near_duplicates,
        "kept_share_by_source": chosen.kept_share,
        "pool_share_by_source": chosen.pool_share,
        "kept_fraction_by_source": chosen.kept_fraction,
        "flops": 0.0,
    }


def rule_of(method: DocumentMethod[Any], selection: SelectionConfig) -> SelectionConfig:
    """The rule of the selection as it binds a method: a control keeps the same amount, but knows no shares."""
    if method.bound_by_shares:
        return selection
    return SelectionConfig.model_validate({k: v for k, v in selection.model_dump().items() if k in AMOUNT})


def documents_of(run: RunContext, arm: str, number: int) -> np.ndarray:
    """Rows of the pool that an arm trains on: what its method kept of the shard, or all of it."""
    pool = run.pool()
    shard = run.shard(number, len(pool))
    method = methods_of(run.config)[arm]
    if not method.scores_documents:
        return shard
    assert isinstance(method, DocumentMethod)
    return kept_rows(run.root / run.arm_folder(arm, number) / "selected", pool, in_order=method.trains_in_order)


def _inputs(run: RunContext, arm: str, number: int, scratch: Path, log: Path | None = None) -> Inputs:
    config, pool = run.config, run.pool()
    method = methods_of(config)[arm]
    assert isinstance(method, DocumentMethod)
    return Inputs(
        pool,
        run.shard(number, len(pool)),
        run.upper_sets() if method.uses_upper else (),
        proxy=run.root / "warmup" / "proxy",
        scratch=scratch,
        pad_id=run.pad_id,
        seed=config.seed,
        device=run.device,
        target=run.root / run.target_folder(arm, number - 1) if method.uses_target else None,
        number=number,
        previous=run.root / run.arm_folder(arm, number - 1) / SAVED if number > 1 else None,
        log=log,
        bf16=config.fit.bf16,
        batch_tokens=config.score_batch_tokens,
        checkpoint_every=config.checkpoint_every,
        engine=run.together,
        shard=run.shards,
    )
